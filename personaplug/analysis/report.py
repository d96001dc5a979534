"""Reports: results files as a Markdown page and an HTML page with figures, or as a section of a Markdown page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from personaplug.analysis.figures.of_report import Figures, ReportSet, SetPictures, draw_figures, user_entries
from personaplug.analysis.figures.svg import palette_css
from personaplug.analysis.likelihood_metrics import NegativeLogLikelihood
from personaplug.analysis.pooled import PooledGains, pooled_gains
from personaplug.analysis.rendering import ABSENT, Column, Section, Table, to_html, to_markdown
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
from personaplug.analysis.trials_of_results import UnmatchedTrials, load_result_trials, trials_file_of
from personaplug.analysis.user_scores import UserScores, user_scores
from personaplug.analysis.verdict import clear_best, price, verdict
from personaplug.errors import ConfigError, MissingData, MissingExtra, RecordError
from personaplug.infra.atomic_io import write_text

logger = logging.getLogger(__name__)

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
_VERDICT_TEXT = (
    "Yes and No: the difference has a p below .05. Not shown: p is .05 or more. A wrong-user row sees another user's "
    "history. The row instruction-only was trained on the same samples without a history. Rivals that cost nothing "
    "count, copy or fit a regression. ↑: higher is better. ↓: lower is better."
)
_USERS_TEXT = (
    "Users have numbers in the order of their first sample. With few samples of a user, a large gain may be chance."
)
_LIKELIHOOD_TEXT = (
    "The personal gain in the log-likelihood of the right answer, in nats per token (per answer for a closed set). "
    "Positive: the right answer is likelier with the user's own history than with another user's."
)


def write_report(
    results_files: Sequence[Path], out: Path, *, title: str = "Results", with_figures: bool = True
) -> list[Path]:
    """Write `report.md`, `report.html` and `figures/*.png` into a folder, and return their paths.

    The HTML page needs no other file. If there are several results files, the report has an overview of all sets.
    Without matplotlib, a page with figures says which extra it needs.
    """
    if not results_files:
        raise MissingData("A report needs at least one results file; `personaplug evaluate --json FILE` writes them.")
    results_list = [load_results(path) for path in results_files]
    sets = [
        ReportSet(number, name, results, *_users_of(path, results))
        for number, (path, name, results) in enumerate(
            zip(results_files, set_names(results_list), results_list, strict=True), start=1
        )
    ]
    figures, problem = _figures(sets, out) if with_figures else (Figures(), "")
    pooled = pooled_gains(results_files, results_list)
    sections = list(_page(sets, figures, pooled=pooled, problem=problem))
    write_text(out / "report.md", to_markdown([Section(title, level=1), *sections]) + "\n")
    write_text(out / "report.html", to_html(sections, title=title, css=palette_css()))
    return [out / "report.md", out / "report.html", *(out / path for path in figures.paths)]


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
    sets: Sequence[ReportSet], figures: Figures, *, pooled: PooledGains | None, problem: str
) -> Iterator[Section]:
    yield from _verdicts(sets)
    if problem:
        yield Section(text=f"This page has no figures. {problem}")
    if len(sets) > 1:
        yield Section("Overview", level=2, anchor="overview", pictures=figures.overview)
        for section in _overview([each.results for each in sets], pooled=pooled):
            yield replace(section, is_folded=True)
    for each in sets:
        yield from _set_sections(each, figures.of_sets.get(each.number, SetPictures()))


def _verdicts(sets: Sequence[ReportSet]) -> Iterator[Section]:
    cards = []
    for each in sets:
        answers = [*verdict(each.results), *filter(None, [price(each.results)])]
        title, link = (each.name, each.anchor) if len(sets) > 1 else ("", "")
        cards += [Section(title, link=link, answers=answers)] if answers else []
    if cards:
        yield Section("Verdict", level=2, anchor="verdict", text=_VERDICT_TEXT, parts=cards)


def _set_sections(each: ReportSet, pictures: SetPictures) -> Iterator[Section]:
    facts, models = head(each.results)
    yield Section(each.name, level=2, anchor=each.anchor, text=facts, bullets=models, pictures=pictures.shown)
    if each.problem:
        yield Section(text=f"Users one by one are not shown. {each.problem}")
    if entries := user_entries(each):
        yield Section("Users who gain or lose most", text=_USERS_TEXT, entries=entries, is_folded=True)
    for title, table in tables(each.results):
        title = title or "Scores"
        folded = pictures.folded.get(title, ())
        caption = f"{each.name}: {title}"
        yield Section(title, caption=caption, pictures=folded, table=table, is_folded=True, is_open=title == "Scores")
    if lines := notes(each.results):
        yield Section("Notes", bullets=lines, is_folded=True)


def _users_of(path: Path, results: Results) -> tuple[UserScores | None, str]:
    """Return the scores of single users, or why the trials beside the results do not give them."""
    if not trials_file_of(path).exists():
        return None, ""
    try:
        return user_scores(load_result_trials(path, results)), ""
    except (UnmatchedTrials, RecordError) as error:
        return None, str(error)


def _figures(sets: Sequence[ReportSet], out: Path) -> tuple[Figures, str]:
    """Draw the figures, or return the reason why they are missing."""
    try:
        return draw_figures(sets, out), ""
    except MissingExtra as error:
        logger.warning("The report has no figures. %s", error)
        return Figures(), str(error)


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
