"""An experiment: sets × conditions × seeds × variants of a config, as one YAML file says it.

title: Retrieval beside the plug
paper: Table 3
sets: [Movie_stars, LaMP_7]           folders under the data folder
split: dev
conditions: [plain, plug, wrong-user, plug+bm25:1]
base: ../configs/paper-faithful.yaml  a config to start from, beside this file
config: {training: {seeds: [0, 1, 2]}, limit: 200}
per_set: {LaMP_7: {max_new_tokens: 40}}
variants: {bge: {encoder: BAAI/bge-base-en-v1.5}}    one table each; without any, one table
slices: history-thirds                the same rows for users with short, medium and long histories
max_eval_history: [0, 1, 2, 5, 10]         the same rows with so many of the latest items only (a cold-start curve)
persona_scales: [0, 0.5, 1.5]            the same rows at these scales
runs: main-table                      the experiment whose trained parts serve here too; its own by default
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personaplug.config import MAX_PERSONA_SCALE, Config
from personaplug.config_parsing import flatten, load_config, read_yaml, with_values
from personaplug.errors import ConfigError, MissingData, nearest
from personaplug.methods import Condition, parse_conditions

_KEYS = (
    "title",
    "paper",
    "sets",
    "split",
    "conditions",
    "base",
    "config",
    "per_set",
    "variants",
    "slices",
    "max_eval_history",
    "persona_scales",
    "runs",
)
_SLICES = ("history-thirds",)


@dataclass(frozen=True)
class Probe:
    """The same trained rows, asked under another setting of the evaluation.

    Attributes:
        name: as results write it, such as "items=2"; "" for the table proper.
        changes: settings of the evaluation.
    """

    name: str = ""
    changes: Mapping[str, float] = field(default_factory=dict)


WHOLE = Probe()


@dataclass(frozen=True)
class Experiment:
    """What is to be run.

    Attributes:
        name: the file's, without its ending; results are kept under it.
        title: for people.
        paper: which of the paper's tables or figures it repeats; empty if none.
        sets: names of data folders.
        split: which split is scored.
        conditions: the rows.
        configs: the resolved config by (variant, set); the only variant of a plain experiment is "".
        slices: "history-thirds" or "".
        max_eval_history: numbers of latest items, for a cold-start curve.
        strengths: of personas, for a curve too.
        runs: the experiment in whose folder the trained parts lie; "" = its own.
    """

    name: str
    title: str
    paper: str
    sets: tuple[str, ...]
    split: str
    conditions: tuple[Condition, ...]
    configs: Mapping[tuple[str, str], Config]
    slices: str = ""
    max_eval_history: tuple[int, ...] = ()
    persona_scales: tuple[float, ...] = ()
    runs: str = ""

    @property
    def curves(self) -> list[list[Probe]]:
        """Each curve's points in order, the table proper among them under the name that it has there."""
        items = [Probe(f"items={count}", {"max_eval_history": count}) for count in self.max_eval_history]
        persona_scales = sorted({1.0, *self.persona_scales}) if self.persona_scales else []
        strong = [
            Probe(f"persona_scale={value:g}", {} if value == 1 else {"persona_scale": value})
            for value in persona_scales
        ]
        return [curve for curve in ([*items, Probe("items=all")], strong) if len(curve) > 1]

    @property
    def variants(self) -> list[str]:
        """The variants' names, in order."""
        return list(dict.fromkeys(variant for variant, _ in self.configs))


def find_experiment(name: str, folder: Path) -> Path:
    """The file of an experiment: a path, or the name of one in a folder.

    Raises:
        MissingData: if there is none, with the names that there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    known = {found.stem: found for found in folder.glob("*.yaml")}
    if path.suffix in (".yaml", ".yml"):
        raise MissingData(f"There is no file {path}.")
    if name not in known:
        there = nearest(name, known) if known else f"{folder} holds none, or is not there (see --experiments)."
        raise MissingData(f"There is no experiment {name!r}; {there} A path to a YAML file is taken as well.")
    return known[name]


def load_experiment(path: Path, *, config_file: Path | None = None, settings: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment.

    Args:
        config_file: settings on top of its base, such as the paper's own sizes; those per set and variant win.
        settings: key=value words on top of every config in it; only variants win.
    Raises:
        MissingData: if the file is not there.
        ConfigError: for an unknown key or row, or a setting that is wrong.
    """
    told = read_yaml(path)
    if not isinstance(told, dict) or not {"sets", "conditions"} <= told.keys():
        raise ConfigError(f"{path} should name 'sets' and 'conditions'; see `personaplug bench --help`.")
    for key in told:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}; {nearest(str(key), _KEYS)}")
    if told.get("slices", "") not in ("", *_SLICES):
        raise ConfigError(f"{path}: 'slices' should be one of {', '.join(_SLICES)}; found {told['slices']!r}.")
    sets = tuple(_names(told["sets"], "sets", path))
    return Experiment(
        name=path.stem,
        title=str(told.get("title", path.stem)),
        paper=str(told.get("paper", "")),
        sets=sets,
        split=str(told.get("split", "dev")),
        conditions=tuple(parse_conditions(",".join(_names(told["conditions"], "conditions", path)))),
        configs=_configs(told, sets, path, over=_Over(config_file, settings)),
        slices=str(told.get("slices", "")),
        max_eval_history=tuple(_counts(told.get("max_eval_history", ()), path)),
        persona_scales=tuple(_persona_scales(told.get("persona_scales", ()), path)),
        runs=str(told.get("runs", "")),
    )


@dataclass(frozen=True)
class _Over:
    """What the command line puts on top of an experiment's configs."""

    file: Path | None
    words: tuple[str, ...]


def _configs(
    told: Mapping[str, Any], sets: tuple[str, ...], path: Path, *, over: _Over
) -> dict[tuple[str, str], Config]:
    base = load_config(path.parent / told["base"]) if told.get("base") else Config()
    base = with_values(base, flatten(told.get("config")))
    per_set, variants = told.get("per_set") or {}, told.get("variants") or {"": {}}
    unknown = [name for name in per_set if name not in sets]
    if unknown:
        raise ConfigError(f"{path}: per_set names {', '.join(unknown)}, which is not among its sets.")
    configs = {}
    for variant, changes in variants.items():
        for name in sets:
            config = load_config(over.file, base=base)
            config = load_config(overrides=over.words, base=with_values(config, flatten(per_set.get(name))))
            # Last, or a model named on the command line would make all variants the same.
            configs[str(variant), name] = with_values(config, flatten(changes))
    return configs


def _names(value: object, key: str, path: Path) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{path}: {key!r} should be a list of names.")
    return value


def _counts(value: object, path: Path) -> list[int]:
    if not isinstance(value, list | tuple) or not all(isinstance(count, int) and count >= 0 for count in value):
        raise ConfigError(f"{path}: 'max_eval_history' should be a list of whole numbers from 0.")
    return list(value)


def _persona_scales(value: object, path: Path) -> list[float]:
    if not isinstance(value, list | tuple) or not all(_is_persona_scale(one) for one in value):
        raise ConfigError(f"{path}: 'persona_scales' should be a list of numbers from 0 to {MAX_PERSONA_SCALE}.")
    return [float(one) for one in value]


def _is_persona_scale(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= MAX_PERSONA_SCALE
