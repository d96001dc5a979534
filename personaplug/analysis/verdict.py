"""What a table says, in three sentences: the best row, the personal gain, the best rival without a language model."""

from __future__ import annotations

import math

from personaplug.analysis.metrics import metric_class
from personaplug.analysis.results_file import ResultPart, ResultRow
from personaplug.analysis.tables import gain_cell, metric_title, score_cell


def verdict(results: ResultPart) -> list[str]:
    """Return the sentences about the leading metric; none if the rows have no metric."""
    metric = results.leading_metric
    ranked = ranked_rows(results, metric)
    if not ranked:
        return []
    return [_best(results, ranked, metric), _gain(results, ranked, metric), _free_rival(ranked, metric)]


def ranked_rows(results: ResultPart, metric: str) -> list[ResultRow]:
    """Return the rows with a finite score, the best first, without controls and what simulated users allow."""
    kind = metric_class(metric)
    rivals = [row for row in results.rows if not row.method.is_control and row.method.family != "oracle"]
    rows = [row for row in rivals if math.isfinite(row.metrics.get(metric, math.nan))]
    return sorted(rows, key=lambda row: row.metrics[metric], reverse=kind is None or kind.greater_is_better)


def clear_best(results: ResultPart) -> str | None:
    """Return the row that is significantly better than the second best; None if no row is shown to be.

    Rows that the file does not compare must have intervals that do not overlap.
    """
    metric = results.leading_metric
    rows = ranked_rows(results, metric)
    if len(rows) < 2:
        return None
    best, second = rows[:2]
    for pair in results.pairs:
        if pair.metric == metric and {pair.a, pair.b} == {best.name, second.name}:
            return best.name if pair.is_significant else None
    ends, others = best.interval(metric), second.interval(metric)
    return best.name if ends and others and (ends[0] > others[1] or others[0] > ends[1]) else None


def _best(results: ResultPart, ranked: list[ResultRow], metric: str) -> str:
    sentence = f"Best row: {_score(ranked[0], metric)}"
    if len(ranked) == 1:
        return sentence
    relation = "better than" if clear_best(results) else "not clearly better than"
    return f"{sentence}; {relation} {_score(ranked[1], metric)}"


def _gain(results: ResultPart, ranked: list[ResultRow], metric: str) -> str:
    gains = results.personal_gains(metric)
    name = next((row.name for row in ranked if row.name in gains), None)
    if name is None:
        return "Personal gain: not measured, because no row stands beside its wrong-user control"
    return f"Personal gain: {name} {gain_cell(gains[name])} over its own wrong-user control"


def _free_rival(ranked: list[ResultRow], metric: str) -> str:
    rival = next((row for row in ranked if not row.method.has_language_model), None)
    if rival is None:
        return "Best free rival: none in this table; --methods user-median,user-majority,… adds rows without a model"
    return f"Best free rival: {_score(rival, metric)}"


def _score(row: ResultRow, metric: str) -> str:
    return f"{row.name} ({metric_title(metric)} {score_cell(row, metric)})"
