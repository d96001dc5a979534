"""Trials: one method with one seed, scored sample by sample. Intervals and tests are computed from them.

A trial file is JSON lines: first the samples (`EvalSamples`), then a trial a line. It holds numbers and no texts, so it
can be published beside its results.
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

_MAX_DENSE_COLUMNS = 3  # statistics with more columns are one-hots and written sparsely


@dataclass(frozen=True)
class Provenance:
    """What was evaluated, on which data and with which models: the head of a results file.

    `set` is the data folder's name, `users` how many the samples belong to. `seeds` and `made_with` are of the trials,
    filled when they become results.
    """

    experiment: str = ""
    title: str = ""
    set: str = ""
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
    users: int | None = None
    data: dict[str, object] = field(default_factory=dict)
    dtype: str = ""
    made_with: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the facts that are known."""
        values = asdict(self)
        return without_empty(values, list(values))

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Provenance:
        """Reverse `to_json`."""
        return cls(**known_fields(cls, record))


@dataclass(frozen=True)
class EvalSamples:
    """The samples that a file's trials score: (n,) their users by number, and the sizes of their own histories.

    `key` is a hash of the data and of what was drawn from it.
    """

    groups: list[int]
    history_items: list[int]
    about: Provenance
    key: str = ""


@dataclass(frozen=True)
class Diagnostics:
    """What is measured beside the scores; None if unknown.

    Attributes:
        truncated_rate: prompts whose end was cut.
        unfinished_rate: predictions that were cut.
        lost_history_rate: samples with a history of which the row should show something and shows nothing.
        cut_items_rate: share of the items meant for the prompt that were shortened or left out.
        prompt_tokens_mean: with soft tokens.
        seconds, peak_memory_bytes: of predicting.
        fit_seconds: of what is fitted while the table is filled.
        extra_prompt_tokens: prompt tokens beyond those of the bare question.
        bytes_per_user, seconds_per_user: mean cost of keeping and of adding a user.
    """

    truncated_rate: float | None = None
    unfinished_rate: float | None = None
    lost_history_rate: float | None = None
    cut_items_rate: float | None = None
    prompt_tokens_mean: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    fit_seconds: float | None = None
    extra_prompt_tokens: float | None = None
    bytes_per_user: float | None = None
    seconds_per_user: float | None = None

    @classmethod
    def mean_of(cls, several: Sequence[Diagnostics]) -> Diagnostics:
        """Average each value over those that know it; of peak memory the maximum."""
        means: dict[str, Any] = {}
        for column in fields(cls):
            values = [value for each in several if (value := getattr(each, column.name)) is not None]
            if values:
                means[column.name] = max(values) if column.name == "peak_memory_bytes" else float(np.mean(values))
        return cls(**means)


@dataclass(frozen=True, eq=False)
class Trial:
    """One method with one seed.

    Attributes:
        statistics: per metric, (n, d); a metric is a function of their means.
        invalid_rate: share of the predictions that are none of the task's answers.
        decoding: "scored" over the labels, "generated", or "computed" without a language model.
        key: hash of everything that affects the scores.
        made_with: versions and machine, in words.
    """

    method: MethodInfo
    seed: int
    statistics: dict[str, Array]
    invalid_rate: float
    decoding: str = ""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    key: str = ""
    made_with: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the trial as a line of its file."""
        return asdict(self) | {"statistics": {name: _packed(stats) for name, stats in self.statistics.items()}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Trial:
        """Reverse `to_json`; raise KeyError or TypeError if the record is no trial."""
        parsed = {
            "method": MethodInfo.from_json(record["method"]),
            "statistics": {name: _unpacked(packed) for name, packed in record["statistics"].items()},
            "diagnostics": Diagnostics(**record["diagnostics"]),
        }
        return cls(**{**record, **parsed})


class TrialFile:
    """Trials on disk; a kill loses at most the trial that is being written."""

    def __init__(self, path: Path) -> None:
        self.lines = JsonLines(path)

    def load(self) -> tuple[EvalSamples | None, list[Trial]]:
        """Return the samples and the latest trial of each method and seed; (None, []) without a file.

        Raises:
            RecordError: if a line is no trial, or the first line no samples.
        """
        samples, trials = None, {}
        for number, record in enumerate(self.lines, start=1):
            try:
                if samples is None:
                    samples = EvalSamples(**record | {"about": Provenance.from_json(record["about"])})
                else:
                    trial = Trial.from_json(record)
                    trials[trial.method.name, trial.seed] = trial
            except (KeyError, TypeError):
                kind = "a trial" if samples else "the samples that the trials score"
                raise RecordError(self.lines.path, f"line {number}", reason=f"expected {kind}") from None
        return samples, list(trials.values())

    def switch_to(self, key: str) -> None:
        """Rename a file of other samples, and bring back an earlier file of the samples of the key."""
        samples, _ = self.load()
        path = self.lines.path
        if samples is not None and samples.key != key:
            aside = path.with_suffix(f".{samples.key[:8]}.jsonl")
            logger.warning("%s: trials of other samples are set aside as %s", path, aside.name)
            path.rename(aside)
        earlier = path.with_suffix(f".{key[:8]}.jsonl")
        if not path.exists() and earlier.exists():
            earlier.rename(path)

    def start(self, samples: EvalSamples) -> None:
        """Write the first line of a new file."""
        self.lines.append(vars(samples) | {"about": samples.about.to_json()})

    def append(self, trial: Trial) -> None:
        """Add a trial."""
        self.lines.append(trial.to_json())


def number_users(owners: Sequence[str]) -> list[int]:
    """Replace users by whole numbers in order of appearance: shows who shares a user, not who it is."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(owner, len(numbers)) for owner in owners]


def without_empty(values: Mapping[str, Any], optional: Sequence[str]) -> dict[str, Any]:
    """Leave out the optional fields that say nothing."""
    return {name: value for name, value in values.items() if name not in optional or value not in (None, "", [], {})}


def known_fields(cls: type[DataclassInstance], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a JSON object that are fields of a dataclass and not null."""
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
    """Keep nine digits; write infinity and NaN, which JSON lacks, as words."""
    if not np.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.9g}")
