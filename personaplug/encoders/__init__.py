"""Texts to unit vectors; vectors on disk; samples whose histories are rows of them."""

from __future__ import annotations

import torch

from personaplug.encoders.base import Encoder, EncoderIdentity, QueryEncoder
from personaplug.encoders.hashing import HashEncoder
from personaplug.encoders.sentence_transformer import SentenceEncoder
from personaplug.errors import ConfigError

__all__ = ["Encoder", "EncoderIdentity", "HashEncoder", "QueryEncoder", "SentenceEncoder", "open_encoder"]


def open_encoder(
    spec: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    max_length: int | None = None,
    engine: str = "torch",
) -> Encoder:
    """Open an encoder by name.

    Args:
        spec: `hash`, `hash:WIDTH`, or what `model_hub.find_model` finds.
        device: where it runs.
        dtype: number format of the weights.
        query_prompt: in front of queries; None = the model's own.
        document_prompt: in front of items; None = the model's own.
        max_length: cut texts to this many tokens; None = the model's own limit.
        engine: what encodes many texts: `torch`, `openvino` or `auto` (see `SentenceEncoder`); `hash` needs none.
    Raises:
        ConfigError: if a setting is out of range.
        MissingExtra: if the engine asked for is not installed.
        MissingModel: if the model is nowhere to be found.
    """
    if spec == "hash" or spec.startswith("hash:"):
        return HashEncoder(_hash_width(spec))
    return SentenceEncoder(
        spec,
        device=device,
        dtype=dtype,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        max_length=max_length,
        engine=engine,
    )


def _hash_width(spec: str) -> int:
    width = spec.removeprefix("hash").removeprefix(":")
    if width and not width.isdecimal():
        raise ConfigError(f"{spec!r}: write `hash` or `hash:WIDTH`, for instance `hash:128`.")
    return int(width or 256)
