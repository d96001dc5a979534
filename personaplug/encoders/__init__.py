"""Encode texts as unit vectors, store the vectors on disk, and refer to them from samples."""

from __future__ import annotations

import re
from collections.abc import Callable

from personaplug.encoders.base import Encoder, EncoderIdentity, QueryEncoder
from personaplug.encoders.hashing import HashEncoder
from personaplug.encoders.sentence_transformer import SentenceEncoder
from personaplug.errors import ConfigError
from personaplug.infra.plugins import load_plugins, register

__all__ = [
    "Encoder",
    "EncoderIdentity",
    "HashEncoder",
    "QueryEncoder",
    "SentenceEncoder",
    "open_encoder",
    "register_encoder",
]

_factories: dict[str, Callable[[str, str], Encoder]] = {}


def register_encoder(name: str, factory: Callable[[str, str], Encoder]) -> None:
    """Make `encoder=NAME` and `encoder=NAME:ARGUMENT` open an encoder.

    Args:
        name: letters, digits, `_` and `-`, but not `package`.
        factory: takes the argument ("" without one) and the device.
    """
    if not re.fullmatch(r"[\w-]+", name) or name == "package":
        raise ConfigError(
            f"An encoder's name must consist of letters, digits, _ and -, and not be `package`; found {name!r}."
        )
    register(_factories, name, factory, kind="encoder")


def open_encoder(spec: str, *, device: str = "cpu", engine: str = "torch") -> Encoder:
    """Open an encoder by name.

    Args:
        spec: `NAME` or `NAME:ARGUMENT` of a registered encoder such as `hash:WIDTH`, or a name for
            `model_hub.find_model`.
        engine: `torch`, `openvino` or `auto`, for many texts at once; only `SentenceEncoder` uses it.
    Raises:
        ConfigError: if a setting is out of range.
        MissingExtra: if the engine is not installed.
        MissingModel: if there is no such model.
    """
    name, _, argument = spec.partition(":")
    if name not in _factories:
        load_plugins()
    if name in _factories:
        return _factories[name](argument, device)
    return SentenceEncoder(spec, device=device, engine=engine)


def _open_hash_encoder(width: str, device: str) -> HashEncoder:
    if not re.fullmatch("[0-9]{1,5}", width or "0"):
        raise ConfigError(
            f"The hash encoder must be `hash` or `hash:WIDTH`, for example `hash:128`; found 'hash:{width}'."
        )
    return HashEncoder(int(width or 256))


register_encoder("hash", _open_hash_encoder)
