"""Encoders from outside the package: registered by name, opened as `NAME` or `NAME:ARGUMENT`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from personaplug import encoders
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import EncoderIdentity, QueryEncoder, open_encoder, register_encoder
from personaplug.encoders.base import Vectors
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import encode_samples
from personaplug.errors import ConfigError


class LengthEncoder:
    """Encode the length of a text as an angle."""

    width, truncated = 2, 0

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.identity = EncoderIdentity(
            name=f"length:{longest}",
            revision=None,
            pooling="none",
            normalized=True,
            prompt="",
            query_prompt="",
            max_length=None,
            width=self.width,
            fingerprint=f"{longest:016x}",
        )

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        angles = np.array([len(text) / self.longest for text in texts], dtype=np.float32)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def query_encoder(self) -> QueryEncoder:
        raise NotImplementedError


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_factories", dict(encoders._factories))


@pytest.mark.usefixtures("_restored")
def test_register_encoder_encodes_the_history_of_a_sample(tmp_path: Path) -> None:
    register_encoder("length", lambda argument, device: LengthEncoder(int(argument or 100)))
    assert open_encoder("length").identity.name == "length:100"
    encoder = open_encoder("length:20")
    items = tuple(HistoryItem(str(n), (("text", "a" * n),)) for n in (1, 9))
    store = EmbeddingStore.open(tmp_path / "vectors", encoder)
    (encoded,) = encode_samples([Sample("1", "u", "p", "q", "t", items)], store)
    expected = encoder.encode([item.text for item in items])
    np.testing.assert_allclose(store.gather(encoded.rows), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["", "a:b", "owner/model", "package"])
def test_register_encoder_with_invalid_name_raises(name: str) -> None:
    with pytest.raises(ConfigError, match="An encoder's name must consist of letters"):
        register_encoder(name, lambda argument, device: open_encoder("hash"))
