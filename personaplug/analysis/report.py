"""Reports: results files as a Markdown page and an HTML page with figures, or as a section of a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from personaplug.analysis.figures import drawn_gains, gains_figure, scores_figure, subgroups_figure
from personaplug.analysis.likelihood_metrics import NegativeLogLikelihood
from personaplug.analysis.pooled import PooledGains, pooled_gains
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
    "The first metric of each set, with its interval. The best score is bold if it is significantly better than the "
    "second best. Controls do not compete."
)
_GAINS_TEXT = (
    "The advantage of the user's own history over another user's history. Positive is better for every metric. Holm p "
    "is corrected for the number of personal gains in the set; p is not. A personal row is missing if its control, "
    "ROW@wrong-user, was not run."
)
_POOLED_TEXT = (
    "The mean of the personal gains of the sets {}, with its interval. Each set counts alike; the bootstrap draws "
    "users, and trainings, within each set. Holm p is corrected for the number of rows."
)
_LIKELIHOOD_TEXT = (
    "The personal gain in the log-likelihood of the right answer, in nats per token (per answer for a closed set). "
    "Positive: the right answer is likelier with the user's own history than with another user's."
)


def write_report(
    results_files: Sequence[Path], out: Path, *, title: str = "Results", with_figures: bool = True
) -> list[Path]:
    """Write `report.md`, `report.html` and `figures/*.png` into a folder, and return their paths.

    If there are several results files, the report begins with an overview of all sets. Without matplotlib, a report
    with figures raises MissingExtra before a file is written.
    """
    if not results_files:
        raise MissingData("A report needs at least one results file; `personaplug evaluate --json FILE` writes them.")
    results_list = [load_results(path) for path in results_files]
    figures = _figures(results_list) if with_figures else {}
    for picture, figure in chain(*figures.values()):
        atomic_write(out / picture.path, partial(figure.savefig, format="png", dpi=150))
    pictures = {name: [picture for picture, _ in pairs] for name, pairs in figures.items()}
    pooled = pooled_gains(results_files, results_list)
    sections = [Section(title, level=1), *_page(results_list, pictures, pooled=pooled)]
    write_text(out / "report.md", to_markdown(sections) + "\n")
    write_text(out / "report.html", to_html(sections, title=title))
    return [out / "report.md", out / "report.html", *(out / picture.path for picture in chain(*pictures.values()))]


def overview_markdown(results_list: Sequence[Results], *, pooled: PooledGains | None = None) -> str:
    """Return the scores, personal gains and costs of several sets as Markdown, with a column per set."""
    return to_markdown(list(_overview(results_list, pooled=pooled)))


def insert_between(path: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- begin NAME -->` and `<!-- end NAME -->` in a Markdown file."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if not path.is_file():
        raise MissingData(f"There is no file {path}. Create it, with the lines {begin} and {end}.")
    page = path.read_bytes().decode("utf-8")  # keeps the file's line ends
    counts = page.count(begin), page.count(end)
    if counts != (1, 1) or page.index(begin) > page.index(end):
        raise RecordError(
            path,
            f"the markers of {name!r}",
            reason=f"expected {begin} and, below it, {end}, each once; found {counts[0]} and {counts[1]}"
            f"{', in the wrong order' if counts == (1, 1) else ''}. Put both lines where the text belongs.",
        )
    if begin in text or end in text:  # the next call could not find the end
        raise ConfigError(f"The text for {name!r} must not contain {begin} or {end}; remove them.")
    before, after = page.split(begin)[0], page.split(end)[1]
    write_text(path, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def _page(
    results_list: Sequence[Results], pictures: dict[str, list[Picture]], *, pooled: PooledGains | None
) -> Iterator[Section]:
    if len(results_list) > 1:
        yield Section("Overview", level=2)
        yield from _overview(results_list, pooled=pooled)
    yield Section(pictures=pictures.get("", ()))
    for name, results in zip(set_names(results_list), results_list, strict=True):
        facts, models = head(results)
        yield Section(name, level=2, text=facts, bullets=models, pictures=pictures.get(name, ()))
        if sentences := verdict(results):
            yield Section("Verdict", bullets=sentences)
        for title, table in tables(results):
            yield Section(title or "Scores", table=table)
        yield Section(bullets=notes(results))


def _overview(results_list: Sequence[Results], *, pooled: PooledGains | None) -> Iterator[Section]:
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
    if pooled is not None:
        yield _pooled_section(pooled)
    names = [name for name, method in methods.items() if not method.is_control]  # a control costs as much as its method
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
    best_names = [(clear_best(results), column) for column, results in enumerate(results_list, start=1)]
    strong = frozenset((names.index(name), column) for name, column in best_names if name is not None)
    return Table(("method", *titles), tuple(lines), strong)


def _gain_table(results_list: Sequence[Results], names: Sequence[str], metrics: Sequence[str]) -> Table:
    columns: list[Column] = [("method", names)]
    for name, results, metric in zip(set_names(results_list), results_list, metrics, strict=True):
        gains = results.personal_gains(metric)
        columns.append((f"{name}: {metric_title(metric or ABSENT)}", [gain_cell(gains.get(row)) for row in names]))
    return Table.from_columns(columns).without_empty_lines()


def _pooled_section(pooled: PooledGains) -> Section:
    if pooled.problem:
        return Section("Pooled personal gains", text=f"Not pooled: {pooled.problem}")
    names = list(dict.fromkeys(name for gains in pooled.gains.values() for name in gains))
    columns: list[Column] = [("method", names)]
    for metric, gains in pooled.gains.items():
        columns.append((metric_title(metric), [gain_cell(gains.get(name)) for name in names]))
    return Section(
        "Pooled personal gains", text=_POOLED_TEXT.format(", ".join(pooled.sets)), table=Table.from_columns(columns)
    )


def _figures(results_list: Sequence[Results]) -> dict[str, list[tuple[Picture, Figure]]]:
    """Draw the figures of each set; the key "" has the figures of all sets together."""
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
    if any(map(drawn_gains, results_list)):
        gains = Picture("figures/gains.png", "Personal gain of each method in each set")
        figures[""] = [(gains, gains_figure(results_list))]
    return figures
