"""Reports: results files as one Markdown and one HTML page with the same tables and figures, or a piece of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from personaplug.analysis.figures import gains_figure, scores_figure, subgroups_figure
from personaplug.analysis.likelihood_metrics import NegativeLogLikelihood
from personaplug.analysis.rendering import ABSENT, Column, Picture, Section, Table, to_html, to_markdown
from personaplug.analysis.results_file import Results, load_results
from personaplug.analysis.tables import (
    cost_columns,
    gain_cell,
    head,
    metric_title,
    notes,
    score_cell,
    set_names,
    tables,
)
from personaplug.analysis.trials import Diagnostics
from personaplug.analysis.verdict import clear_best, verdict
from personaplug.errors import ConfigError, MissingData, RecordError
from personaplug.infra.atomic_io import atomic_write, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCORES_TEXT = (
    "The first metric of each set, with its interval. A best score is bold only where it is significantly better than "
    "the second best; controls do not compete."
)
_GAINS_TEXT = (
    "What a user's own history gains over a stranger's; positive is better, whatever the metric's direction. Holm p, "
    "where it stands, is corrected for the number of personal gains in its set; p is not. A personal row is missing "
    "here where its control, ROW@wrong-user, was not run."
)
_LIKELIHOOD_TEXT = (
    "The same in the log-likelihood of the right answer, in nats per token (per answer of a closed set): how much "
    "likelier it is with the user's own history than with a stranger's."
)


def write_report(
    results_files: Sequence[Path], out: Path, *, title: str = "Results", with_figures: bool = True
) -> list[Path]:
    """Write a folder with `report.md`, `report.html` and, under `figures/`, PNGs; return the files written.

    The report of several files, one per set, begins with an overview of the sets side by side. Nothing is written if
    figures are wanted and matplotlib is not installed.
    """
    if not results_files:
        raise MissingData("A report needs at least one results file; `personaplug evaluate --json FILE` writes them.")
    results_list = [load_results(path) for path in results_files]
    figures = _figures(results_list) if with_figures else {}
    for picture, figure in chain(*figures.values()):
        atomic_write(out / picture.path, partial(figure.savefig, format="png", dpi=150))
    pictures = {name: [picture for picture, _ in pairs] for name, pairs in figures.items()}
    sections = [Section(title, level=1), *_page(results_list, pictures)]
    write_text(out / "report.md", to_markdown(sections) + "\n")
    write_text(out / "report.html", to_html(sections, title=title))
    return [out / "report.md", out / "report.html", *(out / picture.path for picture in chain(*pictures.values()))]


def overview_markdown(results_list: Sequence[Results]) -> str:
    """Return several sets side by side as Markdown: scores, personal gains, costs."""
    return to_markdown(list(_overview(results_list)))


def insert_between(path: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- begin NAME -->` and `<!-- end NAME -->` in a Markdown file."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if not path.is_file():
        raise MissingData(f"There is no file {path} to insert {name!r} into.")
    page = path.read_bytes().decode("utf-8")  # with its own line ends
    counts = page.count(begin), page.count(end)
    if counts != (1, 1) or page.index(begin) > page.index(end):
        raise RecordError(
            path,
            f"the markers of {name!r}",
            reason=f"expected {begin} once and {end} once below it; found {counts[0]} and {counts[1]}"
            f"{', in the wrong order' if counts == (1, 1) else ''}. Put both around the place for the text.",
        )
    if begin in text or end in text:  # the next call could not find the end
        raise ConfigError(f"The text for {name!r} holds one of its own markers, {begin} or {end}; leave them out.")
    before, after = page.split(begin)[0], page.split(end)[1]
    write_text(path, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def _page(results_list: Sequence[Results], pictures: dict[str, list[Picture]]) -> Iterator[Section]:
    if len(results_list) > 1:
        yield Section("Overview", level=2)
        yield from _overview(results_list)
    yield Section(pictures=pictures.get("", ()))
    for name, results in zip(set_names(results_list), results_list, strict=True):
        facts, models = head(results)
        yield Section(name, level=2, text=facts, bullets=models, pictures=pictures.get(name, ()))
        if sentences := verdict(results):
            yield Section("Verdict", bullets=sentences)
        for title, table in tables(results):
            yield Section(title or "Scores", table=table)
        yield Section(bullets=notes(results))


def _overview(results_list: Sequence[Results]) -> Iterator[Section]:
    methods = {row.name: row.method for results in results_list for row in results.rows}
    names = list(methods)
    yield Section("Scores", text=_SCORES_TEXT, table=_score_table(results_list, names))
    leading = [results.leading_metric for results in results_list]
    for title, text, metrics in (
        ("Personal gains", _GAINS_TEXT, leading),
        ("Personal gains in likelihood", _LIKELIHOOD_TEXT, [NegativeLogLikelihood.name] * len(leading)),
    ):
        gains = _gain_table(results_list, names, metrics)
        if gains.lines:
            yield Section(title, text=text, table=gains)
    names = [name for name, method in methods.items() if not method.is_control]  # a control costs what its method does
    costs = [Diagnostics.mean_of([r.by_name[n].diagnostics for r in results_list if n in r.by_name]) for n in names]
    table = Table.from_columns([("method", names), *cost_columns(costs)])
    if len(table.titles) > 1:
        scope = ", mean over the sets" if len(results_list) > 1 else ""
        yield Section("Costs", text=f"Beyond the plain model{scope}.", table=table)


def _score_table(results_list: Sequence[Results], names: Sequence[str]) -> Table:
    metrics = [results.leading_metric for results in results_list]
    titles = [f"{n}: {metric_title(m or ABSENT)}" for n, m in zip(set_names(results_list), metrics, strict=True)]
    lines = [
        (name, *(score_cell(r.by_name.get(name), metric) for r, metric in zip(results_list, metrics, strict=True)))
        for name in names
    ]
    best = [(clear_best(results), column) for column, results in enumerate(results_list, start=1)]
    strong = frozenset((names.index(name), column) for name, column in best if name is not None)
    return Table(("method", *titles), tuple(lines), strong)


def _gain_table(results_list: Sequence[Results], names: Sequence[str], metrics: Sequence[str]) -> Table:
    columns: list[Column] = [("method", names)]
    for name, results, metric in zip(set_names(results_list), results_list, metrics, strict=True):
        gains = results.personal_gains(metric)
        columns.append((f"{name}: {metric_title(metric or ABSENT)}", [gain_cell(gains.get(row)) for row in names]))
    return Table.from_columns(columns).without_empty_lines()


def _figures(results_list: Sequence[Results]) -> dict[str, list[tuple[Picture, Figure]]]:
    """Draw every figure, by its set; those of all sets are under ""."""
    figures: dict[str, list[tuple[Picture, Figure]]] = {}
    for number, (name, results) in enumerate(zip(set_names(results_list), results_list, strict=True), start=1):
        metric = results.leading_metric
        if not metric:
            continue
        stem = f"figures/{number}-{re.sub('[^A-Za-z0-9_]+', '-', name).strip('-')}"
        scores = Picture(f"{stem}-scores.png", f"{metric} of each method of {name}")
        figures[name] = [(scores, scores_figure(results, metric))]
        if any(metric in subgroup.metric_names for subgroup in results.subgroups):
            subgroups = Picture(f"{stem}-subgroups.png", f"{metric} of {name} by subgroup")
            figures[name].append((subgroups, subgroups_figure(results, metric)))
    if any(results.personal_gains(results.leading_metric) for results in results_list):
        gains = Picture("figures/gains.png", "Personal gain of each method in each set")
        figures[""] = [(gains, gains_figure(results_list))]
    return figures
