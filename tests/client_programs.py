"""Run client programs of other projects: once, or as a proxy during a test."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

_SECONDS = 600  # some programs import slowly on a busy machine
_OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONIOENCODING": "utf-8"}


def run_program(command: Sequence[str | Path], *, folder: Path | None = None) -> str:
    """Run a program and return its output; raise CalledProcessError if it fails."""
    words, environment = list(map(str, command)), {**os.environ, **_OFFLINE}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, cwd=folder, env=environment, timeout=_SECONDS)
    return done.stdout.decode()


@contextmanager
def running_program(command: Sequence[str | Path], *, output: Path, ready_url: str) -> Iterator[None]:
    """Run a server until the block ends, and write its output to the file `output`."""
    with output.open("wb") as written:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **_OFFLINE},
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(ready_url, process)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(_SECONDS):
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        assert process.poll() is None, "the program exited during start-up"
        time.sleep(1)
    raise AssertionError(f"the program did not start within {_SECONDS} s")
