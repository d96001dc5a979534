"""Cells: one row of a table with one seed, scored sample by sample; what intervals and tests are computed from.

A file of trials is JSON lines: first the samples (`EvalSamples`), then a trial a line, appended as they come. It holds
numbers and no texts, so it can be published beside the results made from it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from personaplug.analysis.metrics import Array
from personaplug.errors import RecordError
from personaplug.infra.atomic_io import JsonLines

logger = logging.getLogger(__name__)

_DENSE = 3  # statistics with more columns are one-hots and written sparsely


@dataclass(frozen=True)
class EvalSamples:
    """The samples that cells are about.

    Attributes:
        groups: (n,) the samples' users as whole numbers, in order of appearance.
        history_items: (n,) items of the samples' own histories.
        about: what the results object says beside rows and pairs.
        key: of the data and the draw that they come from, in the words of whoever keeps them.
    """

    groups: list[int]
    history_items: list[int]
    about: dict[str, Any]
    key: str = ""


@dataclass(frozen=True, eq=False)
class Trial:
    """One row with one seed.

    Attributes:
        condition, seed: which.
        key: of everything that it comes from, in the words of whoever keeps it.
        statistics: per metric, (n, d); a metric is a function of their means.
        invalid_rate: answers that are none of the task's.
        truncated_rate: prompts whose end was cut.
        unfinished_rate: answers that were cut.
        lost_history_rate: samples with a history of which the row should have shown something and showed nothing.
        cut_items_rate: share of the items meant for the prompt that were shortened or left out.
        prompt_tokens_mean: soft tokens counted.
        extra_prompt_tokens: of them, those that the bare question does not have.
        seconds: answering.
        peak_memory_bytes: while answering.
        decoding: "scored" over the labels, "generated"; without the language model "computed", or "known" of old.
        bytes_per_user: what a service keeps for a user, a mean; None where that is not known.
        seconds_per_user: what adding a user takes, a mean.
        fit_seconds: what fitting took, where something is fitted as the table is filled.
        made_with: versions and machine, in words.
    """

    condition: str
    seed: int
    statistics: dict[str, Array]
    invalid_rate: float
    truncated_rate: float | None = None
    unfinished_rate: float | None = None
    lost_history_rate: float | None = None
    cut_items_rate: float | None = None
    prompt_tokens_mean: float | None = None
    extra_prompt_tokens: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    decoding: str = ""
    bytes_per_user: float | None = None
    seconds_per_user: float | None = None
    fit_seconds: float | None = None
    key: str = field(default="", compare=False)
    made_with: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"statistics": {name: _packed(stats) for name, stats in self.statistics.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """The reverse of `to_dict`."""
        statistics = {name: _unpacked(packed) for name, packed in values["statistics"].items()}
        return cls(**{**values, "statistics": statistics})


class TrialFile:
    """Cells on disk; a kill loses at most the one that was being written.

    Args:
        path: made with the first cell.
    """

    def __init__(self, path: Path) -> None:
        self.lines = JsonLines(path)

    def read(self) -> tuple[EvalSamples | None, list[Trial]]:
        """What was scored, and the cells, the latest of each condition and seed; (None, []) without a file.

        Raises:
            RecordError: if the first line is not what cells are about.
        """
        if not self.lines.path.exists():
            return None, []
        first, *rest = list(self.lines) or [None]
        try:
            scored = EvalSamples(**first)
        except TypeError:
            raise RecordError(self.lines.path, "line 1", reason="it should say what the cells are about") from None
        cells = [Trial.from_dict(values) for values in rest]
        return scored, list({(cell.condition, cell.seed): cell for cell in cells}.values())

    def turn_to(self, key: str) -> None:
        """Put a file that is about other samples than those of the key aside, and take one about those back.

        Raises:
            RecordError: if the first line is not what cells are about.
        """
        scored, _ = self.read()
        path = self.lines.path
        if scored is not None and scored.key != key:
            logger.warning("%s: cells of other samples are put aside as %s", path, self._aside(scored.key).name)
            path.rename(self._aside(scored.key))
        if not path.exists() and self._aside(key).exists():
            self._aside(key).rename(path)

    def start(self, scored: EvalSamples) -> None:
        """Write the first line of a new file.

        Raises:
            StorageError: if the disk is full or not writable.
        """
        self.lines.append(asdict(scored))

    def _aside(self, key: str) -> Path:
        return self.lines.path.with_suffix(f".{key[:8] or 'before'}.jsonl")

    def append(self, cell: Trial) -> None:
        """Add a cell.

        Raises:
            StorageError: if the disk is full or not writable.
        """
        self.lines.append(cell.to_dict())


def numbered(owners: Sequence[str]) -> list[int]:
    """Users as whole numbers in order of appearance: who shares a user stays visible, who it is does not."""
    places: dict[str, int] = {}
    return [places.setdefault(owner, len(places)) for owner in owners]


def _packed(stats: Array) -> Any:
    if stats.shape[1] <= _DENSE:
        return [[_short(value) for value in row] for row in stats.tolist()]
    return {"shape": list(stats.shape), "ones": np.argwhere(stats != 0).tolist()}


def _unpacked(packed: Any) -> Array:
    if isinstance(packed, list):
        return np.array([[float(value) for value in row] for row in packed], dtype=np.float64)
    stats = np.zeros(packed["shape"])
    stats[tuple(np.array(packed["ones"], dtype=np.int64).reshape(-1, 2).T)] = 1.0
    return stats


def _short(value: float) -> float | int | str:
    """As few characters as keep the value to nine digits; JSON has no infinity or NaN, so those are words."""
    if not np.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.9g}")
