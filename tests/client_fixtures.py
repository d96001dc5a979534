"""Fixtures for the tests of clients: a server, and the client programs if they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recording_server import RecordingServer, recording

from personaplug.llm.causal_lm import CausalLM

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("PERSONAPLUG_CLIENTS_PYTHON", ROOT / ".venv-clients" / "bin" / "python"))
HINT = "`make test-clients` installs it"


@pytest.fixture(scope="session")
def server(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    with recording(toy, tmp_path_factory.mktemp("clients")) as opened:
        yield opened


@pytest.fixture(scope="session")
def client_python() -> Callable[[str], Path]:
    """The Python of the clients' environment; skip the test if a module is missing."""

    def find(module: str) -> Path:
        command = [str(PYTHON), "-c", f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"]
        if not PYTHON.exists() or subprocess.run(command).returncode:
            pytest.skip(f"{module} is not installed at {PYTHON}: {HINT}, or set PERSONAPLUG_CLIENTS_PYTHON")
        return PYTHON

    return find


@pytest.fixture
def node_folder(tmp_path: Path) -> Path:
    """An empty folder from which Node can import the clients' packages."""
    modules = Path(os.environ.get("PERSONAPLUG_CLIENTS_NODE_MODULES", ROOT / "node_modules"))
    if shutil.which("node") is None or not (modules / "openai").is_dir():
        pytest.skip(f"node or its package openai is not installed at {modules}: {HINT}")
    (tmp_path / "node_modules").symlink_to(modules, target_is_directory=True)
    return tmp_path
