"""Fixtures of several test files: toy models, small data, no network."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

# Set before the import of huggingface_hub, so that the tests need no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Set before the import of torch, as in the command line: on a busy machine, spinning threads slow torch down a lot.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from personaplug.encoders import HashEncoder
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.tiny import load_tiny_llm

if TYPE_CHECKING:
    from postgres_server import PostgresServer
    from stores import Place
    from vllm_stand_in import StandIn

# Each httpx call creates a client that loads all CA certificates, which takes most of the time of a local call.
vars(ssl)["create_default_context"] = lru_cache(ssl.create_default_context)
# On a busy machine, a reply can take longer than httpx's 5 seconds.
vars(DEFAULT_TIMEOUT_CONFIG).update(dict.fromkeys(("connect", "read", "write", "pool"), 60.0))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def toy() -> CausalLM:
    return load_tiny_llm()


@pytest.fixture(scope="session")
def hashing() -> HashEncoder:
    return HashEncoder(32)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    from postgres_server import NoServer, postgres_server

    try:
        with postgres_server() as server:
            yield server
    except NoServer as reason:
        pytest.skip(f"no PostgreSQL starts here: {reason}")


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty location for a history store, in SQLite and in PostgreSQL."""
    from stores import Place

    if request.param == "sqlite":
        return Place(str(tmp_path / "store.db"))
    server: PostgresServer = request.getfixturevalue("postgres")
    return Place(server.cleaned_database(), server)


@pytest.fixture
def stand_in() -> StandIn:
    """The stand-in for vLLM."""
    from vllm_stand_in import StandIn

    return StandIn()


@pytest.fixture
def address(stand_in: StandIn) -> Iterator[str]:
    """The URL of the served vLLM stand-in."""
    from live_server import running

    with running(stand_in.app) as url:
        yield url


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's search path for installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder
