"""Pooled personal gains: the mean of the gains of several sets with free text, with one interval and one p.

The gain in a text's score is small on one set, so its test has little power. Each set counts alike. The bootstrap draws
users, and trainings, within each set. It needs the trials beside each results file (`SET.trials.jsonl`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from personaplug.analysis.metrics import Array, Metric, metric_class
from personaplug.analysis.results import matched_by_seed
from personaplug.analysis.results_file import Comparison, Results
from personaplug.analysis.significance import PairedStatistics, holm, pooled_bootstrap
from personaplug.analysis.trials_of_results import ResultTrials, UnmatchedTrials, load_result_trials, metric_of_means


@dataclass(frozen=True)
class PooledGains:
    """Pooled gains.

    Attributes:
        sets: names of the pooled sets.
        gains: for each metric, the gain of each row by its name.
        problem: why nothing is pooled; "" if gains are pooled.
    """

    sets: list[str] = field(default_factory=list)
    gains: dict[str, dict[str, Comparison]] = field(default_factory=dict)
    problem: str = ""


class _NotPooled(Exception):
    """The message says why."""


def pooled_gains(
    results_files: Sequence[Path], results_list: Sequence[Results], *, resamples: int = 10_000
) -> PooledGains | None:
    """Pool the personal gains of all sets with free text; None with fewer than two such sets.

    Gains are pooled for the rows and metrics that all these sets have.
    """
    pairs = [pair for pair in zip(results_files, results_list, strict=True) if _has_texts(pair[1])]
    if len(pairs) < 2:
        return None
    names = [results.about.set or results.about.task for _, results in pairs]
    try:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise _NotPooled(f"{twice[0]} is among the results more than once. Report each set once.")
        sets = [load_result_trials(path, results) for path, results in pairs]
        gains = {name: _gains_in(name, sets, resamples=resamples) for name in _shared_metrics(sets)}
    except (_NotPooled, UnmatchedTrials) as reason:
        return PooledGains(names, problem=str(reason))
    return PooledGains(names, {name: pooled for name, pooled in gains.items() if pooled})


def _has_texts(results: Results) -> bool:
    kind = metric_class(results.leading_metric)
    return kind is not None and not (kind.needs_labels or kind.needs_scale)


def _metric(name: str) -> Metric | None:
    kind = metric_class(name)
    return None if kind is None or kind.needs_labels or kind.needs_scale else metric_of_means(name)


def _shared_metrics(sets: Sequence[ResultTrials]) -> list[str]:
    first, *others = [each.results.metric_names for each in sets]
    return [name for name in first if _metric(name) is not None and all(name in names for names in others)]


def _gains_in(name: str, sets: Sequence[ResultTrials], *, resamples: int) -> dict[str, Comparison]:
    """Return the pooled gain in one metric of each row that has it in all sets."""
    metric = _metric(name)
    assert metric is not None
    of_sets = [each.results.personal_gains(name) for each in sets]
    gains: dict[str, Comparison] = {}
    for row, pair in of_sets[0].items():
        if not all(row in of_set for of_set in of_sets):
            continue
        parts = [_paired(each, row, pair.b, metric=name) for each in sets]
        if all(part is not None for part in parts):
            paired = pooled_bootstrap([part for part in parts if part], metric, resamples=resamples)
            gains[row] = Comparison(row, pair.b, name, **paired._asdict())
    families = [sets[0].results.by_name[row].method.has_language_model for row in gains]
    for family in (True, False):
        rows = [row for row, has_language_model in zip(gains, families, strict=True) if has_language_model is family]
        corrected = holm([math.nan if (p := gains[row].p) is None else p for row in rows])
        gains |= {row: replace(gains[row], p_holm=p) for row, p in zip(rows, corrected, strict=True)}
    return gains


def _paired(one_set: ResultTrials, a: str, b: str, *, metric: str) -> PairedStatistics | None:
    """Return the statistics of a row and its control; None if a trial lacks the metric."""
    pairs = matched_by_seed(one_set.trials[a], one_set.trials[b])
    sides: list[Array] = []
    for side in (0, 1):
        of_side = [pair[side].statistics.get(metric) for pair in pairs]
        known = [statistics for statistics in of_side if statistics is not None]
        if not known or len(known) < len(pairs):
            return None
        sides.append(np.stack(known))
    return PairedStatistics(sides[0], sides[1], one_set.samples.groups)
