"""The figures of a report: which figures the results allow, their files, their alternative texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from personaplug.analysis.figures.of_set import (
    COST_TITLES,
    Cost,
    advantages,
    advantages_figure,
    cost_figure,
    cost_rows,
    forest_figure,
    forest_rows,
    users_figure,
)
from personaplug.analysis.figures.overview import drawn_gains, gains_figure, scores_figure, subgroups_figure
from personaplug.analysis.figures.svg import inline_svg
from personaplug.analysis.metrics import metric_class
from personaplug.analysis.rendering import Column, Entry, Picture, Table
from personaplug.analysis.results_file import Results, Subgroup
from personaplug.analysis.tables import bytes_cell, gain_cell, metric_title, number_cell
from personaplug.analysis.user_scores import UserScores
from personaplug.infra.atomic_io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LISTED_USERS = 5  # who gain most, and as many who lose most
_NARROW = 6.0  # inches; a wider figure has a line of its own
_ITEMS = "items"


@dataclass(frozen=True)
class ReportSet:
    """One results file of a report.

    Attributes:
        number: position in the report, from 1.
        name: unique name.
        scores: the users' scores; None if unknown.
        problem: why these are unknown although there is a file of trials; "" if no reason is needed.
    """

    number: int
    name: str
    results: Results
    scores: UserScores | None = None
    problem: str = ""

    @property
    def anchor(self) -> str:
        """The target of links to the set."""
        return f"set-{self.number}"

    @property
    def user_anchor(self) -> str:
        """The target of links to a user of the set, without the user's number."""
        return f"{self.anchor}-user-"


@dataclass(frozen=True)
class SetPictures:
    """The pictures of a set: those that are shown at once, and those of each table, by its title."""

    shown: list[Picture] = field(default_factory=list)
    folded: dict[str, list[Picture]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """The pictures of a report."""

    overview: list[Picture] = field(default_factory=list)
    of_sets: dict[int, SetPictures] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """The files of all pictures, relative to the page."""
        pictures = list(self.overview)
        for of_set in self.of_sets.values():
            pictures += [*of_set.shown, *(picture for several in of_set.folded.values() for picture in several)]
        return [picture.path for picture in pictures]


def draw_figures(sets: Sequence[ReportSet], out: Path) -> Figures:
    """Draw all figures that the results allow, write them as PNG into a folder, and return them with their SVG.

    Raises MissingExtra without matplotlib.
    """
    figures = Figures()
    results_list = [each.results for each in sets]
    if len(sets) > 1 and any(map(drawn_gains, results_list)):
        picture = Picture("figures/gains.png", f"Personal gain of each method in {', '.join(e.name for e in sets)}")
        figures.overview.append(_saved(picture, gains_figure(results_list), out=out))
    for each in sets:
        if each.results.leading_metric:
            figures.of_sets[each.number] = _of_set(each, out)
    return figures


def user_entries(each: ReportSet) -> list[Entry]:
    """Return an entry for each user who gains or loses most by the own history."""
    scores = each.scores
    return [] if scores is None else [_entry(each, scores, index) for index in scores.extremes(_LISTED_USERS)]


def _of_set(each: ReportSet, out: Path) -> SetPictures:
    pictures = SetPictures()
    for place, picture, figure in _drawn(each):
        saved = _saved(picture, figure, out=out)
        if place:
            pictures.folded.setdefault(place, []).append(saved)
        else:
            pictures.shown.append(saved)
    return pictures


def _saved(picture: Picture, figure: Figure, *, out: Path) -> Picture:
    atomic_write(out / picture.path, partial(figure.savefig, format="png", dpi=150))
    key = re.sub("[^a-z0-9]+", "-", Path(picture.path).stem.lower()).strip("-")
    svg = inline_svg(figure, key=f"figure-{key}", text=picture.text, links=picture.links)
    return replace(picture, svg=svg, is_wide=figure.get_size_inches()[0] > _NARROW)


def _drawn(each: ReportSet) -> Iterator[tuple[str, Picture, Figure]]:
    """Yield the title of the table that a figure belongs to, or "", with the figure."""
    results, metric = each.results, each.results.leading_metric
    stem = f"figures/{each.number}-{re.sub('[^A-Za-z0-9_]+', '-', each.name).strip('-')}"
    if forest_rows(results, metric):
        title = f"{each.name}: what the own history gives"
        yield "", _forest_picture(each, f"{stem}-verdict.png"), forest_figure(results, metric, title=title)
    if advantages(results, metric):
        title = f"{each.name}: advantage of the own history"
        yield "", _advantages_picture(each, f"{stem}-advantages.png"), advantages_figure(results, metric, title=title)
    for cost in COST_TITLES:
        if cost_rows(results, metric, cost):
            picture = _cost_picture(each, cost, f"{stem}-{cost.split('_')[0]}.png")
            yield "", picture, cost_figure(results, metric, cost, title=f"{each.name}: {metric} by {COST_TITLES[cost]}")
    if each.scores:
        yield "", _users_picture(each, each.scores, f"{stem}-users.png"), _users_figure(each, each.scores)
    for key, subgroups in _by_key([part for part in results.subgroups if metric in part.metric_names]).items():
        figure = subgroups_figure(replace(results, subgroups=subgroups), metric)
        place = "" if key == _ITEMS else f"{metric_title(metric)} by subgroup"
        yield place, _subgroups_picture(each, subgroups, key=key, path=f"{stem}-{key or 'subgroups'}.png"), figure
    if any(metric in row.metrics for row in results.rows):
        picture = Picture(f"{stem}-scores.png", f"{metric} of each method of {each.name}, as in the table of scores")
        yield "Scores", picture, scores_figure(results, metric)


def _by_key(subgroups: Sequence[Subgroup]) -> dict[str, list[Subgroup]]:
    """Group "items=1", "items=5", "persona_scale=2" by the text before "="; other subgroups have the key ""."""
    groups: dict[str, list[Subgroup]] = {}
    for part in subgroups:
        key, equals, _ = part.name.partition("=")
        groups.setdefault(key if equals and re.fullmatch("[A-Za-z0-9_]+", key) else "", []).append(part)
    return groups


def _forest_picture(each: ReportSet, path: str) -> Picture:
    metric = each.results.leading_metric
    scores = [
        f"{role} {number_cell(row.metrics[metric])} ({row.name})"
        for role, row in forest_rows(each.results, metric).items()
    ]
    return Picture(
        path,
        f"{each.name}, {_directed(metric)}: {', '.join(scores)}",
        caption="Lines are 95 % intervals from a bootstrap over users.",
    )


def _advantages_picture(each: ReportSet, path: str) -> Picture:
    metric = each.results.leading_metric
    gains = [f"over {role} ({pair.b}) {gain_cell(pair)}" for role, pair in advantages(each.results, metric).items()]
    caption = "Paired differences with 95 % intervals. Right of 0, the own history is better. Hollow: p is .05 or more."
    return Picture(path, f"{each.name}, advantage in {metric}: {', '.join(gains)}", caption=caption)


def _cost_picture(each: ReportSet, cost: Cost, path: str) -> Picture:
    metric = each.results.leading_metric
    rows = [row for row in cost_rows(each.results, metric, cost) if not row.method.is_control]
    to_text = bytes_cell if cost == "bytes_per_user" else "{:,.0f}".format
    points = [f"{r.name} {number_cell(r.metrics[metric])} at {to_text(getattr(r.diagnostics, cost))}" for r in rows]
    return Picture(
        path,
        f"{each.name}, {_directed(metric)}, by {COST_TITLES[cost]}: {', '.join(points)}",
        caption="Cost against quality. Pale points are controls, with the history of another user.",
    )


def _users_figure(each: ReportSet, scores: UserScores) -> Figure:
    title = f"{each.name}: {len(scores.numbers)} users, one by one"
    return users_figure(scores, title=title, linked=scores.extremes(_LISTED_USERS), anchor=each.user_anchor)


def _users_picture(each: ReportSet, scores: UserScores, path: str) -> Picture:
    better, worse, equal = scores.counts
    side = "above" if scores.higher_is_better[scores.metric] else "below"
    return Picture(
        path,
        f"{each.name}, user by user: {better} score better with the own history than with a stranger's, "
        f"{worse} worse, {equal} the same in {scores.metric}",
        caption=f"Users {side} the diagonal score better with the own history: {better} of {len(scores.numbers)}; "
        f"{worse} score worse, {equal} the same. A larger point stands for several users. "
        "An outlined point opens its user below.",
        links={f"#{entry.anchor}": entry.title for entry in user_entries(each)},
    )


def _subgroups_picture(each: ReportSet, subgroups: Sequence[Subgroup], *, key: str, path: str) -> Picture:
    metric = each.results.leading_metric
    if key != _ITEMS:
        return Picture(path, f"{metric} of {each.name} by {key or 'subgroup'}")
    gains = [part.personal_gains(metric) for part in subgroups]
    name = next((name for of_part in gains for name in of_part), "")
    cells = [f"{part.name.partition('=')[2]} items {gain_cell(of[name])}"
             for part, of in zip(subgroups, gains, strict=True) if name in of]  # fmt: skip
    gained = f": personal gain with {'; '.join(cells)}" if cells else ""
    return Picture(
        path,
        f"Cold start of {each.name}, {_directed(metric)}{gained}",
        caption="Cold start: the score by the number of history items that a user has.",
    )


def _entry(each: ReportSet, scores: UserScores, index: int) -> Entry:
    own, stranger = scores.scores[scores.metric][index]
    gain, number = scores.gains[index], int(scores.numbers[index])
    samples = int(scores.samples[index])
    names = list(scores.scores)
    columns: list[Column] = [("metric", [metric_title(name) for name in names])]
    for side, title in enumerate(("own history", "a stranger's history")):
        columns.append((title, [number_cell(float(scores.scores[name][index, side])) for name in names]))
    return Entry(
        f"{each.user_anchor}{number}",
        f"User {number} {'gains' if gain > 0 else 'loses'} {number_cell(abs(float(gain)))}: {scores.metric} "
        f"{number_cell(float(own))} against {number_cell(float(stranger))} with a stranger's history",
        f"{samples} {'sample' if samples == 1 else 'samples'}, "
        f"{number_cell(float(scores.history_items[index]), ',.1f').removesuffix('.0')} items of history.",
        Table.from_columns(columns),
    )


def _directed(metric: str) -> str:
    kind = metric_class(metric)
    return metric if kind is None else f"{metric} ({'higher' if kind.greater_is_better else 'lower'} is better)"
