"""An experiment: sets × rows × seeds × variants of a config, as a YAML file.

title: Retrieval and the plug
sets: [Movie_stars, LaMP_7]           folders under the data folder
split: dev
methods: [plain, plug, wrong-user, plug+bm25:1]
base: ../configs/small.yaml           initial config; the path is relative to this file
config: {training: {seeds: [0, 1, 2]}, limit: 200}
per_set: {LaMP_7: {max_new_tokens: 40}}
variants: {bge: {encoder: BAAI/bge-base-en-v1.5}}    one table per variant; without variants, a single table
subgroups: history-thirds             also score users with short, medium and long histories separately
max_eval_history: [0, 1, 2, 5, 10]    also score with only this many latest items (a cold-start curve)
item_kinds: [answers, preferences]    also score with only these items of each history
persona_scales: [0, 0.5, 1.5]         also score at these scales
runs: main-table                      experiment whose trained parts to use; default: this experiment
trained_on: {Closed: Manners}         evaluate set Closed with the parts trained on Manners (kind chat, or equal tasks)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personaplug.config import MAX_PERSONA_SCALE, Config
from personaplug.config_parsing import flatten, load_config, read_yaml, with_values
from personaplug.errors import ConfigError, MissingData, nearest
from personaplug.methods import Method, parse_methods


@dataclass(frozen=True)
class SweepPoint:
    """A point of a curve: the same trained rows with changed evaluation settings.

    Attributes:
        name: name in results files, such as "items=2"; "" for the table itself.
        changes: the changed evaluation settings.
    """

    name: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name of the point as a part of file names."""
        return self.name.replace("=", "-")


WHOLE = SweepPoint()


class _ExperimentFile(BaseModel):
    """The keys of the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = ""
    sets: list[str] = Field(min_length=1)
    split: str = "dev"
    methods: list[str] = Field(min_length=1)
    base: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    per_set: dict[str, dict[str, Any]] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    subgroups: Literal["", "history-thirds"] = ""
    max_eval_history: list[Annotated[int, Field(ge=0, strict=True)]] = Field(default_factory=list)
    item_kinds: list[Literal["answers", "preferences"]] = Field(default_factory=list)
    persona_scales: list[Annotated[float, Field(ge=0, le=MAX_PERSONA_SCALE)]] = Field(default_factory=list)
    runs: str = ""
    trained_on: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment.

    Attributes:
        name: name of the YAML file without suffix, and of the results folder.
        title: title for reports.
        sets: names of data folders.
        split: the split to score.
        methods: the rows.
        configs: the config by (variant, set); the variant is "" if the experiment has no variants.
        subgroups: "history-thirds" or "".
        max_eval_history: maximum latest items at each point of a cold-start curve.
        item_kinds: kinds of items at each point of a curve, in addition to all kinds.
        persona_scales: persona scales at each point of a curve.
        runs: the experiment whose trained parts to use; "" = this experiment.
        trained_on: for a set, another set whose trained parts to use.
    """

    name: str
    title: str
    sets: tuple[str, ...]
    split: str
    methods: tuple[Method, ...]
    configs: Mapping[tuple[str, str], Config]
    subgroups: str = ""
    max_eval_history: tuple[int, ...] = ()
    item_kinds: tuple[str, ...] = ()
    persona_scales: tuple[float, ...] = ()
    runs: str = ""
    trained_on: Mapping[str, str] = field(default_factory=dict)

    @property
    def curves(self) -> list[list[SweepPoint]]:
        """The points of each curve in order. The table itself is also a point of each curve, with the curve's name."""
        items = [SweepPoint(f"items={count}", {"max_eval_history": count}) for count in self.max_eval_history]
        kinds = [SweepPoint(f"item_kinds={kind}", {"item_kinds": kind}) for kind in self.item_kinds]
        scales = sorted({1.0, *self.persona_scales}) if self.persona_scales else []
        scaled = [
            SweepPoint(f"persona_scale={scale:g}", {} if scale == 1 else {"persona_scale": scale}) for scale in scales
        ]
        curves = ([*items, SweepPoint("items=all")], [*kinds, SweepPoint("item_kinds=all")], scaled)
        return [curve for curve in curves if len(curve) > 1]

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in order."""
        return list(dict.fromkeys(variant for variant, _ in self.configs))


EXPERIMENTS = Path(__file__).with_name("experiments")
"""The folder of the package's experiments; their base configs are in `configs` next to it."""


def find_experiment(name: str, folder: Path | None = None) -> Path:
    """Return the file of an experiment.

    Args:
        name: a path of a YAML file, or the name of an experiment in `folder`.
        folder: None = EXPERIMENTS.

    Raises:
        MissingData: if the experiment does not exist; the message suggests existing names.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MissingData(f"The file {path} does not exist.")
        return path
    folder = EXPERIMENTS if folder is None else folder
    files = {file.stem: file for file in folder.glob("*.yaml")}
    if name not in files:
        hint = nearest(name, files) if files else f"{folder} contains none or does not exist (see --experiments)."
        raise MissingData(f"There is no experiment {name!r}; {hint} You can also give the path of a YAML file.")
    return files[name]


def load_experiment(path: Path, *, config_file: Path | None = None, settings: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment.

    Args:
        config_file: settings that override the experiment's base, such as larger models. Settings for a set or a
            variant override them.
        settings: key=value words that override all configs of the experiment. Only variants override them.
    Raises:
        MissingData: if the file does not exist.
        ConfigError: for an unknown key or row, or an invalid setting.
    """
    file = _validated(read_yaml(path), path)
    return Experiment(
        name=path.stem,
        title=file.title or path.stem,
        sets=tuple(file.sets),
        split=file.split,
        methods=tuple(parse_methods(",".join(file.methods))),
        configs=_configs(file, path, config_file=config_file, settings=settings),
        subgroups=file.subgroups,
        max_eval_history=tuple(file.max_eval_history),
        item_kinds=tuple(file.item_kinds),
        persona_scales=tuple(file.persona_scales),
        runs=file.runs,
        trained_on=file.trained_on,
    )


def _validated(values: Any, path: Path) -> _ExperimentFile:
    valid_keys = tuple(_ExperimentFile.model_fields)
    for key in values if isinstance(values, dict) else ():
        if key not in valid_keys:
            raise ConfigError(f"{path}: unknown key {key!r}; {nearest(str(key), valid_keys)}")
    if not isinstance(values, dict) or not {"sets", "methods"} <= values.keys():
        raise ConfigError(f"{path} must contain the keys 'sets' and 'methods'; see `personaplug bench --help`.")
    try:
        return _ExperimentFile.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {key}: {first['msg']}; found {first['input']!r}.") from None


def _configs(
    file: _ExperimentFile, path: Path, *, config_file: Path | None, settings: tuple[str, ...]
) -> dict[tuple[str, str], Config]:
    base = load_config(path.parent / file.base) if file.base else Config()
    base = with_values(base, flatten(file.config))
    sets = [*file.sets, *file.trained_on.values()]
    for kind, names in (("set", sets), ("variant", [*file.variants]), ("experiment of runs", [file.runs])):
        for name in names:
            if name in (".", "..") or "/" in name or "\\" in name or (kind == "set" and not name):
                raise ConfigError(
                    f"{path}: the {kind} {name!r} is used as a folder name, so it must not contain a slash. Rename it."
                )
    scales = [f"{scale:g}" for scale in file.persona_scales]  # the format in the names of results
    curves = (("max_eval_history", file.max_eval_history), ("item_kinds", file.item_kinds), ("persona_scales", scales))
    for key, values in (("sets", file.sets), *curves):
        if len(set(values)) < len(values):
            raise ConfigError(f"{path}: {key} contains a value twice: {', '.join(map(str, values))}. Give it once.")
    for key, by_set in (("per_set", file.per_set), ("trained_on", file.trained_on)):
        unknown = [name for name in by_set if name not in file.sets]
        if unknown:
            raise ConfigError(f"{path}: {key} contains {', '.join(unknown)}, which is not in `sets`.")
    configs = {}
    for variant, changes in (file.variants or {"": {}}).items():
        for name in file.sets:
            config = load_config(config_file, base=base)
            config = load_config(overrides=settings, base=with_values(config, flatten(file.per_set.get(name))))
            # Apply variants last; otherwise a model on the command line would make all variants equal.
            configs[variant, name] = with_values(config, flatten(changes))
    return configs
