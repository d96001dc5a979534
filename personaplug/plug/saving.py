"""The files of a saved plug: plug.json (config, spec, training facts), safetensors weights and a model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from personaplug.config import Config, PlugConfig
from personaplug.config_parsing import with_values
from personaplug.encoders import EncoderIdentity
from personaplug.errors import DamagedFile, MissingData
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import check_json
from personaplug.infra.model_hub import LLMIdentity
from personaplug.infra.tensor_files import Shapes, check_header, stored_checksum

FORMAT_VERSION = 1
ABOUT, WEIGHTS, CARD = "plug.json", "plug.safetensors", "README.md"
EXAMPLE = 'plug = PersonaPlug.from_pretrained("this folder or repository", encoder=encoder, llm=llm.identity)'
REMEDY = "Restore the folder, or train the plug again."


@dataclass(frozen=True)
class PlugSpec:
    """The models and labels that a plug was trained for."""

    llm: LLMIdentity
    embedding_scale: float  # root mean square of that model's token embeddings
    encoder: EncoderIdentity  # of items and queries
    labels: tuple[str, ...] = ()  # labels of items' answers: of the task, or of all tasks that share the plug
    options: int | None = None  # number of labels of the task, if it differs from len(labels)

    @property
    def option_count(self) -> int:
        """Number of options in a prompt, one for each label of the task."""
        return len(self.labels) if self.options is None else self.options


def write_description(folder: Path, config: PlugConfig, *, spec: PlugSpec, training: Mapping[str, Any]) -> None:
    """Write plug.json with the checksum of the weights. The presence of this file means that the plug is complete."""
    sections = {"config": asdict(config), "spec": asdict(spec), "training": training}
    weights = stored_checksum(folder / WEIGHTS, remedy=REMEDY)
    write_checked_json(folder / ABOUT, {"format_version": FORMAT_VERSION, **sections, "weights": weights})


def read_description(folder: Path) -> tuple[PlugConfig, PlugSpec, dict[str, Any]]:
    """Read config, spec and training facts from plug.json.

    Raises:
        MissingData: if the file is missing or has an unsupported format.
        DamagedFile: if the file was changed, or describes other weights.
        ConfigError: if a setting is unknown or out of range.
    """
    path = folder / ABOUT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise MissingData(
                f"{path} has format version {values['format_version']}; this personaplug reads {FORMAT_VERSION}. "
                f"Upgrade personaplug."
            )
        saved, training = values["spec"], dict(values["training"])
        llm, encoder = LLMIdentity(**saved["llm"]), EncoderIdentity.from_dict(saved["encoder"])
        options = saved.get("options")  # missing in plugs of one task
        spec = PlugSpec(llm, float(saved["embedding_scale"]), encoder, tuple(saved["labels"]), options)
        if not (isinstance(llm.width, int) and llm.width > 0 and math.isfinite(spec.embedding_scale)):
            raise ValueError("a width or scale is out of range")
        if not isinstance(options, int | None):
            raise ValueError("`options` is not a number")
        # A missing setting is an error, because the plug may have been trained with another value than the default.
        settings = {setting.name: values["config"][setting.name] for setting in fields(PlugConfig)} | values["config"]
    except OSError as error:
        raise MissingData(f"{folder} has no plug: {ABOUT} is missing. Finish a training run first.") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise MissingData(f"{path} does not describe a plug ({type(error).__name__}). Train it again.") from error
    config = with_values(Config(), {f"plug.{name}": value for name, value in settings.items()}).plug
    check_json(values, path, remedy=REMEDY)
    if stored_checksum(folder / WEIGHTS, remedy=REMEDY) != values.get("weights"):
        raise DamagedFile(folder / WEIGHTS, reason=f"{ABOUT} has the checksum of other weights", remedy=REMEDY)
    return config, spec, training


def check_sizes(folder: Path, config: PlugConfig, spec: PlugSpec) -> None:
    """Raise DamagedFile if the header of the weights has other sizes than the description, before memory is used."""
    check_header(folder / WEIGHTS, _described_shapes(config, spec), remedy=REMEDY)


def _described_shapes(config: PlugConfig, spec: PlugSpec) -> Shapes:
    """Return the shapes of the tensors that depend on numbers in the description."""
    width, tokens, labels = spec.llm.width, config.persona_tokens, len(spec.labels)
    shapes: dict[str, tuple[int, ...]] = {"instruction": (config.instruction_tokens, width)}
    if tokens:
        shapes["persona.population"] = (tokens, width)
        parts = [(f"parts.{index}.", size) for index, (_, size) in enumerate(spec.encoder.parts)]
        for part, size in parts or [("", spec.encoder.width)]:
            name = f"persona.projector.{part}"
            shapes |= {f"{name}inner.weight": (width, size), f"{name}outer.weight": (tokens * width, width)}
            if labels and config.projects_labels:
                shapes[f"{name}label.weight"] = (labels + 1, width)
    if tokens and config.options == "compare":
        shapes["persona.hint.option_vectors"] = (spec.option_count, width)
    return shapes


def find_plug(name: str | Path, *, files: Sequence[str] = (ABOUT, WEIGHTS), **hub_options: Any) -> Path:
    """Return the local folder of a plug: `name` if it is a folder, else a snapshot of these files on the hub."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files), **hub_options))
    except Exception as error:  # the hub's client also raises the errors of its HTTP library
        raise MissingData(
            f"The plug {str(name)!r} was not found: it is not a local folder, and its download from the hub failed "
            f"({type(error).__name__}). Give the folder of a finished training or the name of a hub repository."
        ) from error


def model_card(
    config: PlugConfig, *, spec: PlugSpec, training: Mapping[str, Any], parameters: int, example: str = EXAMPLE
) -> ModelCard:
    """Return the card of a plug; `example` is the code that loads it."""
    name = spec.llm.name
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    card: ModelCard = ModelCard.from_template(
        ModelCardData(
            base_model=name if is_hub_name else None,  # the hub makes a link of it
            library_name="personaplug",
            tags=["personalization", "soft-prompt"],
        ),
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=name,
        config=config,
        settings=asdict(config),
        spec=spec,
        training=training,
        parameters=parameters,
        example=example,
    )
    return card
