"""The trials beside a results file (`SET.trials.jsonl`), after a check that they give the scores of the results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personaplug.analysis.metrics import Metric, get_metric, metric_class
from personaplug.analysis.results_file import Results
from personaplug.analysis.trials import EvalSamples, Trial, TrialFile

_TOLERANCE = 1e-6  # relative; trial files have nine digits
_ANY_SCALE = ("0", "1")


class UnmatchedTrials(Exception):
    """The trials are missing or belong to other results. The message says which."""


@dataclass(frozen=True, eq=False)
class ResultTrials:
    """Results with their trials, by the row's name; one trial for each seed."""

    results: Results
    samples: EvalSamples
    trials: dict[str, list[Trial]]


def trials_file_of(results_file: Path) -> Path:
    """Return the path of the trials beside a results file."""
    return results_file.with_name(f"{results_file.stem}.trials.jsonl")


def load_result_trials(results_file: Path, results: Results) -> ResultTrials:
    """Read the trials of results.

    Raises:
        UnmatchedTrials: if there is no such file, or if its trials give other scores.
        RecordError: if it is not a file of trials.
    """
    file = trials_file_of(results_file)
    samples, trials = TrialFile(file).load() if file.exists() else (None, [])
    if samples is None:
        raise UnmatchedTrials(f"{file} with the scores of the samples is missing. `personaplug bench` writes it.")
    by_name: dict[str, list[Trial]] = {}
    for row in results.rows:
        by_name[row.name] = [t for seed in row.seeds for t in trials if (t.method.name, t.seed) == (row.name, seed)]
    loaded = ResultTrials(results, samples, by_name)
    if not all(_gives_scores(loaded, name) for name in results.by_name):
        raise UnmatchedTrials(f"{file} does not belong to its results. Run `personaplug bench` again.")
    return loaded


def metric_of_means(name: str) -> Metric | None:
    """Return a metric to compute scores from means of statistics; None for an unknown name.

    Its labels are not those of the task, so it cannot score texts.
    """
    kind = metric_class(name)
    if kind is None:
        return None
    return get_metric(name, labels=_ANY_SCALE if kind.needs_labels or kind.needs_scale or "@" in name else ())


def _gives_scores(loaded: ResultTrials, row_name: str) -> bool:
    row = loaded.results.by_name[row_name]
    for name, value in row.metrics.items():
        known = [trial.statistics[name] for trial in loaded.trials[row_name] if name in trial.statistics]
        metric = metric_of_means(name)
        if metric is None or not known or not math.isfinite(value):
            continue
        if any(len(statistics) != len(loaded.samples.groups) for statistics in known):
            return False
        found = float(metric.value(np.stack(known).mean(axis=(0, 1))))
        if len(known) < len(row.seeds) or not math.isclose(found, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            return False
    return True
