"""Results as figures: scores as bars, personal gains as points around zero, subgroups as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from personaplug.analysis.figures.style import (
    BLUE,
    FAMILIES,
    GRAY,
    GRID,
    INK,
    ORANGE,
    OTHER,
    PAPER,
    directed,
    family_style,
    figure_title,
    finished,
    literal,
    new_figure,
)
from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.rendering import one_line
from personaplug.analysis.results_file import Comparison, ResultRow, Results
from personaplug.analysis.tables import set_names
from personaplug.errors import MissingData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE_STYLES: list[dict[str, Any]] = [  # for a method, its wrong-user control and a row without history
    {"color": BLUE, "marker": "o", "markersize": 5, "linewidth": 1.8},
    {"color": ORANGE, "marker": "s", "markersize": 3.5, "linewidth": 1.2, "linestyle": "--"},
    {"color": "#9a9a9a", "linewidth": 1.2, "linestyle": ":"},
]
_SHIFTS = (0.0, 0.08, -0.08)  # along the axis, so that the whiskers of these lines do not overlap


def scores_figure(results: Results, metric: str) -> Figure:
    """Draw a horizontal bar with an interval for each row, each control below its method."""
    rows = _with_controls_below([row for row in results.rows if metric in row.metrics])
    if not rows:
        raise MissingData(f"No row of these results has the metric {metric!r}; there is nothing to draw.")
    figure = new_figure(8.0, 1.75 + 0.31 * len(rows))
    axes = figure.add_subplot()
    reach = [_bar(axes, row, metric=metric, position=position) for position, row in enumerate(rows)]
    _name_lines(axes, [row.method for row in rows])
    axes.set_xlim(left=0, right=max(reach) * 1.12 or 1)  # leaves space for the numbers behind the whiskers
    axes.set_xlabel(directed(metric), color=GRAY)
    axes.set_title(figure_title(results), loc="left", color=INK, fontsize=11, pad=10)
    row_styles = {family_style(row.method) for row in rows}
    legend = [style for style in [*FAMILIES.values(), OTHER] if style in row_styles]
    bar = {"linewidth": 7, "solid_capstyle": "butt"}
    return finished(figure, [{"label": label, "color": color, **bar} for label, color in legend])


def gains_figure(results_list: Sequence[Results]) -> Figure:
    """Draw the personal gain of each method in the leading metric, with its interval, in a panel for each set.

    A point is filled if Holm's p, or else p, is below .05.
    """
    named = zip(set_names(results_list), results_list, strict=True)
    panels = [(name, r, gains) for name, r in named if (gains := drawn_gains(r))]
    methods = {name: results.by_name[name].method for _, results, gains in panels for name in gains}
    if not methods:
        raise MissingData("No result compares a method with its wrong-user control; there is nothing to draw.")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure(1.6 + 3.1 * max(across, 1.6), 0.7 + down * (1.15 + 0.31 * len(methods)))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (name, results, gains) in zip(grid.flat, panels, strict=False):
        for position, pair in enumerate(map(gains.get, methods)):
            if pair:
                _point(axes, pair, position=position)
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(literal(name), loc="left", color=INK, fontsize=10)
        axes.set_xlabel(literal(f"advantage in {results.leading_metric}"), color=GRAY)
        axes.grid(axis="x", color=GRID)
    for axes in grid[:, 0]:
        _name_lines(axes, list(methods.values()))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle("Personal gain: own history against another user's", x=0.01, ha="left", color=INK, fontsize=11)
    significant = {"label": "p < .05 (Holm p if given)", "color": BLUE, "marker": "o"}
    not_significant = {"label": "p ≥ .05", "color": GRAY, "marker": "o", "markerfacecolor": PAPER}
    return finished(figure, [significant, not_significant])


def drawn_gains(results: Results) -> dict[str, Comparison]:
    """Return the personal gains in the leading metric, without the oracle's, which would hide small ones."""
    gains = results.personal_gains(results.leading_metric)
    return {name: pair for name, pair in gains.items() if results.by_name[name].method.family != "oracle"}


def subgroups_figure(results: Results, metric: str) -> Figure:
    """Draw one metric over the subgroups, in a panel per method, with its wrong-user control and a base.

    The base is a row without personalization, a trained row if there is one. If no row personalizes, each row has a
    panel.
    """
    infos = {row.name: row.method for part in results.subgroups for row in part.rows if _is_drawn(row, metric)}
    if not infos:
        raise MissingData(f"These results have no subgroups with the metric {metric!r}; there is nothing to draw.")
    rows = sorted(infos.values(), key=lambda info: info.is_seeded)
    base = [info.name for info in rows if info.family == "none" and not info.is_control][-1:]
    methods = [info.name for info in infos.values() if not info.is_control and info.family != "none"] or list(infos)
    controls = {info.gain_of: info.name for info in infos.values()}
    across = min(4, len(methods))
    down = math.ceil(len(methods) / across)
    figure = new_figure(0.8 + 2.3 * max(across, 2), 1.1 + 2.0 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, method in zip(grid.flat, methods, strict=False):
        names = (method, controls.get(method, ""), *base)
        for name, style, shift in zip(names, _LINE_STYLES, _SHIFTS, strict=False):
            rows_at = {index + shift: part.by_name.get(name) for index, part in enumerate(results.subgroups)}
            points = {position: row for position, row in rows_at.items() if row and _is_drawn(row, metric)}
            _line(axes, points, metric=metric, style=style)
        axes.set_title(literal(method), loc="left", color=INK, fontsize=10)
        axes.grid(axis="y", color=GRID)
    _name_subgroups(grid, [one_line(part.name) for part in results.subgroups], panels=len(methods))
    figure.supylabel(directed(metric), color=GRAY, fontsize=10)
    figure.suptitle(figure_title(results), x=0.01, ha="left", color=INK, fontsize=11)
    labels = ["own history", "another user's history", *base]
    return finished(figure, [{"label": label, **style} for label, style in zip(labels, _LINE_STYLES, strict=False)])


def _is_drawn(row: ResultRow, metric: str) -> bool:
    return math.isfinite(row.metrics.get(metric, math.nan))


def _bar(axes: Axes, row: ResultRow, *, metric: str, position: int) -> float:
    """Draw a bar with its whisker and number; return the position of the right end."""
    value = row.metrics[metric]
    if not math.isfinite(value):
        axes.text(0, position, f" {value}", va="center", color=GRAY, fontsize=8)
        return 0.0
    axes.barh(position, value, height=0.68, color=family_style(row.method)[1], zorder=2)
    if ends := row.interval(metric):
        # The white rim makes the whisker visible on a dark bar.
        axes.hlines(position, *ends, color=PAPER, linewidth=3, alpha=0.7, zorder=3)
        axes.hlines(position, *ends, color=INK, linewidth=1.2, zorder=4)
    reach = max([value, *(ends or ())])
    text = f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"
    offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (reach, position), color=INK, fontsize=8, **offset)
    return float(reach)


def _point(axes: Axes, pair: Comparison, *, position: int) -> None:
    if not math.isfinite(pair.difference):
        return
    color, fill = (BLUE, BLUE) if pair.is_significant else (GRAY, PAPER)
    if pair.low is not None and pair.high is not None:
        axes.hlines(position, pair.low, pair.high, color=color, linewidth=1.6, zorder=2)
    axes.plot(pair.difference, position, "o", color=color, markerfacecolor=fill, zorder=3)


def _line(axes: Axes, rows: dict[float, ResultRow], *, metric: str, style: dict[str, Any]) -> None:
    if rows:
        axes.plot(list(rows), [row.metrics[metric] for row in rows.values()], zorder=3, **style)
    for position, row in rows.items():
        if ends := row.interval(metric):
            axes.vlines(position, *ends, color=style["color"], linewidth=1, zorder=2)


def _with_controls_below(rows: Sequence[ResultRow]) -> list[ResultRow]:
    index_of = {row.name: index for index, row in enumerate(rows)}
    position = {row.name: index_of.get(row.method.control_of or "", index_of[row.name]) for row in rows}
    return sorted(rows, key=lambda row: (position[row.name], row.method.is_control))


def _name_lines(axes: Axes, methods: Sequence[MethodInfo]) -> None:
    axes.set_yticks(range(len(methods)), [literal(method.name) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)  # the first on top
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_color(GRAY if method.is_control else INK)
    axes.grid(axis="x", color=GRID)


def _name_subgroups(grid: Any, names: Sequence[str], *, panels: int) -> None:
    """Name the subgroups below the lowest panel of each column.

    If the names are "items=1", "items=5", the ticks have the numbers, and the axis has the title "items".
    """
    keys = {name.partition("=")[0] for name in names}
    shared = keys.pop() if len(keys) == 1 and all("=" in name for name in names) else ""
    ticks = [literal(name.partition("=")[2] if shared else name) for name in names]
    rotation = {"rotation": 40, "ha": "right"} if sum(map(len, ticks)) > 24 else {}
    for index, axes in enumerate(grid.flat):
        is_lowest = index + grid.shape[1] >= panels
        axes.set_visible(index < panels)
        axes.set_xticks(range(len(ticks)), ticks, **rotation)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.tick_params(axis="x", labelbottom=is_lowest)
        axes.set_xlabel(literal(shared) if is_lowest else "", color=GRAY)
