"""Compute results from trials: rows with intervals and comparisons with p-values, on all samples and on subgroups."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.method_info import MethodInfo, main_row
from personaplug.analysis.metrics import Accuracy, Array, Metric, value_of
from personaplug.analysis.results_file import Comparison, ResultRow, Results, Subgroup
from personaplug.analysis.significance import bootstrap_interval, holm, mcnemar, paired_bootstrap, per_group_mean
from personaplug.analysis.trials import Diagnostics, EvalSamples, Trial

Indices = NDArray[np.int64]

_MAX_ROWS_FOR_ALL_PAIRS = 6


@dataclass(frozen=True)
class Settings:
    """The metrics, in the order of the columns, and the bootstrap's number of draws and seed."""

    metrics: Sequence[Metric]
    resamples: int
    seed: int


def build_results(
    samples: EvalSamples, trials: Sequence[Trial], *, settings: Settings, subgroups: Sequence[tuple[str, Indices]] = ()
) -> Results:
    """Return the results on all samples and on subgroups, given as names and sample indices.

    The rows are in the order of the trials.
    """
    made_with = sorted({trial.made_with for trial in trials if trial.made_with})
    notes = [*samples.about.notes, *_notes_on_seeds(trials), *_notes_on_set_ups(trials, made_with)]
    notes += _notes_on_metrics(trials, settings)
    about = replace(samples.about, seeds=sorted({trial.seed for trial in trials}), made_with=made_with, notes=notes)

    def part(indices: Indices) -> tuple[list[ResultRow], list[Comparison]]:
        return _rows_and_pairs(samples, trials, indices=indices, settings=settings)

    named = [Subgroup(*part(indices), name, samples=len(indices)) for name, indices in subgroups]
    return Results(*part(np.arange(len(samples.groups))), about, named)


def history_thirds(history_items: Sequence[int]) -> list[tuple[str, Indices]]:
    """Split samples into thirds by history length (PPlug, Table 5). Equal lengths stay in the same third."""
    sizes = np.asarray(history_items)
    low, high = np.quantile(sizes, [1 / 3, 2 / 3], method="inverted_cdf")
    parts = (("short", sizes <= low), ("medium", (sizes > low) & (sizes <= high)), ("long", sizes > high))
    return [
        (f"{name} ({sizes[mask].min()}–{sizes[mask].max()} items)", np.flatnonzero(mask))
        for name, mask in parts
        if mask.any()
    ]


def compared_pairs(methods: Sequence[MethodInfo]) -> list[tuple[str, str]]:
    """Return the pairs of rows to compare, as names (a, b), personal gains first.

    Up to six rows are all compared with each other. Of more rows, each method is compared with its parents and with
    the bases, the rows without personalization. The main row (`main_row`) is compared with every other method and with
    its own controls. Rows without a language model are not compared with the bases.
    """
    names = [method.name for method in methods]
    gains = [(a.name, b.name) for a in methods for b in methods if b.gain_of == a.name]
    if len(names) <= _MAX_ROWS_FOR_ALL_PAIRS:
        return list(dict.fromkeys([*gains, *((a, b) for b, a in combinations(names, 2) if (b, a) not in gains)]))
    bases = _bases(methods)
    personal = [method for method in methods if not method.is_control and method.name not in bases]
    against_bases = [(m.name, base) for base in bases for m in personal if m.has_language_model]
    main = main_row(methods)
    gain_controls = {control for _, control in gains}
    others = [name for name in names if name not in gain_controls and name not in bases]
    against_main = [(main.name, name) for name in others if name != main.name] if main else []
    against_parents = [(m.name, parent) for m in personal for parent in m.parents if parent in names]
    between_bases = [(b, a) for a, b in combinations(bases, 2)]
    return list(dict.fromkeys([*gains, *between_bases, *against_bases, *against_main, *against_parents]))


def _bases(methods: Sequence[MethodInfo]) -> list[str]:
    """Return the rows without personalization, untrained rows first."""
    bases = [method for method in methods if method.family == "none" and not method.is_control]
    return [method.name for method in sorted(bases, key=lambda method: method.is_seeded)]


def _notes_on_seeds(trials: Sequence[Trial]) -> list[str]:
    trainings = Counter(trial.method.name for trial in trials if trial.method.is_seeded)
    with_one, with_two = (", ".join(name for name, count in trainings.items() if count == seeds) for seeds in (1, 2))
    if all(count == 1 for count in trainings.values()):
        return ["One training seed: intervals do not include the variance between trainings."] if trainings else []
    notes = ["For rows with several training seeds, the bootstrap also resamples the trainings."]
    notes += [f"Only two training seeds: {with_two}."] if with_two else []
    one_seed = f"One training seed, so intervals do not include the variance between trainings: {with_one}."
    return [*notes, one_seed] if with_one else notes


def _notes_on_set_ups(trials: Sequence[Trial], set_ups: Sequence[str]) -> list[str]:
    if len(set_ups) < 2:
        return []
    names = [dict.fromkeys(trial.method.name for trial in trials if trial.made_with == set_up) for set_up in set_ups]
    origins = "; ".join(f"{set_up}: {', '.join(rows)}" for set_up, rows in zip(set_ups, names, strict=True))
    effect = "The same training differs between set-ups as much as between seeds."
    return [f"The rows come from {len(set_ups)} set-ups. {effect} {origins}."]


def _notes_on_metrics(trials: Sequence[Trial], settings: Settings) -> list[str]:
    """Name the rows that lack a metric although it applies to them and other rows have it."""
    notes = []
    for metric in settings.metrics:
        scored = [trial for trial in trials if metric.applies_to(trial.method)]
        missing = dict.fromkeys(trial.method.name for trial in scored if metric.name not in trial.statistics)
        if missing and any(metric.name in trial.statistics for trial in scored):
            notes.append(f"{metric.name}: missing for {', '.join(missing)}.")
    return notes


def _rows_and_pairs(
    samples: EvalSamples, trials: Sequence[Trial], *, indices: Indices, settings: Settings
) -> tuple[list[ResultRow], list[Comparison]]:
    by_name = defaultdict(list)
    for trial in trials:
        by_name[trial.method.name].append(trial)
    scorer = _Scorer([samples.groups[index] for index in indices], indices, settings)
    methods = [same_method[0].method for same_method in by_name.values()]
    matched = [matched_by_seed(by_name[a], by_name[b]) for a, b in compared_pairs(methods)]
    pairs = [pair for trial_pairs in matched for pair in scorer.comparisons(trial_pairs)]
    return [scorer.row(same_method) for same_method in by_name.values()], _holm_corrected(pairs, methods)


class _Scorer:
    """Scores and compares trials on the samples of `indices`."""

    def __init__(self, groups: Sequence[int], indices: Indices, settings: Settings) -> None:
        self.groups, self.indices, self.metrics = groups, indices, settings.metrics
        self.draws = {"resamples": settings.resamples, "seed": settings.seed}

    def row(self, trials: Sequence[Trial]) -> ResultRow:
        """Return the row of one method's trials."""
        metrics = self._metrics_of(trials)
        stats = {metric.name: self._statistics(trials, metric) for metric in metrics}
        intervals = {m.name: bootstrap_interval(stats[m.name], self.groups, m, **self.draws) for m in metrics}
        seeds = range(len(trials)) if len(trials) > 1 else ()
        per_seed = [{m.name: value_of(stats[m.name][index], m) for m in metrics} for index in seeds]
        with np.errstate(invalid="ignore"):  # scores may be infinite
            spread = {m.name: float(np.std([s[m.name] for s in per_seed], ddof=1)) for m in metrics if per_seed}
        return ResultRow(
            trials[0].method,
            n=len(self.groups),
            seeds=[trial.seed for trial in trials],
            metrics={name: interval.value for name, interval in intervals.items()},
            intervals={name: [interval.low, interval.high] for name, interval in intervals.items()},
            per_user={m.name: per_group_mean(stats[m.name], self.groups, m) for m in metrics},
            invalid_rate=float(np.mean([trial.invalid_rate for trial in trials])),
            decoding=trials[0].decoding,
            diagnostics=Diagnostics.mean_of([trial.diagnostics for trial in trials]),
            per_seed=per_seed,
            seed_spread=spread,
        )

    def comparisons(self, pairs: Sequence[tuple[Trial, Trial]]) -> list[Comparison]:
        """Compare two methods, given as pairs of trials with the same seed, in each metric that all trials have."""
        if not pairs:
            return []
        of_a, of_b = ([pair[side] for pair in pairs] for side in (0, 1))
        comparisons = []
        for metric in self._metrics_of([*of_a, *of_b]):
            a, b = self._statistics(of_a, metric), self._statistics(of_b, metric)
            paired = paired_bootstrap(a, b, self.groups, metric, **self.draws)
            # McNemar's test needs hits, and an average of hits over seeds is not a hit. So each seed has a test.
            p_values = [*map(mcnemar, a, b)] if isinstance(metric, Accuracy) else []
            names = of_a[0].method.name, of_b[0].method.name
            comparisons.append(Comparison(*names, metric.name, **paired._asdict(), mcnemar_p=p_values))
        return comparisons

    def _metrics_of(self, trials: Sequence[Trial]) -> list[Metric]:
        return [metric for metric in self.metrics if all(metric.name in t.statistics for t in trials)]

    def _statistics(self, trials: Sequence[Trial], metric: Metric) -> Array:
        """Return the statistics of each trial: (S, n, d)."""
        return np.stack([trial.statistics[metric.name][self.indices] for trial in trials])


def matched_by_seed(of_a: Sequence[Trial], of_b: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """Pair the trials of the seeds that both methods have. Pair a method without seeds with each trial of the other."""
    if not of_a[0].method.is_seeded:
        return [(of_a[0], trial) for trial in of_b]
    if not of_b[0].method.is_seeded:
        return [(trial, of_b[0]) for trial in of_a]
    by_seed = {trial.seed: trial for trial in of_b}
    return [(trial, by_seed[trial.seed]) for trial in of_a if trial.seed in by_seed]


def _holm_corrected(pairs: Sequence[Comparison], methods: Sequence[MethodInfo]) -> list[Comparison]:
    """Add Holm's correction within each family of comparisons, metric by metric."""
    families = defaultdict(list)
    for index, pair in enumerate(pairs):
        families[_family(pair, methods), pair.metric].append(index)
    p_values: dict[int, float] = {}
    for indices in families.values():
        p_values |= zip(indices, holm([pairs[index].p or math.nan for index in indices]), strict=True)
    return [replace(pair, p_holm=p_values[index]) for index, pair in enumerate(pairs)]


def _family(pair: Comparison, methods: Sequence[MethodInfo]) -> str:
    # Controls and rows without a language model make no claim against a base, so they are not in a base's family.
    # Otherwise they would increase the corrected p of the rows that do.
    by_name = {method.name: method for method in methods}
    a, b = by_name[pair.a], by_name[pair.b]
    if b.gain_of == a.name:
        return "gain" if a.has_language_model else "gain without a language model"
    makes_claim = not a.is_control and a.has_language_model
    return b.name if makes_claim and b.name in _bases(methods) else "rest"
