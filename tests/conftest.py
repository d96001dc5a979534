"""What several test files share: toy parts, small data, no network."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports huggingface_hub: the suite must not depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is loaded, as the command line does: beside other work, threads that spin on take minutes for seconds.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest

from personaplug.backends.decoder_only import DecoderOnlyBackend
from personaplug.backends.toy import load_toy
from personaplug.encoder import HashEncoder

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def toy() -> DecoderOnlyBackend:
    return load_toy()


@pytest.fixture(scope="session")
def hashing() -> HashEncoder:
    return HashEncoder(32)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED_DATA}")
    return SHARED_DATA
