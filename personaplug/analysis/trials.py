"""Trials: the per-sample scores of one method with one seed. Intervals and tests are computed from them.

A trial file is JSON lines: first the samples (`EvalSamples`), then one trial per line. It contains numbers but no
texts, so it can be published with the results.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metrics import Array
from personaplug.errors import RecordError
from personaplug.infra.atomic_io import JsonLines

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

_MAX_DENSE_COLUMNS = 3  # statistics with more columns are one-hots, and are written sparsely


@dataclass(frozen=True)
class Provenance:
    """The data, the models and the settings of an evaluation: the head of a results file."""

    experiment: str = ""
    title: str = ""
    set: str = ""  # the data folder's name
    variant: str = ""
    task: str = ""
    split: str = ""
    model: str = ""
    encoder: str = ""
    placement: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    training: list[dict[str, object]] = field(default_factory=list)
    users: int | None = None  # number of users of the samples
    data: dict[str, object] = field(default_factory=dict)
    dtype: str = ""
    made_with: list[str] = field(default_factory=list)  # set-ups of the trials; `build_results` fills it
    seeds: list[int] = field(default_factory=list)  # of the trials; `build_results` fills it
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the fields that are not empty."""
        values = asdict(self)
        return without_empty(values, list(values))

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Provenance:
        """Reverse `to_json`."""
        return cls(**known_fields(cls, record))


@dataclass(frozen=True)
class EvalSamples:
    """The samples that a file's trials score."""

    groups: list[int]  # (n,) number of each sample's user
    history_items: list[int]  # (n,) number of items in each user's own history
    about: Provenance
    key: str = ""  # hash of the data and of the drawn samples


@dataclass(frozen=True)
class Diagnostics:
    """Measurements beside the scores; None if unknown."""

    truncated_rate: float | None = None  # share of the prompts whose end was cut
    unfinished_rate: float | None = None  # share of the predictions that were cut
    lost_history_rate: float | None = None  # share of the samples with a history that is missing from the prompt
    cut_items_rate: float | None = None  # share of the prompt's items that were shortened or left out
    prompt_tokens_mean: float | None = None  # soft tokens included
    seconds: float | None = None  # of prediction
    peak_memory_bytes: int | None = None  # of prediction
    fit_seconds: float | None = None  # of models that are fitted during the evaluation
    extra_prompt_tokens: float | None = None  # beyond the tokens of the bare question
    bytes_per_user: float | None = None  # mean storage of a user
    seconds_per_user: float | None = None  # mean time to add a user

    @classmethod
    def mean_of(cls, several: Sequence[Diagnostics]) -> Diagnostics:
        """Return the mean of each known value, but the maximum of the peak memory."""
        means: dict[str, Any] = {}
        for column in fields(cls):
            values = [value for each in several if (value := getattr(each, column.name)) is not None]
            if values:
                means[column.name] = max(values) if column.name == "peak_memory_bytes" else float(np.mean(values))
        return cls(**means)


@dataclass(frozen=True, eq=False)
class Trial:
    """One method with one seed."""

    method: MethodInfo
    seed: int
    statistics: dict[str, Array]  # by metric, (n, d); a metric is a function of their means
    invalid_rate: float  # share of the predictions that are not valid answers of the task
    decoding: str = ""  # "scored" over the labels, "generated", or "computed" without a language model
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    key: str = ""  # hash of everything that affects the scores
    made_with: str = ""  # versions and machine, as text

    def to_json(self) -> dict[str, object]:
        """Return the trial's line in a trial file."""
        return asdict(self) | {"statistics": {name: _packed(stats) for name, stats in self.statistics.items()}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Trial:
        """Reverse `to_json`; raise KeyError or TypeError if the record is not a trial."""
        parsed = {
            "method": MethodInfo.from_json(record["method"]),
            "statistics": {name: _unpacked(packed) for name, packed in record["statistics"].items()},
            "diagnostics": Diagnostics(**record["diagnostics"]),
        }
        return cls(**{**record, **parsed})


class TrialFile:
    """Trials on disk. A killed process loses at most the trial that it is writing."""

    def __init__(self, path: Path) -> None:
        self.lines = JsonLines(path, is_strict=False)  # published files have no checksums

    def load(self) -> tuple[EvalSamples | None, list[Trial]]:
        """Return the samples and the latest trial of each method and seed; (None, []) without a file."""
        samples, trials = None, {}
        for number, record in enumerate(self.lines, start=1):
            try:
                if samples is None:
                    samples = EvalSamples(**record | {"about": Provenance.from_json(record["about"])})
                else:
                    trial = Trial.from_json(record)
                    trials[trial.method.name, trial.seed] = trial
            except (KeyError, TypeError):
                kind = "a trial" if samples else "the samples of the trials"
                raise RecordError(self.lines.path, f"line {number}", reason=f"expected {kind}") from None
        return samples, list(trials.values())

    def switch_to(self, key: str) -> None:
        """Rename the file if it has other samples than `key`, and restore an earlier file with the samples of `key`."""
        path, (samples, _) = self.lines.path, self.load()
        if samples is not None and samples.key != key:
            renamed = path.with_suffix(f".{samples.key[:8]}.jsonl")
            logger.warning("%s has trials of other samples; renamed to %s", path, renamed.name)
            path.rename(renamed)
        earlier = path.with_suffix(f".{key[:8]}.jsonl")
        if not path.exists() and earlier.exists():
            earlier.rename(path)

    def start(self, samples: EvalSamples) -> None:
        """Write the first line of a new file, the samples."""
        self.lines.append(vars(samples) | {"about": samples.about.to_json()})

    def append(self, trial: Trial) -> None:
        self.lines.append(trial.to_json())


def number_users(owners: Sequence[str]) -> list[int]:
    """Replace users by numbers in order of appearance. Samples keep a common user, but not the user's id."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(owner, len(numbers)) for owner in owners]


def without_empty(values: Mapping[str, Any], optional: Sequence[str]) -> dict[str, Any]:
    """Leave out the optional fields that are empty."""
    return {name: value for name, value in values.items() if name not in optional or value not in (None, "", [], {})}


def known_fields(cls: type[DataclassInstance], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a JSON object that are fields of `cls` and not null."""
    return {column.name: value for column in fields(cls) if (value := record.get(column.name)) is not None}


def _packed(stats: Array) -> object:
    if stats.shape[1] <= _MAX_DENSE_COLUMNS:
        return [[_shortened(value) for value in row] for row in stats.tolist()]
    return {"shape": list(stats.shape), "ones": np.argwhere(stats != 0).tolist()}


def _unpacked(packed: Any) -> Array:
    if isinstance(packed, list):
        return np.array([[float(value) for value in row] for row in packed], dtype=np.float64)
    stats = np.zeros(packed["shape"])
    stats[tuple(np.array(packed["ones"], dtype=np.int64).reshape(-1, 2).T)] = 1.0
    return stats


def _shortened(value: float) -> float | int | str:
    """Return a number with nine digits; infinity and NaN, which JSON lacks, as words."""
    if not np.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.9g}")
