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

from personaplug.analysis.metrics import Array, Metric, get_metric, metric_class
from personaplug.analysis.results import matched_by_seed
from personaplug.analysis.results_file import Comparison, Results
from personaplug.analysis.significance import Groups, PairedStatistics, holm, pooled_bootstrap
from personaplug.analysis.trials import Trial, TrialFile

_TOLERANCE = 1e-6  # relative; trial files have nine digits


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


@dataclass(frozen=True, eq=False)
class _Set:
    """One results file with its trials."""

    results: Results
    groups: Groups
    trials: dict[str, list[Trial]]


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
        sets = [_load(path, results) for path, results in pairs]
        gains = {name: _gains_in(name, sets, resamples=resamples) for name in _shared_metrics(sets)}
    except _NotPooled as reason:
        return PooledGains(names, problem=str(reason))
    return PooledGains(names, {name: pooled for name, pooled in gains.items() if pooled})


def _has_texts(results: Results) -> bool:
    kind = metric_class(results.leading_metric)
    return kind is not None and not (kind.needs_labels or kind.needs_scale)


def _load(path: Path, results: Results) -> _Set:
    file = path.with_name(f"{path.stem}.trials.jsonl")
    samples, trials = TrialFile(file).load() if file.exists() else (None, [])
    if samples is None:
        raise _NotPooled(f"{file} with the scores of the samples is missing. `personaplug bench` writes it.")
    by_name: dict[str, list[Trial]] = {}
    for row in results.rows:
        by_name[row.name] = [t for seed in row.seeds for t in trials if (t.method.name, t.seed) == (row.name, seed)]
    loaded = _Set(results, samples.groups, by_name)
    _check(loaded, file)
    return loaded


def _check(one_set: _Set, file: Path) -> None:
    """Raise `_NotPooled` unless the trials give the scores of the results."""
    for row in one_set.results.rows:
        for name, value in row.metrics.items():
            trials = [trial.statistics.get(name) for trial in one_set.trials[row.name]]
            known = [statistics for statistics in trials if statistics is not None]
            metric = _metric(name)
            if metric is None or not known or not math.isfinite(value):
                continue
            found = float(metric.value(np.stack(known).mean(axis=(0, 1))))
            if len(known) < len(row.seeds) or not math.isclose(found, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                raise _NotPooled(f"{file} does not belong to its results. Run `personaplug bench` again.")


def _metric(name: str) -> Metric | None:
    kind = metric_class(name)
    return None if kind is None or kind.needs_labels or kind.needs_scale else get_metric(name)


def _shared_metrics(sets: Sequence[_Set]) -> list[str]:
    first, *others = [each.results.metric_names for each in sets]
    return [name for name in first if _metric(name) is not None and all(name in names for names in others)]


def _gains_in(name: str, sets: Sequence[_Set], *, resamples: int) -> dict[str, Comparison]:
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


def _paired(one_set: _Set, a: str, b: str, *, metric: str) -> PairedStatistics | None:
    """Return the statistics of a row and its control; None if a trial lacks the metric."""
    pairs = matched_by_seed(one_set.trials[a], one_set.trials[b])
    sides: list[Array] = []
    for side in (0, 1):
        of_side = [pair[side].statistics.get(metric) for pair in pairs]
        known = [statistics for statistics in of_side if statistics is not None]
        if not known or len(known) < len(pairs):
            return None
        sides.append(np.stack(known))
    return PairedStatistics(sides[0], sides[1], one_set.groups)
