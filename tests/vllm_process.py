"""A real vLLM server (`make vllm`) as a process of a test."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from free_ports import free_port

HERE = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("PERSONAPLUG_VLLM_PYTHON", HERE / ".venv-vllm" / "bin" / "python"))


@contextmanager
def vllm(folder: Path, *arguments: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a vLLM server of the model; yield its address and its process."""
    port = port or free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "small"]
    command += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    command += ["--max-num-seqs", "16", "--enforce-eager", *arguments]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process)
        yield url, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        assert process.poll() is None, "vLLM ended while it was starting"
        time.sleep(1)
    raise AssertionError("vLLM did not start within ten minutes")
