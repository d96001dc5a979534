"""Results objects: cells → rows with intervals, comparisons with p-values, the same for slices of the samples.

A results object holds what was run (task, split, model, encoder, placement, seeds, versions, config, notes, …) and

    rows    per condition: n, seeds, metrics (those that all cells hold; nll where it is known), intervals,
            per_user (metrics averaged over users), the rates of a `Trial`, prompt_tokens_mean, seconds,
            peak_memory_bytes, decoding, costs; over several seeds seed_spread and per_seed; fit_seconds where something
            was fitted on the way
    pairs   a, b, metric, difference (a's advantage whatever the metric's direction), low, high, p, and p_holm:
            corrected over the pairs of its family (personal gains; against plain; against instruction-only; gains of
            rows without the language model; the rest);
            for accuracies mcnemar_p, one per seed
    slices  name, rows and pairs of a part of the samples, where a part was asked for
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.metrics import Accuracy, Array, Metric
from personaplug.analysis.significance import (
    bootstrap_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    per_group_mean,
    seed_spread,
)
from personaplug.analysis.trials import EvalSamples, Trial
from personaplug.methods import control_of, find_condition, is_control, is_rule

Places = NDArray[np.int64]

_FEW = 6  # rows up to which every pair is compared
_BASES = ("plain", "instruction-only")
_WITHOUT_MODEL = ("computed", "known")  # how answers came about that no language model gave
_RATES = ("invalid_rate", "truncated_rate", "unfinished_rate", "lost_history_rate", "cut_items_rate")
_MEANS = ("prompt_tokens_mean", "seconds")
_COSTS = ("extra_prompt_tokens", "bytes_per_user", "seconds_per_user")


@dataclass(frozen=True)
class Settings:
    """How sure the numbers are to be.

    Attributes:
        metrics: the task's.
        resamples: of the bootstrap.
        seed: of its draws.
    """

    metrics: Sequence[Metric]
    resamples: int
    seed: int


def build_results(scored: EvalSamples, cells: Sequence[Trial], *, settings: Settings) -> dict[str, Any]:
    """The results of these cells, in their order of conditions; see the module's docstring."""
    everything = np.arange(len(scored.groups))
    seeds = sorted({cell.seed for cell in cells})
    made_with = sorted({cell.made_with for cell in cells if cell.made_with})
    told = scored.about | ({"made_with": made_with} if made_with else {})
    notes = [*_notes_on_seeds(cells), *_notes_on_set_ups(cells, made_with), *_notes_on_columns(cells, settings)]
    told |= {"seeds": seeds, "notes": [*scored.about.get("notes", []), *notes]}
    return told | _part(scored, cells, settings=settings, chosen=everything)


def with_subgroups(
    results: dict[str, Any],
    scored: EvalSamples,
    cells: Sequence[Trial],
    *,
    slices: Sequence[tuple[str, Places]],
    settings: Settings,
) -> dict[str, Any]:
    """Results with the same rows for parts of the samples: pairs of a name and the places of its samples."""
    parts = [
        {"name": name, "samples": len(chosen)} | _part(scored, cells, settings=settings, chosen=chosen)
        for name, chosen in slices
    ]
    return results | {"slices": parts}


def history_thirds(history_items: Sequence[int]) -> list[tuple[str, Places]]:
    """Samples by thirds of their histories' length (PPlug, Table 5); samples of one length stay together."""
    sizes = np.asarray(history_items)
    low, high = np.quantile(sizes, [1 / 3, 2 / 3], method="inverted_cdf")
    parts = (("short", sizes <= low), ("medium", (sizes > low) & (sizes <= high)), ("long", sizes > high))
    return [
        (f"{name} ({sizes[chosen].min()}–{sizes[chosen].max()} items)", np.flatnonzero(chosen))
        for name, chosen in parts
        if chosen.any()
    ]


def compared_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which rows are compared, (a, b): all of a few; of many the personal gains, and the methods against the bases.

    The plug is compared with every other method and with its own controls too, and what is built on another row (texts
    behind soft tokens, phrases, matrices of users on the task's, a learned retriever) with what it is built on. Rows
    without the language model are there to be compared with, and claim nothing against the bases.
    """
    gains = [(name, control) for name in names if (control := control_of(name)) is not None and control in names]
    if len(names) <= _FEW:
        return list(dict.fromkeys([*gains, *((a, b) for b, a in combinations(names, 2) if (b, a) not in gains)]))
    controls = {control for _, control in gains}
    methods = [name for name in names if not is_control(name) and name not in _BASES]
    against = [(name, base) for base in _BASES if base in names for name in methods if not is_rule(name)]
    others = [name for name in names if name not in controls and name not in ("plug", *_BASES)]
    rest = [("plug", name) for name in others] if "plug" in names else []
    rest += [(name, base) for name in methods for base in _built_on(name) if base in names]
    bases = [(_BASES[1], _BASES[0])] if set(_BASES) <= set(names) else []
    return list(dict.fromkeys([*gains, *bases, *against, *rest]))


def _built_on(name: str) -> list[str]:
    """The rows that a row adds something to."""
    condition = find_condition(name)
    if condition is None:
        return []
    if condition.per_user:
        return ["lora"]
    if name == "classical":
        return ["classical:text", "classical:history"]
    first, plus, added = name.partition("+")
    if plus:
        plain = [name.removesuffix("+phrases")] if condition.phrases else []
        return [*plain, added, *([f"instruction+{added}", "plug"] if first == "plug" else [])]
    return [f"dense:{condition.retrieval.items}"] if condition.retrieval and name.startswith("ropg") else []


def _notes_on_seeds(cells: Sequence[Trial]) -> list[str]:
    """What intervals and p-values know of the difference between trainings, and of which rows they know little."""
    trainings = Counter(cell.condition for cell in cells if _is_seeded(cell.condition))
    one, two = ([name for name, held in trainings.items() if held == count] for count in (1, 2))
    if len(one) == len(trainings):
        return ["One training seed: what trainings differ by is not covered."] if one else []
    return [
        "Of rows with several training seeds, the bootstrap draws the trainings too.",
        *([f"Two training seeds, which are few: {', '.join(two)}."] if two else []),
        *([f"One training seed, whose chance is not covered: {', '.join(one)}."] if one else []),
    ]


def _notes_on_set_ups(cells: Sequence[Trial], set_ups: Sequence[str]) -> list[str]:
    """Which rows come from where, if a table is of several machines or versions."""
    if len(set_ups) < 2:
        return []
    rows = {made: dict.fromkeys(cell.condition for cell in cells if cell.made_with == made) for made in set_ups}
    told = "; ".join(f"{made}: {', '.join(names)}" for made, names in rows.items())
    return [f"Made with {len(set_ups)} set-ups, between which trainings differ as two seeds do. {told}."]


def _notes_on_columns(cells: Sequence[Trial], settings: Settings) -> list[str]:
    """Which columns some cells hold and others, kept from before there were such columns, do not."""
    held = _held(cells, settings).metrics
    some = [m.name for m in settings.metrics if m not in held and any(m.name in cell.statistics for cell in cells)]
    told = [f"{', '.join(some)}: left out, since some rows were filled before there was such a column."] if some else []
    for metric in held:
        without = dict.fromkeys(cell.condition for cell in _meant(metric, cells) if metric.name not in cell.statistics)
        if without:
            told.append(f"{metric.name}: not known of {', '.join(without)}.")
    return told


def _held(cells: Sequence[Trial], settings: Settings) -> Settings:
    """The settings with those metrics by which rows can be compared: all by one of answers, else those that have it."""

    def held(metric: Metric) -> bool:
        found = [metric.name in cell.statistics for cell in _meant(metric, cells)]
        return all(found) if metric.of_answers else any(found)

    return replace(settings, metrics=[metric for metric in settings.metrics if held(metric)])


def _meant(metric: Metric, cells: Sequence[Trial]) -> list[Trial]:
    """The cells that can have such a metric."""
    return [cell for cell in cells if metric.of_answers or cell.decoding not in _WITHOUT_MODEL]


def _of_all(metrics: Sequence[Metric], cells: Sequence[Trial]) -> list[Metric]:
    """Those metrics that each of some cells holds."""
    return [metric for metric in metrics if all(metric.name in cell.statistics for cell in cells)]


def _part(scored: EvalSamples, cells: Sequence[Trial], *, settings: Settings, chosen: Places) -> dict[str, Any]:
    groups = [f"{scored.groups[place]:09d}" for place in chosen]
    by_name: dict[str, list[Trial]] = {}
    for cell in cells:
        by_name.setdefault(cell.condition, []).append(cell)
    part = _Part(groups, _held(cells, settings), by_name, chosen)
    return {"rows": [part.row(name) for name in by_name], "pairs": part.pairs()}


class _Part:
    """Some of the samples, and what every condition answered to them."""

    def __init__(
        self, groups: Sequence[str], settings: Settings, cells: dict[str, list[Trial]], chosen: Places
    ) -> None:
        self.groups, self.settings, self.cells, self.chosen = groups, settings, cells, chosen

    def row(self, name: str) -> dict[str, Any]:
        cells = self.cells[name]
        row: dict[str, Any] = {"condition": name, "n": len(self.groups), "metrics": {}, "intervals": {}, "per_user": {}}
        metrics = _of_all(self.settings.metrics, cells)
        for metric in metrics:
            stats = self._of_trainings(cells, metric)
            interval = bootstrap_interval(
                stats, self.groups, metric, resamples=self.settings.resamples, seed=self.settings.seed
            )
            row["metrics"][metric.name] = interval.value
            row["intervals"][metric.name] = [interval.low, interval.high]
            row["per_user"][metric.name] = per_group_mean(stats, self.groups, metric)
        row |= {key: _mean_of(cells, key) for key in (*_RATES, *_MEANS)}
        peaks = [cell.peak_memory_bytes for cell in cells if cell.peak_memory_bytes is not None]
        row |= {
            "seeds": [cell.seed for cell in cells],
            "peak_memory_bytes": max(peaks, default=None),
            "decoding": cells[0].decoding,
        }
        if (spec := _mean_of(cells, "fit_seconds")) is not None:
            row["fit_seconds"] = spec
        row["costs"] = {key: _mean_of(cells, key) for key in _COSTS}
        if len(cells) > 1:
            row["per_seed"] = [self._alone(cell, metrics) for cell in cells]
            row["seed_spread"] = {
                metric.name: seed_spread([one[metric.name] for one in row["per_seed"]]) for metric in metrics
            }
        return row

    def pairs(self) -> list[dict[str, Any]]:
        found = []
        for a, b in compared_pairs(list(self.cells)):
            both = self._in_common(a, b)
            for metric in _of_all(self.settings.metrics, [cell for pair in both for cell in pair]) if both else ():
                compared = paired_bootstrap(
                    self._of_trainings([cell for cell, _ in both], metric),
                    self._of_trainings([cell for _, cell in both], metric),
                    self.groups,
                    metric,
                    resamples=self.settings.resamples,
                    seed=self.settings.seed,
                )
                pair = {"a": a, "b": b, "metric": metric.name, **asdict(compared)}
                found.append(pair | (self._mcnemar(both, metric) if isinstance(metric, Accuracy) else {}))
        _correct(found)
        return found

    def _in_common(self, a: str, b: str) -> list[tuple[Trial, Trial]]:
        """Cells of two rows, seed by seed: of the seeds that both have; a row without seeds meets each of the other."""
        of_a, of_b = ({cell.seed: cell for cell in self.cells[name]} for name in (a, b))
        if not _is_seeded(a):
            return [(next(iter(of_a.values())), cell) for cell in of_b.values()]
        if not _is_seeded(b):
            return [(cell, next(iter(of_b.values()))) for cell in of_a.values()]
        return [(of_a[seed], of_b[seed]) for seed in of_a if seed in of_b]

    def _of_trainings(self, cells: Sequence[Trial], metric: Metric) -> Array:
        """The statistics of each cell: (S, n, d)."""
        return np.stack([cell.statistics[metric.name][self.chosen] for cell in cells])

    def _alone(self, cell: Trial, metrics: Sequence[Metric]) -> dict[str, float]:
        means = {metric.name: cell.statistics[metric.name][self.chosen].mean(axis=0) for metric in metrics}
        return {metric.name: float(metric.value(means[metric.name])) for metric in metrics}

    def _mcnemar(self, both: Sequence[tuple[Trial, Trial]], metric: Metric) -> dict[str, Any]:
        """Seed by seed, since hits averaged over seeds are no hits."""
        held = [[cell.statistics[metric.name][self.chosen] for cell in pair] for pair in both]
        return {"mcnemar_p": [mcnemar(hits_a, hits_b).p for hits_a, hits_b in held]}


def _is_seeded(name: str) -> bool:
    condition = find_condition(name)
    return condition is not None and condition.seeded


def _correct(pairs: list[dict[str, Any]]) -> None:
    """Add Holm's correction over each family of comparisons, metric by metric."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for pair in pairs:
        families.setdefault((_family(pair), pair["metric"]), []).append(pair)
    for family in families.values():
        for pair, corrected in zip(family, holm([pair["p"] for pair in family]), strict=True):
            pair["p_holm"] = corrected


def _family(pair: dict[str, Any]) -> str:
    # Neither controls nor rules make claims of a method, and they make none of those harder to prove.
    if control_of(pair["a"]) == pair["b"]:
        return "gain of a rule" if is_rule(pair["a"]) else "gain"
    claims = not is_control(pair["a"]) and not is_rule(pair["a"])
    return pair["b"] if pair["b"] in _BASES and claims else "rest"


def _mean_of(cells: Sequence[Trial], key: str) -> float | None:
    held = [value for cell in cells if (value := getattr(cell, key)) is not None]
    return float(np.mean(held)) if held else None
