"""Figures show the values of the results, labels do not overlap, and figures can be saved as PNG."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from result_objects import typed

from personaplug.analysis.figures.overview import gains_figure, scores_figure, subgroups_figure
from personaplug.errors import MissingData, MissingExtra

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

METHODS = ("plug", "bm25:4", "recency:4", "dense:4", "plug+bm25:1", "profile", "lora-per-user", "ropg:4")


def control(name: str) -> str:
    return "wrong-user" if name == "plug" else f"{name}@wrong-user"


def row(name: str, value: float | None, *, reach: float = 0.03) -> dict[str, Any]:
    ends = [None, None] if value is None else [value - reach, value + reach]
    return {"method": name, "n": 90, "metrics": {"accuracy": value}, "intervals": {"accuracy": ends}}


def gain(name: str, difference: float, *, p: float, p_holm: float | None = None) -> dict[str, Any]:
    ends = {"low": difference - 0.05, "high": difference + 0.04}
    pair = {"a": name, "b": control(name), "metric": "accuracy", "difference": difference, "p": p}
    return pair | ends | {"p_holm": p_holm}


def results_of(methods: tuple[str, ...] = METHODS, **more: Any) -> dict[str, Any]:
    rows = [row("plain", 0.3), row("instruction-only", 0.5)]
    for index, name in enumerate(methods):
        rows += [row(control(name), 0.48), row(name, 0.5 + index / 100)]
    about = {"task": "Movie_stars", "split": "dev", "model": "owner/small-model (weights 1a, width 576)"}
    return about | {"rows": rows, "pairs": [gain(name, 0.02, p=0.4) for name in methods]} | more


def with_subgroups(*names: str) -> dict[str, Any]:
    parts = [
        {"name": name, "rows": [row("instruction-only", 0.5), row("plug", 0.5 + index / 10), row("wrong-user", 0.45)]}
        for index, name in enumerate(names)
    ]
    return results_of(("plug",), subgroups=parts)


def scores_of(results: dict[str, Any], metric: str = "accuracy") -> Figure:
    return scores_figure(typed(results), metric)


def gains_of(results_list: list[dict[str, Any]]) -> Figure:
    return gains_figure([typed(results) for results in results_list])


def subgroups_of(results: dict[str, Any], metric: str = "accuracy") -> Figure:
    return subgroups_figure(typed(results), metric)


def whiskers_of(axes: Axes, *, along: int) -> list[tuple[float, float]]:
    """Return both ends of every whisker along x (0) or y (1)."""
    lines = [line for line in axes.collections if isinstance(line, LineCollection)]
    return [(float(ends[0][along]), float(ends[1][along])) for line in lines for ends in line.get_segments()]


def test_bars_are_as_long_as_the_scores_and_whiskers_as_the_intervals() -> None:
    [axes] = scores_of(results_of(("plug", "bm25:4")), "accuracy").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["plain", "instruction-only", "plug", "wrong-user", "bm25:4", "bm25:4@wrong-user"]
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    lengths = {names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in bars}
    assert lengths == pytest.approx(
        {"plain": 0.3, "instruction-only": 0.5, "plug": 0.5, "bm25:4": 0.51}
        | {"wrong-user": 0.48, "bm25:4@wrong-user": 0.48}
    )
    whiskers = {(round(low, 3), round(high, 3)) for low, high in whiskers_of(axes, along=0)}
    assert whiskers == {(0.27, 0.33), (0.47, 0.53), (0.45, 0.51), (0.48, 0.54)}
    assert {text.get_text() for text in axes.texts} == {"0.300", "0.500", "0.480", "0.510"}
    assert axes.get_title(loc="left") == "Movie_stars · dev · small-model"
    assert axes.get_xlabel() == "accuracy, higher is better"
    assert axes.get_xlim()[0] == 0


def test_controls_share_a_color_that_no_method_has() -> None:
    [axes] = scores_of(results_of(("plug", "bm25:4")), "accuracy").axes
    colors = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    plug, wrong_user, bm25, bm25_wrong_user = colors[2:]
    assert wrong_user == bm25_wrong_user
    assert len({plug, wrong_user, bm25}) == 3


def test_figure_grows_with_its_rows_so_that_names_do_not_overlap() -> None:
    few, many = scores_of(results_of(("plug",)), "accuracy"), scores_of(results_of(), "accuracy")
    assert many.get_size_inches()[1] > 2 * few.get_size_inches()[1]
    many.draw_without_rendering()
    boxes = [label.get_window_extent() for label in many.axes[0].get_yticklabels()]
    assert len(boxes) == 18
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))


def test_nan_score_has_no_bar() -> None:
    [axes] = scores_of({"rows": [row("plain", None), row("plug", 0.5)]}, "accuracy").axes
    assert len(axes.patches) == 1
    assert [text.get_text() for text in axes.texts] == [" nan", "0.500"]


def test_gains_are_points_that_are_filled_if_significant() -> None:
    pairs = [
        gain("plug", 0.2, p=0.001, p_holm=0.002),
        gain("bm25:4", 0.1, p=0.03, p_holm=0.06),
        gain("profile", -0.1, p=0.01),
        {"a": "plug", "b": "plain", "metric": "accuracy", "difference": 0.9, "p": 0.001},
    ]
    figure = gains_of([results_of(("plug", "bm25:4", "profile")) | {"pairs": pairs}])
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plug", "bm25:4", "profile"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(0.2, 0), (0.1, 1), (-0.1, 2)]  # type: ignore[index]
    assert [line.get_markerfacecolor() == "#ffffff" for line in points] == [False, True, False]
    assert whiskers_of(axes, along=0) == [pytest.approx((d - 0.05, d + 0.04)) for d in (0.2, 0.1, -0.1)]


def test_gains_have_a_panel_per_set_and_a_line_per_method() -> None:
    results_list = [
        results_of(("plug", "bm25:4")),
        results_of(("profile",), set="Other"),
        results_of(()),
        results_of(("plug",), set="C"),
    ]
    panels = [axes for axes in gains_of([*results_list, results_of(("plug",), set="D")]).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["Movie_stars #1", "Other", "C", "D"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["plug", "bm25:4", "profile"]
    assert [[line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"] for axes in panels] == [  # type: ignore[index]
        [0, 1],
        [2],
        [0],
        [0],
    ]


def test_subgroups_are_lines_over_their_names() -> None:
    panels = subgroups_of(with_subgroups("items=1", "items=5", "items=20"), "accuracy").axes
    axes = next(axes for axes in panels if axes.get_title(loc="left") == "plug")
    method_line, control_line, base_line = axes.lines
    assert list(method_line.get_ydata()) == pytest.approx([0.5, 0.6, 0.7])  # type: ignore[arg-type]
    assert list(control_line.get_ydata()) == [0.45] * 3  # type: ignore[arg-type]
    assert list(base_line.get_ydata()) == [0.5] * 3  # type: ignore[arg-type]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "20"]
    assert axes.get_xlabel() == "items"
    assert whiskers_of(axes, along=1)[:3] == [pytest.approx((v - 0.03, v + 0.03)) for v in (0.5, 0.6, 0.7)]


def test_subgroup_names_without_a_common_key_stay_and_missing_points_are_skipped() -> None:
    results = with_subgroups("short", "long=very")
    results["subgroups"].insert(1, {"name": "middle"})
    [axes] = subgroups_of(results, "accuracy").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["short", "middle", "long=very"]
    assert list(axes.lines[0].get_xdata()) == [0, 2]  # type: ignore[arg-type]


def test_figures_can_be_saved_as_png(tmp_path: Path) -> None:
    results = results_of(subgroups=with_subgroups("short", "long")["subgroups"])
    for figure in (scores_of(results), gains_of([results]), subgroups_of(results)):
        figure.savefig(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_dollar_signs_in_names_are_not_parsed_as_formulas(tmp_path: Path) -> None:
    results = results_of(("plug",), task="costs $x^$ a $y_")
    results["rows"].append(row(r"a$\frac$b", 0.4))
    scores_of(results).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_results_without_data_to_draw_are_refused() -> None:
    with pytest.raises(MissingData, match="'rmse'"):
        scores_of(results_of(), "rmse")
    with pytest.raises(MissingData, match="wrong-user control"):
        gains_of([results_of(()), {"rows": []}])
    with pytest.raises(MissingData, match="no subgroups"):
        subgroups_of(results_of(), "accuracy")


def test_error_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'personaplug\[report\]'"):
        scores_of(results_of(), "accuracy")


def test_third_party_rows_have_the_color_of_their_family() -> None:
    mine = row("mine", 0.5) | {"family": "plug", "history": "own"}
    mine_control = row("strange", 0.4) | {"family": "plug", "history": "wrong-user", "control_of": "mine"}
    [axes] = scores_of({"rows": [mine_control, row("plug", 0.5), mine, row("wrong-user", 0.4)]}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plug", "wrong-user", "mine", "strange"]
    plug, wrong_user, own, own_control = (to_hex(bar.get_facecolor()) for bar in axes.patches)
    assert (plug, wrong_user) == (own, own_control)
    [axes] = scores_of({"rows": [row("new", 0.5) | {"family": "a new family"}]}).axes
    assert len(axes.patches) == 1


def test_bar_without_an_interval_is_drawn_without_a_whisker() -> None:
    [axes] = scores_of({"rows": [{"method": "new", "metrics": {"accuracy": 1}}]}).axes
    assert len(axes.patches) == 1
