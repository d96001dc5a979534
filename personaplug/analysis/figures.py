"""Results objects as pictures: scores as bars, personal gains as points about zero, slices as lines.

Every kind has two functions: `draw_…` returns matplotlib's Figure, `…_figure` writes it as a PNG. The colours are those
that Okabe and Ito chose to be told apart by colour-blind readers; a row that is there as a control is drawn pale.
Nothing here needs a display. matplotlib is an optional dependency, imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personaplug.analysis.tables import (
    Row,
    in_order,
    is_finite,
    is_significant,
    leading_metric,
    one_line,
    personal_gains,
    set_names,
    titled,
)
from personaplug.errors import MissingData, MissingExtra
from personaplug.infra.atomic_io import atomic_write
from personaplug.methods import control_of, is_control, is_rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _GRID = "#222222", "#6b6b6b", "#e3e3e3"
_PALE = "#d2d2d2"
_KINDS = {
    "no personalization": "#8c8c8c",
    "plug": "#0072b2",
    "items or profile in the prompt": "#e69f00",
    "weights of its own": "#009e73",
    "no language model": "#8c6d31",
    "control": _PALE,
    "other": "#cc79a7",
}
_BLUE = _KINDS["plug"]
_UNPERSONAL = ("plain", "instruction-only")
_LOOKS: dict[str, dict[str, Any]] = {
    "method": {"color": _BLUE, "marker": "o", "markersize": 5, "linewidth": 1.8, "shift": 0.0},
    "control": {"color": "#d55e00", "marker": "s", "markersize": 3.5, "linewidth": 1.2, "linestyle": "--"}
    | {"shift": 0.08},
    "reference": {"color": "#9a9a9a", "linewidth": 1.2, "linestyle": ":", "shift": -0.08},
}
_PANELS_A_ROW = 3


def scores_figure(results: Mapping[str, Any], metric: str, *, path: Path) -> None:
    """Write `draw_scores` as a PNG.

    Raises:
        MissingExtra: if matplotlib is not installed.
        MissingData: if no row has the metric.
        StorageError: if the file cannot be written.
    """
    _save(draw_scores(results, metric), path)


def gains_figure(results_list: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write `draw_gains` as a PNG.

    Raises:
        MissingExtra: if matplotlib is not installed.
        MissingData: if no results object has a personal gain.
        StorageError: if the file cannot be written.
    """
    _save(draw_gains(results_list), path)


def slices_figure(results: Mapping[str, Any], metric: str, *, path: Path) -> None:
    """Write `draw_slices` as a PNG.

    Raises:
        MissingExtra: if matplotlib is not installed.
        MissingData: if there are no slices with the metric.
        StorageError: if the file cannot be written.
    """
    _save(draw_slices(results, metric), path)


def draw_scores(results: Mapping[str, Any], metric: str) -> Figure:
    """Return horizontal bars of one metric, a bar per condition with its interval, each control below its method.

    Raises:
        MissingExtra: if matplotlib is not installed.
        MissingData: if no row has the metric.
    """
    rows = _with_controls_below([row for row in results.get("rows") or [] if metric in (row.get("metrics") or {})])
    if not rows:
        raise MissingData(f"No row of these results has the metric {metric!r}; there is nothing to draw.")
    figure = _new_figure(width=8.0, height=1.75 + 0.31 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        _bar(axes, row, metric=metric, place=place)
    names = [str(row.get("condition", "–")) for row in rows]
    _name_lines(axes, names)
    # Room for the numbers at the whiskers' ends.
    axes.set_xlim(left=0, right=max(_reach(row, metric) for row in rows) * 1.12 or 1)
    axes.set_xlabel(_directed(metric), color=_FAINT)
    axes.set_title(_plain(_about(results)), loc="left", color=_INK, fontsize=11, pad=10)
    _legend_of_kinds(figure, in_order(_kind(name) for name in names))
    return _dressed(figure)


def draw_gains(results_list: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the personal gain of each method with its interval in each set's leading metric, a panel per set.

    A point is filled where its p, corrected by Holm where that is given, is below .05.

    Raises:
        MissingExtra: if matplotlib is not installed.
        MissingData: if no results object has a personal gain.
    """
    named = zip(set_names(results_list), results_list, strict=True)
    panels = [(name, leading_metric(r) or "", personal_gains(r, leading_metric(r))) for name, r in named]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise MissingData("None of these results compares a method with its wrong-user control; nothing to draw.")
    methods = in_order(method for _, _, gains in panels for method in gains)
    across = min(_PANELS_A_ROW, len(panels))
    down = -(-len(panels) // across)
    figure = _new_figure(width=1.6 + 3.1 * max(across, 1.6), height=0.7 + down * (1.15 + 0.31 * len(methods)))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (name, metric, gains) in zip(grid.flat, panels, strict=False):
        for place, method in enumerate(methods):
            if method in gains:
                _point(axes, gains[method], place=place)
        axes.axvline(0, color=_INK, linewidth=1, zorder=1)
        axes.grid(axis="x", color=_GRID)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(_plain(name), loc="left", color=_INK, fontsize=10)
        axes.set_xlabel(_plain(f"advantage in {metric}"), color=_FAINT)
    for axes in grid[:, 0]:
        _name_lines(axes, methods)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle("Personal gain: own history against a stranger's", x=0.01, ha="left", color=_INK, fontsize=11)
    _legend_of_significance(figure)
    return _dressed(figure)


def draw_slices(results: Mapping[str, Any], metric: str) -> Figure:
    """Return one metric over the slices: a panel per method, its wrong-user control and instruction-only beside it.

    Where no row is of a method, each row has its panel; where instruction-only is absent, plain stands for it.

    Raises:
        MissingExtra: if matplotlib is not installed.
        MissingData: if there are no slices with the metric.
    """
    slices = results.get("slices") or []
    lines = _lines(slices, metric)
    if not lines:
        raise MissingData(f"These results have no slices with the metric {metric!r}; there is nothing to draw.")
    methods = [name for name in lines if not is_control(name) and name not in _UNPERSONAL] or list(lines)
    reference = next((name for name in reversed(_UNPERSONAL) if name in lines), None)
    across = min(4, len(methods))
    down = -(-len(methods) // across)
    figure = _new_figure(width=0.8 + 2.3 * max(across, 2), height=1.1 + 2.0 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, method in zip(grid.flat, methods, strict=False):
        for look, name in zip(_LOOKS.values(), (method, control_of(method), reference), strict=True):
            if name in lines:
                _line(axes, lines[name], metric=metric, look=look)
        axes.set_title(_plain(method), loc="left", color=_INK, fontsize=10)
        axes.grid(axis="y", color=_GRID)
    _name_slices(grid, names=[one_line(part.get("name", "–")) for part in slices], panels=len(methods))
    figure.supylabel(_directed(metric), color=_FAINT, fontsize=10)
    figure.suptitle(_plain(_about(results)), x=0.01, ha="left", color=_INK, fontsize=11)
    _legend_of_lines(figure, reference)
    return _dressed(figure)


def _lines(slices: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[int, Row]]:
    """The rows of each condition by their slices' places."""
    lines: dict[str, dict[int, Row]] = {}
    for place, part in enumerate(slices):
        for row in part.get("rows") or []:
            if is_finite((row.get("metrics") or {}).get(metric)):
                lines.setdefault(str(row.get("condition", "–")), {})[place] = row
    return lines


def _bar(axes: Axes, row: Row, *, metric: str, place: int) -> None:
    value = row["metrics"][metric]
    if not is_finite(value):
        axes.text(0, place, " nan" if value is None else f" {value}", va="center", color=_FAINT, fontsize=8)
        return
    axes.barh(place, value, height=0.68, color=_KINDS[_kind(str(row.get("condition", "–")))], zorder=2)
    ends = _ends((row.get("intervals") or {}).get(metric))
    if ends:
        # The white rim keeps the whisker apart from a dark bar.
        axes.hlines(place, *ends, color="white", linewidth=3, alpha=0.7, zorder=3)
        axes.hlines(place, *ends, color=_INK, linewidth=1.2, zorder=4)
    end = max(value, ends[1]) if ends else value
    axes.annotate(
        f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}",
        (end, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=_INK,
        fontsize=8,
    )


def _point(axes: Axes, pair: Row, *, place: int) -> None:
    if not is_finite(pair.get("difference")):
        return
    sure = is_significant(pair)
    colour = _BLUE if sure else _FAINT
    ends = _ends((pair.get("low"), pair.get("high")))
    if ends:
        axes.hlines(place, *ends, color=colour, linewidth=1.6, zorder=2)
    axes.plot(pair["difference"], place, "o", color=colour, markerfacecolor=colour if sure else "white", zorder=3)


def _line(axes: Axes, rows: Mapping[int, Row], *, metric: str, look: Mapping[str, Any]) -> None:
    """A line over the slices, a little beside the others, or their whiskers would cover one another."""
    drawn = {key: value for key, value in look.items() if key != "shift"}
    places = [place + look["shift"] for place in rows]
    axes.plot(places, [row["metrics"][metric] for row in rows.values()], zorder=3, **drawn)
    for place, row in zip(places, rows.values(), strict=True):
        ends = _ends((row.get("intervals") or {}).get(metric))
        if ends:
            axes.vlines(place, *ends, color=look["color"], linewidth=1, zorder=2)


def _method_of(name: str) -> str:
    """The method that a control belongs to."""
    return name.partition("@")[0] if "@" in name else "plug" if is_control(name) else name


def _with_controls_below(rows: Sequence[Row]) -> list[Row]:
    """The rows in their order, but each control below the method it tests, where that is there."""
    names = [str(row.get("condition", "–")) for row in rows]
    first = {name: place for place, name in reversed(list(enumerate(names)))}

    def place(index: int) -> tuple[int, bool, int]:
        return first.get(_method_of(names[index]), index), is_control(names[index]), index

    return [rows[index] for index in sorted(range(len(rows)), key=place)]


def _kind(name: str) -> str:
    """What a condition spends on a user, as the legend names it."""
    if is_control(name):
        return "control"
    if is_rule(name):
        return "no language model"
    if name in _UNPERSONAL:
        return "no personalization"
    if name.startswith("plug"):
        return "plug"
    if name.startswith("lora"):
        return "weights of its own"
    stems = ("bm25", "recency", "dense", "random", "ropg", "profile", "instruction+")
    return "items or profile in the prompt" if name.startswith(stems) else "other"


def _reach(row: Row, metric: str) -> float:
    ends = _ends((row.get("intervals") or {}).get(metric))
    known = [end for end in (row["metrics"][metric], *(ends or ())) if is_finite(end)]
    return float(max(known, default=0.0))


def _ends(interval: Sequence[Any] | None) -> tuple[float, float] | None:
    if not interval or not all(map(is_finite, interval)):
        return None
    low, high = interval
    return float(low), float(high)


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_FAINT if is_control(name) else _INK)
    axes.grid(axis="x", color=_GRID)


def _name_slices(grid: Any, *, names: Sequence[str], panels: int) -> None:
    """Slices below the lowest panel of each column; of "items=1", "items=5" the axis says "items" once."""
    keys = {name.partition("=")[0] for name in names}
    shared = keys.pop() if len(keys) == 1 and all("=" in name for name in names) else ""
    ticks = [_plain(name.partition("=")[2] if shared else name) for name in names]
    turned = {"rotation": 40, "ha": "right"} if sum(map(len, ticks)) > 24 else {}
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < panels)
        axes.set_xticks(range(len(ticks)), ticks, **turned)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        lowest = place + grid.shape[1] >= panels
        axes.tick_params(axis="x", labelbottom=lowest)
        axes.set_xlabel(_plain(shared) if lowest else "", color=_FAINT)


def _legend_of_kinds(figure: Figure, kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=kind) for kind, colour in _KINDS.items() if kind in kinds]
    _legend(figure, handles)


def _legend_of_lines(figure: Figure, reference: str | None) -> None:
    from matplotlib.lines import Line2D

    meanings = ("own history", "a stranger's history", reference)
    looks = [
        ({key: value for key, value in look.items() if key != "shift"}, meaning)
        for look, meaning in zip(_LOOKS.values(), meanings, strict=True)
    ]
    _legend(figure, [Line2D([], [], label=meaning, **look) for look, meaning in looks if meaning])


def _legend_of_significance(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    looks = [("p < .05 (Holm's where given)", _BLUE, _BLUE), ("p ≥ .05", _FAINT, "white")]
    _legend(figure, [Line2D([], [], marker="o", color=c, markerfacecolor=f, label=text) for text, c, f in looks])


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(
        handles=list(handles),
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        handlelength=1.8,
        columnspacing=1.4,
    )


def _about(results: Mapping[str, Any]) -> str:
    # "owner/name (weights …, width …)": the name is enough above a picture.
    model = str(results.get("model") or "").split(" (")[0].rpartition("/")[2]
    parts = (results.get("set") or results.get("task"), results.get("variant"), results.get("split"), model)
    return " · ".join(one_line(part) for part in parts if part)


def _directed(metric: str) -> str:
    direction = {"↑": ", higher is better", "↓": ", lower is better"}.get(titled(metric)[-1], "")
    return _plain(f"{metric}{direction}")


def _plain(text: str) -> str:
    """Text that matplotlib shows as it stands: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


def _new_figure(*, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra("figures", extra="report") from None
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _dressed(figure: Figure) -> Figure:
    """The figure without the frame and ticks that say nothing."""
    for axes in figure.axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_PALE)
        axes.tick_params(length=0, labelsize=9)
        axes.set_axisbelow(True)
    return figure


def _save(figure: Figure, path: Path) -> None:
    atomic_write(path, lambda attempt: figure.savefig(attempt, format="png", dpi=150))
