"""What a saved plug says of itself: how it is built, and the two models that it fits (plug.json)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from personaplug.config import Config, PlugConfig
from personaplug.config_parsing import with_values
from personaplug.encoders import EncoderIdentity
from personaplug.errors import MissingData
from personaplug.infra.atomic_io import write_json
from personaplug.infra.model_hub import LLMIdentity

FORMAT_VERSION = 1
ABOUT = "plug.json"


@dataclass(frozen=True)
class PlugSpec:
    """What a plug is made to fit, measured once and kept in the artefact.

    Attributes:
        llm: the language model.
        embedding_scale: root mean square of that model's embedded tokens.
        encoder: the encoder of items and queries.
        labels: the closed set of answers that `answers = label` refers to; empty otherwise.
    """

    llm: LLMIdentity
    embedding_scale: float
    encoder: EncoderIdentity
    labels: tuple[str, ...] = ()


def write_plug_json(folder: Path, config: PlugConfig, *, spec: PlugSpec) -> None:
    """Say how a plug is built and what it fits; what stands there says that the plug is complete.

    Raises:
        StorageError: if the disk is full or not writable.
    """
    about = {"format_version": FORMAT_VERSION, "config": asdict(config), "fitting": asdict(spec)}
    write_json(folder / ABOUT, about)


def read_plug_json(folder: Path) -> tuple[PlugConfig, PlugSpec]:
    """How a saved plug is built, and what it fits.

    Raises:
        MissingData: if the folder holds no plug, or a broken or newer one.
        ConfigError: as `read_plug_config`.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        version, config = about["format_version"], about["config"]
        spec = _read_fitting(about["fitting"]) if version == FORMAT_VERSION else None
    except OSError as error:
        raise MissingData(f"{folder} holds no plug: {ABOUT} is missing. A finished training writes one.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MissingData(f"{folder / ABOUT} is not a plug's description ({type(error).__name__}).") from error
    if spec is None:
        raise MissingData(
            f"{folder} has the format version {version}; this personaplug reads {FORMAT_VERSION}. Upgrade personaplug."
        )
    return read_plug_config(config), spec


def read_plug_config(values: dict[str, Any]) -> PlugConfig:
    """The PlugConfig of an artefact, checked like any other setting.

    Raises:
        ConfigError: for unknown keys or values out of range.
    """
    named = {f"plug.{key}": value for key, value in values.items()}
    return with_values(Config(), named).plug


def _read_fitting(values: dict[str, Any]) -> PlugSpec:
    return PlugSpec(
        llm=LLMIdentity(**values["llm"]),
        embedding_scale=float(values["embedding_scale"]),
        encoder=EncoderIdentity.from_dict(values["encoder"]),
        labels=tuple(values["labels"]),
    )
