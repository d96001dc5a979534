"""Figures of one set: the main row beside its controls and rivals, costs against scores, user by user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from personaplug.analysis.figures.style import (
    BLUE,
    GRAY,
    GRID,
    INK,
    ORANGE,
    PAPER,
    directed,
    family_style,
    finished,
    literal,
    new_figure,
)
from personaplug.analysis.metrics import Array, metric_class
from personaplug.analysis.results_file import Comparison, ResultRow, Results
from personaplug.analysis.tables import difference_cell, number_cell, score_cell
from personaplug.analysis.user_scores import UserScores
from personaplug.analysis.verdict import (
    COSTLY_RIVAL,
    NO_HISTORY,
    OWN,
    RIVAL,
    STRANGER,
    ranked_rows,
    rows_of_verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Box = tuple[float, float, float, float]  # left, bottom, right, top: shares of the axes
Cost = Literal["extra_prompt_tokens", "bytes_per_user"]
COST_TITLES: dict[Cost, str] = {
    "extra_prompt_tokens": "extra prompt tokens",
    "bytes_per_user": "bytes kept for each user",
}
_ROLE_COLORS = {OWN: BLUE, STRANGER: ORANGE, NO_HISTORY: "#8c8c8c", RIVAL: "#8c6d31", COSTLY_RIVAL: "#8c6d31"}
_ABOVE: dict[str, Any] = {  # a label above a point
    "xytext": (0, 6),
    "textcoords": "offset points",
    "ha": "center",
    "fontsize": 8.5,
    "color": INK,
}
_WIDTH = 4.8  # inches; text stays legible on a phone
_FAR = 3.0  # the worst row is off the scale if the range of scores shrinks by this factor without it
_MIN_SHOWN = 4  # rows that are never off the scale
_LETTER, _LINE, _DOT = 0.0185, 0.05, 0.017  # a letter's width, a line's height, a point's radius: shares of the axes
_CELLS = 80  # users whose scores fall into one of 80 × 80 cells share a point


def forest_rows(results: Results, metric: str) -> dict[str, ResultRow]:
    """Return the rows of the verdict with a finite score; none without the main row and a row to compare it with."""
    rows = rows_of_verdict(results)
    finite = {role: row for role, row in rows.items() if math.isfinite(row.metrics.get(metric, math.nan))}
    return finite if OWN in finite and len(finite) > 1 else {}


def forest_figure(results: Results, metric: str, *, title: str) -> Figure:
    """Draw the score of each of the `forest_rows` with its interval, and a rule at the score of the main row."""
    rows = forest_rows(results, metric)
    figure = new_figure(_WIDTH, 1.1 + 0.52 * len(rows))
    axes = figure.add_subplot()
    for place, (role, row) in enumerate(rows.items()):
        _forest_line(axes, row, metric=metric, place=place, color=_ROLE_COLORS[role])
    axes.axvline(rows[OWN].metrics[metric], color=BLUE, linewidth=0.8, linestyle=":", zorder=1)
    names = [f"{role}\n{literal(row.name)}" for role, row in rows.items()]
    axes.set_yticks(range(len(rows)), names, color=INK)
    axes.set_ylim(len(rows) - 0.45, -0.75)
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.2)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel(directed(metric), color=GRAY)
    axes.set_title(literal(title), loc="left", color=INK, fontsize=10)
    return finished(figure, [])


def advantages(results: Results, metric: str) -> dict[str, Comparison]:
    """Return the paired comparisons of the main row with the other `forest_rows`, by their roles."""
    rows = forest_rows(results, metric)
    pairs = {role: results.comparison(rows[OWN].name, row.name, metric) for role, row in rows.items() if role != OWN}
    return {role: pair for role, pair in pairs.items() if pair is not None and math.isfinite(pair.difference)}


def advantages_figure(results: Results, metric: str, *, title: str) -> Figure:
    """Draw the paired `advantages` of the main row with their intervals, and a rule at zero."""
    pairs = advantages(results, metric)
    figure = new_figure(_WIDTH, 1.1 + 0.52 * len(pairs))
    axes = figure.add_subplot()
    for place, (role, pair) in enumerate(pairs.items()):
        if pair.low is not None and pair.high is not None:
            axes.hlines(place, pair.low, pair.high, color=_ROLE_COLORS[role], linewidth=2.2, zorder=2)
        look: dict[str, Any] = {"markersize": 7, "markeredgecolor": _ROLE_COLORS[role], "zorder": 3}
        axes.plot(pair.difference, place, "o", color=_ROLE_COLORS[role] if pair.is_significant else PAPER, **look)
        axes.annotate(difference_cell(pair), (pair.difference, place), **_ABOVE)
    axes.axvline(0, color=GRAY, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(pairs)), [f"over {role}\n{literal(p.b)}" for role, p in pairs.items()], color=INK)
    axes.set_ylim(len(pairs) - 0.45, -0.75)
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.45)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel(f"advantage in {metric}", color=GRAY)
    axes.set_title(literal(title), loc="left", color=INK, fontsize=10)
    return finished(figure, [])


def cost_rows(results: Results, metric: str, cost: Cost) -> list[ResultRow]:
    """Return the rows with a finite score and a finite cost; none if fewer than two costs differ."""
    rows = [row for row in results.rows if math.isfinite(row.metrics.get(metric, math.nan))]
    costs = {row.name: getattr(row.diagnostics, cost) for row in rows}
    rows = [row for row in rows if costs[row.name] is not None and math.isfinite(costs[row.name])]
    return rows if len({costs[row.name] for row in rows if not row.method.is_control}) > 1 else []


def cost_figure(results: Results, metric: str, cost: Cost, *, title: str) -> Figure:
    """Draw each row's score over a cost, and a rule at the best row without a language model.

    A row that is much worse than the others is named at the edge. Controls are pale and have no names.
    """
    rows = cost_rows(results, metric, cost)
    costs = [float(getattr(row.diagnostics, cost)) for row in rows]
    rule = next((row for row in ranked_rows(results, metric) if not row.method.has_language_model), None)
    kind = metric_class(metric)
    is_error = kind is not None and not kind.greater_is_better
    scores = [row.metrics[metric] for row in [*rows, *([rule] if rule else [])]]
    figure = new_figure(_WIDTH, 3.6)
    axes = figure.add_subplot()
    _scale_costs(axes, max(costs))
    axes.set_ylim(*_range_without_outliers(scores, worst_is_high=is_error))
    names = [_cost_point(axes, row, value, metric=metric) for row, value in zip(rows, costs, strict=True)]
    _label_points(axes, [name for name in names if name])
    if rule is not None:
        _rule(axes, rule, metric=metric)
    axes.grid(color=GRID)
    axes.set_xlabel(COST_TITLES[cost], color=GRAY)
    axes.set_ylabel(directed(metric), color=GRAY)
    axes.set_title(literal(title), loc="left", color=INK, fontsize=10, pad=14)
    return finished(figure, [])


def users_figure(scores: UserScores, *, title: str, linked: Sequence[int] = (), anchor: str = "") -> Figure:
    """Draw each user's score with the own history over the score with a stranger's.

    Args:
        linked: indices of the users whose points have numbers and are links.
        anchor: the target of a link, without the user's number.
    """
    own, stranger = scores.scores[scores.metric].T
    is_finite = np.isfinite(own) & np.isfinite(stranger)
    low, high = _padded(np.concatenate([own[is_finite], stranger[is_finite]]))
    figure = new_figure(_WIDTH, 4.5)
    axes = figure.add_subplot()
    axes.plot([low, high], [low, high], color=GRAY, linewidth=1, zorder=1)
    for members in _shared_points(own, stranger, where=is_finite, size=(high - low) / _CELLS):
        gain = scores.gains[members[0]]
        color = BLUE if gain > 0 else ORANGE if gain < 0 else "#8c8c8c"
        shown = [index for index in linked if index in members]
        look: dict[str, Any] = {"s": 14 + 7 * len(members), "color": color, "alpha": 0.55, "linewidths": 0, "zorder": 2}
        if shown:
            look |= {"alpha": 0.95, "edgecolors": INK, "linewidths": 0.8, "zorder": 4}
        points = axes.scatter([stranger[members[0]]], [own[members[0]]], **look)
        if shown:
            points.set_urls([f"#{anchor}{scores.numbers[shown[0]]}"])
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.grid(color=GRID)
    axes.locator_params(nbins=6)
    axes.set_xlabel(literal(f"{scores.metric} with a stranger's history"), color=GRAY)
    axes.set_ylabel(literal(f"{scores.metric} with the own history"), color=GRAY)
    axes.set_title(literal(title), loc="left", color=INK, fontsize=10)
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5}
    labels = (("better with the own history", BLUE), ("worse", ORANGE), ("equal", "#8c8c8c"))
    return finished(figure, [{"label": label, "color": color, **dot} for label, color in labels])


def _forest_line(axes: Axes, row: ResultRow, *, metric: str, place: int, color: str) -> None:
    value = row.metrics[metric]
    if ends := row.interval(metric):
        axes.hlines(place, *ends, color=color, linewidth=2.2, zorder=2)
    axes.plot(value, place, "o", color=color, markersize=7, markeredgecolor=PAPER, zorder=3)
    axes.annotate(score_cell(row, metric) or "", (value, place), **_ABOVE)


def _cost_point(axes: Axes, row: ResultRow, cost: float, *, metric: str) -> tuple[float, float, str] | None:
    """Draw a row's point; return its place and name, or None for a control."""
    score, is_control, (low, high) = row.metrics[metric], row.method.is_control, axes.get_ylim()
    height = min(max(score, low), high)
    marker = "o" if height == score else "^" if score > high else "v"
    look: dict[str, Any] = {"s": 42, "color": family_style(row.method)[1], "zorder": 3}
    look |= {"s": 16, "zorder": 2} if is_control else {}
    axes.scatter(cost, height, marker=marker, clip_on=False, **look)
    off_scale = "" if height == score else f" ({number_cell(score)}, off the scale)"
    return None if is_control else (cost, height, literal(row.name) + off_scale)


def _rule(axes: Axes, row: ResultRow, *, metric: str) -> None:
    score, color = row.metrics[metric], _ROLE_COLORS[RIVAL]
    axes.axhline(score, color=color, linewidth=1, linestyle="--", zorder=1)
    place: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "fontsize": 8.5}
    axes.annotate(literal(f"{row.name}, no language model"), (axes.get_xlim()[1], score), color=color, **place)


def _range_without_outliers(scores: Sequence[float], *, worst_is_high: bool) -> tuple[float, float]:
    """Return padded limits of the scores, without the worst ones if these are far from the others."""
    kept = sorted(scores, reverse=not worst_is_high)
    while len(kept) > _MIN_SHOWN and abs(kept[-1] - kept[0]) > _FAR * abs(kept[-2] - kept[0]):
        kept.pop()
    return _padded(np.asarray(kept))


def _padded(values: Array) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    margin = (high - low) * 0.08 or 0.05
    return low - margin, high + margin


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Name points in the nearest place where a name hides no point and no other name; a line leads to a far name."""
    to_share = axes.transData + axes.transAxes.inverted()
    centers = [tuple(map(float, to_share.transform((x, y)))) for x, y, _ in points]
    dots: list[_Box] = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in centers]
    names: list[_Box] = []
    for (x, y), (*_, name) in zip(centers, points, strict=True):
        boxes = [box for box in _places(x, y, width=_LETTER * len(name)) if not _meets(box, [*dots, *names])]
        box = boxes[0] if boxes else next(_places(x, y, width=_LETTER * len(name)))
        names.append(box)
        middle, is_left = (box[1] + box[3]) / 2, box[0] < x
        look: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": 8.5, "zorder": 5}
        if abs(middle - y) > _LINE:
            look["arrowprops"] = {"arrowstyle": "-", "color": GRAY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        text_at = (box[2] if is_left else box[0], middle)
        look |= {"ha": "right" if is_left else "left", "annotation_clip": False}
        axes.annotate(name, (x, y), xycoords="axes fraction", xytext=text_at, color=INK, **look)


def _places(x: float, y: float, *, width: float) -> Iterator[_Box]:
    """Yield boxes for a name of a point, the nearest first, as shares of the axes."""
    for shift in (step * sign * 0.05 for step in range(9) for sign in ((1, -1) if step else (1,))):
        for left in (x + 0.022, x - 0.022 - width):
            if left >= -0.01 and left + width <= 1.05 and (not shift or 0 <= y + shift <= 1.02):
                yield (left, y + shift - _LINE / 2, left + width, y + shift + _LINE / 2)
    yield (x + 0.022, y - _LINE / 2, x + 0.022 + width, y + _LINE / 2)


def _meets(box: _Box, others: Sequence[_Box]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def _scale_costs(axes: Axes, highest: float) -> None:
    """Give an axis for costs from 0 on: linear up to 1, then logarithmic, with at most five ticks."""
    from matplotlib.ticker import NullLocator

    end = max(highest, 1) * 4
    powers = range(math.floor(math.log10(end)) + 1)
    step = math.ceil(len(powers) / 4)
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xticks([0, *(10.0**power for power in powers[(len(powers) - 1) % step :: step])])
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.35, end)


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _shared_points(own: Array, stranger: Array, *, where: Array, size: float) -> Iterator[list[int]]:
    """Yield the indices of the users in each cell of the plane, those with the fewest users last."""
    cells: dict[tuple[int, int, int], list[int]] = {}
    for index in np.flatnonzero(where):
        side = int(np.sign(own[index] - stranger[index]))
        cells.setdefault((round(own[index] / size), round(stranger[index] / size), side), []).append(int(index))
    yield from sorted(cells.values(), key=len, reverse=True)
