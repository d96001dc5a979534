"""Jobs on Ray: a worker dies in the middle, and each row still has one result, equal to that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from offline_jobs import planned, read_output, trained_run, write_parquet

from personaplug.errors import ConfigError, DamagedFile
from personaplug.offline.on_ray import compute
from personaplug.offline.output_folder import opened
from personaplug.offline.running import RayPlace, run_job

ROOT = Path(__file__).resolve().parents[2]
COPIES = 30
START_S = 240


def test_address_without_a_cluster_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    run, rows = trained_run(tmp_path)
    job = planned(run, write_parquet(tmp_path / "in.parquet", rows), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"No Ray cluster answers at .127\.0\.0\.1:1. .*Give `local`"):
        run_job(job, ray=RayPlace("127.0.0.1:1"))


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's logs. The names of Ray's sockets limit the length of its path."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def _started(*words: object, ray_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the command line in a process; end the process with the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(ray_folder)}
    command = [sys.executable, "-m", "personaplug", *map(str, words)]
    with subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of Ray's workers below a process."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [each for each in below if "MapWorker" in " ".join(each.cmdline())]


@pytest.mark.slow
def test_each_row_has_one_result_if_a_worker_is_killed(tmp_path: Path, ray_folder: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    run, rows = trained_run(tmp_path)
    source = tmp_path / "in"
    for copy in range(COPIES):
        write_parquet(source / f"{copy}.parquet", [{**row, "id": f"{copy} {row['id']}"} for row in rows])
    alone, output = planned(run, source, tmp_path / "alone"), tmp_path / "out"
    run_job(alone)
    words = ("--run", run.folder, "--input", source, "--output", output, "--shard-rows", 3)
    with _started("generate", *words, "--ray", "local", "--workers", 2, ray_folder=ray_folder) as process:
        deadline = time.monotonic() + START_S
        while (len(list(output.glob("part-*.parquet"))) < 2 or len(_workers(process)) < 2) and process.poll() is None:
            assert time.monotonic() < deadline, "two workers did not start, or no shard was written"
            time.sleep(0.01)
        assert process.poll() is None, "the job ended before its second worker started"
        victim, *others = _workers(process)
        victim.send_signal(signal.SIGKILL)
        written = len(list(output.glob("part-*.parquet")))
        assert len(others) == 1
        assert written < len(alone.shards), "the worker should die in the middle"
        _, errors = process.communicate(timeout=START_S)
    assert process.returncode == 0, errors
    key = lambda row: row["id"]  # noqa: E731
    results, expected = (sorted(read_output(folder), key=key) for folder in (output, tmp_path / "alone"))
    assert results == expected
    assert len({row["id"] for row in results}) == len(rows) * COPIES
    logs = [path.read_bytes() for path in ray_folder.rglob("*") if path.is_file()]
    assert any(b"MapWorker" in log for log in logs)
    assert not any(b"film: " in text for text in [*logs, errors.encode()])


@pytest.mark.slow
def test_error_of_a_worker_reaches_the_caller(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    run, rows = trained_run(tmp_path)
    job = planned(run, write_parquet(tmp_path / "in.parquet", rows), tmp_path / "out")
    (run.folder / "plug" / "seed-0" / "plug.safetensors").unlink()
    with opened(job), pytest.raises(DamagedFile, match=r"plug\.safetensors is damaged: it is missing"):
        list(compute(job, job.shards, address="local", workers=1))
