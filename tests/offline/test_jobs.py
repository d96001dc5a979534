"""Jobs in one process: results equal those of single calls, jobs resume, and other jobs are refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_jobs import planned, read_output, trained_run, write_parquet

from personaplug import inference
from personaplug.config_parsing import load_config
from personaplug.data import read_items
from personaplug.errors import ConfigError, DamagedFile, RunConflict, WorkerFailure
from personaplug.infra import locks
from personaplug.infra.checksums import read_json
from personaplug.offline import output_folder, worker
from personaplug.offline.answers import AnswerWriter
from personaplug.offline.on_ray import _TRIES, _counted
from personaplug.offline.output_folder import JOB, MANIFEST, missing_shards, opened
from personaplug.offline.running import run_job
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run, open_models

SECRET = "zanzibar"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[str, Any]]]:
    return trained_run(tmp_path_factory.mktemp("offline"))


@pytest.fixture
def run(made: tuple[Run, list[dict[str, Any]]]) -> Run:
    return made[0]


@pytest.fixture
def rows(made: tuple[Run, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return made[1]


@pytest.fixture
def source(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """Two files with 5 and 7 rows."""
    write_parquet(tmp_path / "in" / "a.parquet", rows[:5])
    write_parquet(tmp_path / "in" / "b.parquet", rows[5:12])
    return tmp_path / "in"


def test_answers_equal_those_of_single_calls(
    run: Run, rows: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    manifest = run_job(planned(run, source, tmp_path / "out"))
    results = {row["id"]: row for row in read_output(tmp_path / "out")}
    assert (manifest["rows"], manifest["errors"], len(results)) == (12, 0, 12)
    models = open_models(run.config)
    for row in rows[:12]:
        items = read_items(row["history"], task=run.task)
        expected = inference.generate(run, row["prompt"], history=items, models=models)
        result = results[row["id"]]
        assert (result["answer"], result["items"], result["error"]) == (expected, len(items), None)
        assert expected.distribution is not None
        assert result["probabilities"] == pytest.approx(dict(expected.distribution.probabilities), abs=1e-3)


def test_sampled_text_of_a_row_does_not_depend_on_other_rows(run: Run, source: Path, tmp_path: Path) -> None:
    settings = ["decoding=generate", "num_beams=1", "sample_temperature=1", "max_new_tokens=6", "persona_scale=0.5"]
    config = load_config(overrides=settings, base=run.config)
    run_job(planned(run, source, tmp_path / "one", config=config, shard_rows=1))
    run_job(planned(run, source, tmp_path / "all", config=config, shard_rows=1000))
    one, together = ({row["id"]: row["answer"] for row in read_output(tmp_path / name)} for name in ("one", "all"))
    assert one == together
    assert len(set(one.values())) > 6
    assert {"finished", "answer"} <= read_output(tmp_path / "one")[0].keys()


def test_plain_model_answers_without_a_history(run: Run, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in" / "a.parquet", [{"prompt": row["prompt"]} for row in rows[:3]])
    run_job(planned(run, source, tmp_path / "out", plain=True))
    models = open_models(run.config)
    expected = [inference.generate(run, row["prompt"], models=models, plain=True) for row in rows[:3]]
    assert [(row["id"], row["answer"]) for row in read_output(tmp_path / "out")] == [
        (f"a.parquet:{number}", answer) for number, answer in enumerate(expected, start=1)
    ]


@pytest.mark.parametrize("with_prompt", [True, False], ids=["prompt", "no prompt"])
def test_encode_writes_the_soft_tokens_of_each_row(
    with_prompt: bool, run: Run, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    without = set() if with_prompt else {"prompt"}
    rows = [{key: value for key, value in row.items() if key not in without} for row in rows[:4]]
    source = write_parquet(tmp_path / "in" / "a.parquet", rows)
    manifest = run_job(planned(run, source, tmp_path / "out", command="encode"))
    models = open_models(run.config)
    personalizer = Personalizer(inference.load_plug(run, models))
    for row, result in zip(rows, read_output(tmp_path / "out"), strict=True):
        encoded = personalizer.encode(read_items(row["history"], task=run.task), encoder=models.encoder)
        query = inference.query_on_task(run.task, row["prompt"]).text if with_prompt else ""
        soft = personalizer.persona(query, encoded)
        assert (result["id"], result["user_id"]) == (row["id"], row["user_id"])
        vectors = np.array(result["soft_tokens"]).reshape(manifest["soft_tokens"])
        np.testing.assert_allclose(vectors, soft.vectors[0].float().numpy(), atol=1e-3)
        assert soft.label_bias is not None
        np.testing.assert_allclose(result["label_bias"], soft.label_bias[0].float().numpy(), atol=1e-3)


def test_shards_cover_each_row_once_and_are_named_after_input_and_job(run: Run, source: Path, tmp_path: Path) -> None:
    job = planned(run, source, tmp_path / "out")
    parts = [(shard.file, row) for shard in job.shards for row in range(shard.first, shard.first + shard.rows)]
    assert parts == [(0, row) for row in range(5)] + [(1, row) for row in range(7)]
    assert [shard.rows for shard in job.shards] == [3, 2, 3, 3, 1]
    assert job.shards[1].name == f"part-00000-a-0000000003-{job.fingerprint[:8]}.parquet"
    assert planned(run, source, tmp_path / "elsewhere").fingerprint == job.fingerprint
    on_cpu = load_config(overrides=["device=cpu"], base=run.config)
    assert planned(run, source, tmp_path / "out", config=on_cpu).fingerprint == job.fingerprint
    weaker = load_config(overrides=["persona_scale=0.5"], base=run.config)
    assert planned(run, source, tmp_path / "out", config=weaker).fingerprint != job.fingerprint


def test_interrupted_job_resumes_with_the_missing_shards(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    original = worker.Worker.run

    def interrupted(self: worker.Worker, shard: Any) -> None:
        if len(computed) == 2:
            raise KeyboardInterrupt
        original(self, shard)
        computed.append(shard.name)

    job, output = planned(run, source, tmp_path / "out"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    assert len(read_output(output)) == 5
    assert not (output / MANIFEST).exists()
    (output / f".{job.shards[2].name}.0123abcd.tmp").write_text("half of a shard")
    finished = {name: (output / name).stat().st_mtime_ns for name in computed}
    run_job(job)
    assert {name: (output / name).stat().st_mtime_ns for name in computed} == finished
    assert sorted(row["id"] for row in read_output(output)) == sorted(row["id"] for row in read_output(source))
    assert not list(output.glob(".*"))
    manifest = read_json(output / MANIFEST, remedy="")
    monkeypatch.setattr(worker.Worker, "run", interrupted)  # a finished job computes nothing
    assert run_job(job) == manifest


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"settings": ["num_beams=1", "persona_scale=0.5"]}, "another num_beams, persona_scale"),
        ({"shard_rows": 4}, "another rows per shard"),
        ({"command": "encode"}, "another command"),
        ({"plain": True}, "another plug"),
        ({"rows": 11}, "another input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_job_in_the_same_folder_is_refused(
    changes: dict[str, Any], difference: str, run: Run, rows: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with opened(planned(run, source, output)):
        pass
    before = (output / JOB).read_text()
    if "rows" in changes:
        write_parquet(source / "b.parquet", rows[5 : changes.pop("rows")])
    config = load_config(overrides=changes.pop("settings", []), base=run.config)
    with pytest.raises(RunConflict, match=f"holds a job with {difference}"):
        run_job(planned(run, source, output, config=config, **changes))
    assert (output / JOB).read_text() == before


def test_folder_with_other_files_is_refused(run: Run, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_parquet(output / "other.parquet", [{"id": "x"}])
    with pytest.raises(RunConflict, match="neither empty nor the output of a job"):
        run_job(planned(run, source, output))
    assert [path.name for path in output.iterdir()] == ["other.parquet"]
    (output / "other.parquet").unlink()
    (output / f".{JOB}.0123abcd.tmp").write_text("half of a job's description")
    run_job(planned(run, source, output))
    write_parquet(output / "other.parquet", [{"id": "x"}])
    with pytest.raises(RunConflict, match=r"other\.parquet, which is not a part of this job"):
        run_job(planned(run, source, output))


def test_second_process_in_the_same_folder_is_refused(run: Run, source: Path, tmp_path: Path) -> None:
    job = planned(run, source, tmp_path / "out")
    with opened(job), pytest.raises(RunConflict, match="Another process is writing to"):
        run_job(job)


def test_job_that_starts_between_check_and_lock_is_not_overwritten(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, lock = tmp_path / "out", locks.sole_process
    first, second = planned(run, source, output), planned(run, source, output, shard_rows=4)

    @contextmanager
    def late(path: Path, **words: str) -> Iterator[None]:
        monkeypatch.setattr(output_folder, "sole_process", lock)
        with opened(first):  # another process is faster, and ends
            pass
        with lock(path, **words):
            yield

    monkeypatch.setattr(output_folder, "sole_process", late)
    with pytest.raises(RunConflict, match="holds a job with another rows per shard"), opened(second):
        pass
    with opened(first):
        pass


def test_input_that_changes_during_the_job_is_refused(run: Run, source: Path, tmp_path: Path) -> None:
    job = planned(run, source, tmp_path / "out")
    os.utime(source / "b.parquet", ns=(1, 1))
    with pytest.raises(RunConflict, match=r"b\.parquet changed during the job"):
        run_job(job)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_damaged_shard_is_named(run: Run, source: Path, tmp_path: Path) -> None:
    job = planned(run, source, tmp_path / "out")
    run_job(job)
    path = tmp_path / "out" / job.shards[0].name
    write_parquet(path, [{"id": "x"}])
    with pytest.raises(DamagedFile, match=f"{path.name} is damaged: it is not a shard of this job. Delete it"):
        run_job(job)
    path.unlink()
    assert run_job(job)["rows"] == 12


def test_invalid_rows_have_an_error_and_all_others_a_result(
    run: Run, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    invalid = [{**rows[1], "prompt": SECRET}, {**rows[2], "history": [{"text": SECRET, "score": None}]}]
    source = write_parquet(tmp_path / "in.parquet", [rows[0], *invalid, *rows[3:6]])
    manifest = run_job(planned(run, source, tmp_path / "out"))
    results = read_output(tmp_path / "out")
    assert (manifest["rows"], manifest["errors"]) == (6, 2)
    assert [row["answer"] is None for row in results] == [row["error"] is not None for row in results]
    assert [(row["id"], row["user_id"]) for row in results if row["error"]] == [
        (row["id"], row["user_id"]) for row in rows[1:3]
    ]
    assert SECRET not in str(results)


def test_input_without_a_valid_first_row_is_refused_before_models_are_loaded(
    run: Run, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source = write_parquet(tmp_path / "in.parquet", [{**row, "prompt": SECRET} for row in rows])
    with pytest.raises(ConfigError, match=r"first 12 rows of .* are invalid; row 1: A prompt of task") as error:
        planned(run, source, tmp_path / "out")
    assert SECRET not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unexpected_error_of_a_worker_does_not_quote_the_user(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(AnswerWriter, "results", fail)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(WorkerFailure, match=r"ValueError in fail, .*test_jobs") as error,
    ):
        run_job(planned(run, source, tmp_path / "out"))
    assert SECRET not in f"{error.value}{error.value.__context__ if not error.value.__suppress_context__ else ''}"
    assert SECRET not in caplog.text


def test_worker_that_does_not_see_the_output_folder_is_refused(run: Run, source: Path, tmp_path: Path) -> None:
    job = planned(run, source, tmp_path / "out")
    with pytest.raises(RunConflict, match="A worker sees another folder"):
        worker.Worker(job).run(job.shards[0])


def test_worker_with_another_plug_is_refused(run: Run, source: Path, tmp_path: Path) -> None:
    job = replace(planned(run, source, tmp_path / "out"), plug="0123456789abcdef")
    with pytest.raises(RunConflict, match="holds another run or plug than at the start of the job"):
        run_job(job)


def test_shard_whose_workers_die_is_not_retried_forever(run: Run, source: Path, tmp_path: Path) -> None:
    job = planned(run, source, tmp_path / "out")
    with opened(job):
        for _ in range(_TRIES):
            with pytest.raises(KeyboardInterrupt), _counted(job, job.shards[0]):
                raise KeyboardInterrupt  # stands for the death of the process
        with pytest.raises(WorkerFailure, match="each of 4 workers died"), _counted(job, job.shards[0]):
            pass
        with _counted(job, job.shards[1]):
            pass
    with opened(job):  # another run of the command starts to count again
        assert not list(job.output.glob(".*"))
        assert len(missing_shards(job)) == 5


def test_input_and_output_must_be_separate_folders(run: Run, source: Path) -> None:
    for output in (source, source / "out", source.parent):
        with pytest.raises(ConfigError, match="contain each other"):
            planned(run, source, output)
