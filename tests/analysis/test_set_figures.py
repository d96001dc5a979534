"""Figures of one set show the scores, intervals and costs of the results, and leave out what these lack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from result_objects import typed

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection

from personaplug.analysis.figures.of_set import (
    advantages,
    advantages_figure,
    cost_figure,
    cost_rows,
    forest_figure,
    forest_rows,
    users_figure,
)
from personaplug.analysis.results_file import Results
from personaplug.analysis.user_scores import UserScores


def _row(name: str, score: float | None, *, tokens: float | None = 8.0, size: float | None = 1e4) -> dict[str, Any]:
    ends = [None, None] if score is None else [score - 0.1, score + 0.1]
    costs = {"extra_prompt_tokens": tokens, "bytes_per_user": size, "seconds_per_user": None}
    return {"method": name, "metrics": {"mae": score}, "intervals": {"mae": ends}, "costs": costs}


def _free(name: str, score: float) -> dict[str, Any]:
    return _row(name, score, tokens=None, size=None)


def _results(*rows: dict[str, Any]) -> Results:
    return typed({"task": "Stars", "split": "dev", "rows": list(rows)})


WHOLE = (
    _row("plain", 3.0, tokens=0.0, size=0.0),
    _row("instruction-only", 0.9, size=0.0),
    _row("plug", 0.6),
    _row("wrong-user", 0.95),
    _row("bm25:4", 0.7, tokens=120.0, size=2e3),
    _free("user-mean", 0.8),
    _free("user-median", 0.65),
)


def _dots(axes: Axes) -> list[tuple[float, float]]:
    places = [path.get_offsets() for path in axes.collections if isinstance(path, PathCollection)]
    return [(round(float(x), 4), round(float(y), 4)) for of_path in places for x, y in np.asarray(of_path)]


def test_forest_has_the_rows_of_the_verdict_and_the_best_free_rival_by_the_metrics_direction() -> None:
    figure = forest_figure(_results(*WHOLE), "mae", title="Stars")
    [axes] = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "own history\nplug",
        "a stranger's history\nwrong-user",
        "no history\ninstruction-only",
        "best rival at no cost\nuser-median",
    ]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in points] == [0.6, 0.95, 0.9, 0.65]
    whiskers = [path.get_segments()[0] for path in axes.collections if isinstance(path, LineCollection)]
    ends = [pytest.approx((score - 0.1, score + 0.1)) for score in (0.6, 0.95, 0.9, 0.65)]
    assert [(ends[0][0], ends[1][0]) for ends in whiskers] == ends
    assert axes.get_xlabel() == "mae, lower is better"


def test_advantages_are_the_paired_differences_to_the_rows_of_the_forest_and_the_best_costly_rival() -> None:
    rows = [*WHOLE, _row("lora-per-user", 0.5)]
    pairs = [
        {"a": "plug", "b": name, "metric": "mae", "difference": gain, "low": gain - 0.1, "high": gain + 0.1, "p": p}
        for name, gain, p in (("wrong-user", 0.35, 0.001), ("lora-per-user", -0.1, 0.2), ("bm25:4", 0.1, 0.04))
    ]
    results = typed({"task": "Stars", "split": "dev", "rows": rows, "pairs": pairs})
    found = advantages(results, "mae")
    assert [(role, pair.difference) for role, pair in found.items()] == [
        ("a stranger's history", 0.35),
        ("best rival at any cost", -0.1),
    ]
    [axes] = advantages_figure(results, "mae", title="Stars").axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in points] == [0.35, -0.1]
    assert [line.get_markerfacecolor() == line.get_markeredgecolor() for line in points] == [True, False]
    assert advantages(_results(*WHOLE), "mae") == {}  # without comparisons


def test_forest_leaves_out_missing_and_nan_rows_and_needs_the_main_row() -> None:
    rows = forest_rows(_results(_row("plug", 0.6), _row("wrong-user", None), _row("instruction-only", 0.9)), "mae")
    assert [row.name for row in rows.values()] == ["plug", "instruction-only"]
    assert forest_rows(_results(_row("plug", 0.6)), "mae") == {}
    assert forest_rows(_results(_row("plug", None), _row("instruction-only", 0.9)), "mae") == {}
    assert forest_rows(_results(_row("plain", 0.6), _free("user-mean", 0.9)), "mae") == {}


def test_cost_figure_has_a_point_per_row_and_a_rule_at_the_best_row_without_a_language_model() -> None:
    [axes] = cost_figure(_results(*WHOLE[1:]), "mae", "extra_prompt_tokens", title="Stars").axes
    assert sorted(_dots(axes)) == [(8, 0.6), (8, 0.9), (8, 0.95), (120, 0.7)]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"plug", "instruction-only", "bm25:4", "user-median, no language model"}
    [rule] = axes.lines
    assert float(np.asarray(rule.get_ydata())[0]) == 0.65
    assert axes.get_xlabel() == "extra prompt tokens"


def test_row_far_from_the_others_is_named_with_its_score_at_the_edge() -> None:
    [axes] = cost_figure(_results(*WHOLE), "mae", "extra_prompt_tokens", title="Stars").axes
    assert axes.get_ylim()[1] < 1.1
    assert "plain (3.000, off the scale)" in {text.get_text() for text in axes.texts}
    assert (0, round(axes.get_ylim()[1], 4)) in _dots(axes)


def test_best_row_is_never_off_the_scale() -> None:
    rows = [_row(f"recency:{k}", 3.0 + k / 100, tokens=float(k)) for k in range(1, 6)]
    [axes] = cost_figure(_results(_row("plug", 0.1), *rows), "mae", "extra_prompt_tokens", title="Stars").axes
    assert axes.get_ylim()[0] < 0.1
    assert (8, 0.1) in _dots(axes)


def test_costs_that_are_unknown_or_equal_are_not_drawn() -> None:
    results = _results(*WHOLE)
    assert {row.name for row in cost_rows(results, "mae", "bytes_per_user")} == {
        *("plain", "instruction-only", "plug", "wrong-user", "bm25:4")
    }
    equal = _results(_row("instruction-only", 0.9), _row("plug", 0.6), _row("wrong-user", 0.9, tokens=9.0))
    assert cost_rows(equal, "mae", "extra_prompt_tokens") == []
    assert cost_rows(_results(_free("user-mean", 0.9), _free("copy", 0.8)), "mae", "bytes_per_user") == []


def _users(own: list[float], stranger: list[float]) -> UserScores:
    scores = {"mae": np.stack([own, stranger], axis=1)}
    count = np.ones(len(own), dtype=np.int64)
    return UserScores(
        "plug", "wrong-user", "mae", np.arange(len(own)), count, count.astype(float), scores, {"mae": False}
    )


def test_users_with_equal_scores_share_a_larger_point_and_extremes_are_links() -> None:
    scores = _users([0.0, 1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 0.5])
    assert scores.extremes(1) == [0, 4]
    [axes] = users_figure(scores, title="Users", linked=scores.extremes(1), anchor="user-").axes
    assert sorted(_dots(axes)) == [(0.5, 2), (1, 0), (1, 1)]
    paths = [path for path in axes.collections if isinstance(path, PathCollection)]
    sizes = {tuple(np.asarray(path.get_offsets())[0]): float(path.get_sizes()[0]) for path in paths}
    assert sizes[1.0, 1.0] > sizes[1.0, 0.0] == sizes[0.5, 2.0]
    links = {url for path in paths for url in path.get_urls() if url}
    assert links == {"#user-0", "#user-4"}
    colors = {tuple(np.asarray(path.get_offsets())[0]): tuple(np.asarray(path.get_facecolor())[0]) for path in paths}
    assert len(set(colors.values())) == 3


def test_user_with_a_score_that_is_not_finite_has_no_point() -> None:
    scores = _users([0.0, float("inf"), 1.0], [1.0, 1.0, float("nan")])
    [axes] = users_figure(scores, title="Users", linked=scores.extremes(5)).axes
    assert _dots(axes) == [(1, 0)]
