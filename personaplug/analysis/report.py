"""Results files as pages: one Markdown and one HTML file with the same tables and figures, and pieces of a page.

A page is a list of blocks, and each format renders blocks. Whatever comes from a file is escaped in the HTML.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personaplug.analysis import figures
from personaplug.analysis.metrics import NegativeLogLikelihood, metric_class
from personaplug.analysis.tables import (
    Row,
    Table,
    cost_columns,
    filled,
    gain_cell,
    headline,
    in_order,
    is_finite,
    is_significant,
    leading_metric,
    notes,
    one_line,
    personal_gains,
    score_cell,
    set_names,
    tables,
    titled,
)
from personaplug.errors import ConfigError, MissingData, RecordError
from personaplug.infra.atomic_io import write_text
from personaplug.methods import is_control

_KNOWN_TRUTH = "all-knowing"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; }
h2 { border-top: 1px solid #ddd; padding-top: 1.2rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e5e5; }
thead th { border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f5f8fb; }
img { display: block; max-width: 100%; margin: 1rem 0; }
ul { color: #555; font-size: 13px; }
"""


@dataclass(frozen=True)
class Heading:
    """A title: of the page (level 1), of a set (2), of a table (3)."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Lines of a list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A figure's file.

    Attributes:
        path: relative to the page.
        shows: what is to be seen, for who cannot see it.
    """

    path: str
    shows: str


Block = Heading | Paragraph | Bullets | Picture | Table


def write_report(
    results_files: Sequence[Path], out: Path, *, title: str = "Results", pictures: bool = True
) -> list[Path]:
    """Write a folder with `report.md`, `report.html` and, under `figures/`, PNGs.

    Several files, one per set, begin with an overview: scores, personal gains and costs, sets side by side.

    Args:
        results_files: as `personaplug evaluate --json` writes them.
        out: the folder; files of these names in it are replaced.
        title: of both pages.
        pictures: whether to draw figures, which needs matplotlib.
    Returns:
        The files written.
    Raises:
        MissingData: if a file is not there, or none is given.
        RecordError: if a file is no results object.
        MissingExtra: if figures are asked for and matplotlib is not installed; nothing is written then.
        StorageError: if a file cannot be written.
    """
    if not results_files:
        raise MissingData("A report needs at least one results file; `personaplug evaluate --json FILE` writes them.")
    every = [load_results(path) for path in results_files]
    drawn = _draw(every, out) if pictures else {}
    blocks = [Heading(title, 1), *_page(every, drawn)]
    write_text(out / "report.md", _markdown(blocks) + "\n")
    write_text(out / "report.html", _html(blocks, title=title))
    return [out / "report.md", out / "report.html", *(out / shown.path for found in drawn.values() for shown in found)]


def load_results(path: Path) -> dict[str, Any]:
    """Return the results object of a file.

    Raises:
        MissingData: if the file is not there.
        RecordError: if it is no results object.
    """
    if not path.is_file():
        raise MissingData(f"There is no results file {path}; `personaplug evaluate --json FILE` writes one.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(path, f"byte {error.start}", reason="this is no UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise RecordError(path, f"line {error.lineno}", reason=f"this is no JSON ({error.msg}).") from None
    if not isinstance(told, dict) or not all(map(_are_objects, _lists_of(told))) or "rows" not in told:
        raise RecordError(
            path,
            "the whole file",
            reason="a results object has a list of `rows`, one object per condition, and may have lists of `pairs` and "
            "`slices`; found something else. Give files that `personaplug evaluate --json FILE` wrote.",
        )
    return told


def overview_markdown(results_list: Sequence[Mapping[str, Any]]) -> str:
    """Return several sets side by side as Markdown: scores, personal gains, costs. Ends without a line break."""
    return _markdown(_overview(results_list))


def insert_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a Markdown file.

    Raises:
        MissingData: if the file is not there.
        RecordError: if it lacks one of the markers, has one twice, or has them in the wrong order.
        ConfigError: if the text holds a marker itself, so that the next time could not find its place.
        StorageError: if the file cannot be written; it stays as it was.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if not path.is_file():
        raise MissingData(f"There is no file {path} to insert {name!r} into.")
    page = path.read_bytes().decode("utf-8")  # with its own line ends
    found = page.count(begin), page.count(end)
    if found != (1, 1) or page.index(begin) > page.index(end):
        raise RecordError(
            path,
            f"the place of {name!r}",
            reason=f"expected {begin} once and {end} once below it; found {found[0]} and {found[1]}"
            f"{', in the wrong order' if found == (1, 1) else ''}. Put both where the text belongs.",
        )
    if begin in text or end in text:
        raise ConfigError(f"The text for {name!r} holds one of its own markers, {begin} or {end}; leave them out.")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    write_text(path, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def _page(every: Sequence[Mapping[str, Any]], drawn: Mapping[str, Sequence[Picture]]) -> Iterator[Block]:
    several = len(every) > 1
    if several:
        yield Heading("Overview", 2)
        yield from _overview(every)
    yield from drawn.get("", ())
    for name, results in zip(set_names(every), every, strict=True):
        yield Heading(name, 2)
        facts, models = headline(results)
        yield Paragraph(facts)
        yield Bullets(tuple(models))
        yield from drawn.get(name, ())
        for title, table in tables(results):
            yield Heading(title or "Scores", 3)
            yield table
        yield Bullets(tuple(notes(results)))


def _overview(results_list: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    names = in_order(str(row.get("condition", "–")) for results in results_list for row in _rows(results))
    yield Heading("Scores", 3)
    yield Paragraph(
        "The first metric of each set, with its interval. A best score is bold only where it is significantly better "
        "than the second best; controls do not compete."
    )
    yield _score_overview(results_list, names)
    gains = _gain_overview(results_list, names, [leading_metric(results) for results in results_list])
    if gains.lines:
        yield Heading("Personal gains", 3)
        yield Paragraph(
            "What a user's own history gains over a stranger's; positive is better, whatever the metric's direction."
            " Holm p, where it stands, is corrected for the number of personal gains in its set; p is not. A personal"
            " row is missing here where its control, ROW@wrong-user, was not run."
        )
        yield gains
    likelier = _gain_overview(results_list, names, [NegativeLogLikelihood.name] * len(results_list))
    if likelier.lines:
        yield Heading("Personal gains in likelihood", 3)
        yield Paragraph(
            "The same in the log-likelihood of the right answer, in nats per token (per answer of a closed set): how"
            " much likelier it is with the user's own history than with a stranger's."
        )
        yield likelier
    # A control costs what its method does.
    costs = _cost_overview(results_list, [name for name in names if not is_control(name)])
    if len(costs.titles) > 1:
        yield Heading("Costs", 3)
        yield Paragraph(f"Beyond the plain model{', mean over the sets' if len(results_list) > 1 else ''}.")
        yield costs


def _score_overview(results_list: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    columns: list[tuple[str, list[str | None]]] = [("condition", list(names))]
    strong = set()
    for place, (title, results) in enumerate(zip(_titles(results_list), results_list, strict=True), start=1):
        metric, rows = leading_metric(results) or "", _by_name(results)
        columns.append((title, [score_cell(rows.get(name, {}), metric) for name in names]))
        best = _clear_best(results, metric)
        if best is not None:
            strong.add((names.index(best), place))
    return Table(
        tuple(title for title, _ in columns),
        tuple(zip(*(cells for _, cells in columns), strict=True)),
        frozenset(strong),
    )


def _gain_overview(
    results_list: Sequence[Mapping[str, Any]], names: Sequence[str], metrics: Sequence[str | None]
) -> Table:
    """Personal gains of each set in a metric of its own; without the sets that have none."""
    columns: list[tuple[str, list[str | None]]] = []
    for title, results, metric in zip(set_names(results_list), results_list, metrics, strict=True):
        gains = personal_gains(results, metric)
        columns.append((f"{title}: {titled(metric or '–')}", [gain_cell(gains.get(name)) for name in names]))
    told = filled([("method", list(names)), *columns])
    return Table(told.titles, tuple(line for line in told.lines if any(line[1:])))


def _cost_overview(results_list: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    told: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for results in results_list:
        for name, row in _by_name(results).items():
            for key, value in (row.get("costs") or {}).items():
                if name in told and is_finite(value):
                    told[name].setdefault(key, []).append(value)
    means = [{"costs": {key: float(np.mean(values)) for key, values in told[name].items()}} for name in names]
    return filled([("condition", list(names)), *cost_columns(means)])


def _titles(results_list: Sequence[Mapping[str, Any]]) -> list[str]:
    named = zip(set_names(results_list), results_list, strict=True)
    return [f"{name}: {titled(leading_metric(results) or '–')}" for name, results in named]


def _clear_best(results: Mapping[str, Any], metric: str) -> str | None:
    """The row that is significantly better than the second best; None where no row is shown to be.

    Where the file does not compare the two, they must have intervals that do not overlap.
    """
    ranked = _competitors(results, metric)
    if len(ranked) < 2:
        return None
    (best, first), (second, other) = ranked[:2]
    for pair in results.get("pairs") or []:
        if pair.get("metric") == metric and {pair.get("a"), pair.get("b")} == {best, second}:
            return best if is_significant(pair) else None
    ends = [(row.get("intervals") or {}).get(metric) or [None] for row in (first, other)]
    if not all(is_finite(end) for interval in ends for end in interval):
        return None
    return best if max(map(min, ends)) > min(map(max, ends)) else None


def _competitors(results: Mapping[str, Any], metric: str) -> list[tuple[str, Row]]:
    """Rows with a score in the metric, the best first; neither controls nor the best score that there can be."""
    scored = [
        (name, row)
        for name, row in _by_name(results).items()
        if not is_control(name) and name != _KNOWN_TRUTH and is_finite((row.get("metrics") or {}).get(metric))
    ]
    kind = metric_class(metric)
    greater = kind is None or kind.greater_is_better
    return sorted(scored, key=lambda named: float(named[1]["metrics"][metric]), reverse=greater)


def _draw(every: Sequence[Mapping[str, Any]], out: Path) -> dict[str, list[Picture]]:
    """Every figure of a report, by the set that it is of; those of all sets are under ""."""
    drawn: dict[str, list[Picture]] = {}
    for place, (name, results) in enumerate(zip(set_names(every), every, strict=True), start=1):
        metric = leading_metric(results)
        if metric is None:
            continue
        stem = f"figures/{place}-{re.sub('[^A-Za-z0-9_]+', '-', name).strip('-')}"
        drawn[name] = [Picture(f"{stem}-scores.png", f"{metric} of each condition of {name}")]
        figures.scores_figure(results, metric, path=out / drawn[name][0].path)
        if any(metric in (row.get("metrics") or {}) for part in results.get("slices") or [] for row in _rows(part)):
            drawn[name].append(Picture(f"{stem}-slices.png", f"{metric} of {name} by slice"))
            figures.slices_figure(results, metric, path=out / drawn[name][1].path)
    if any(personal_gains(results, leading_metric(results)) for results in every):
        drawn[""] = [Picture("figures/gains.png", "Personal gain of each method in each set")]
        figures.gains_figure(every, out / drawn[""][0].path)
    return drawn


def _markdown(blocks: Iterator[Block] | Sequence[Block]) -> str:
    return "\n\n".join(shown for shown in map(_as_markdown, blocks) if shown)


def _as_markdown(block: Block) -> str:
    match block:
        case Table():
            return block.markdown()
        case Heading(text, level):
            return f"{'#' * level} {one_line(text)}"
        case Bullets(items):
            return "\n".join(f"- {one_line(item)}" for item in items)
        case Picture(path, shows):
            return f"![{re.sub(r'[][]', '', shows)}]({path})"
        case Paragraph(text):
            return one_line(text)


def _html(blocks: Sequence[Block], *, title: str) -> str:
    body = "\n".join(shown for shown in map(_as_html, blocks) if shown)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _as_html(block: Block) -> str:
    match block:
        case Table():
            return _table_as_html(block)
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>" if items else ""
        case Picture(path, shows):
            return f'<img src="{html.escape(path)}" alt="{html.escape(shows)}">'
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>" if text else ""


def _table_as_html(table: Table) -> str:
    cells = [[html.escape(cell) for cell in line] for line in table.shown()]
    for line, column in table.strong:
        cells[line][column] = f"<strong>{cells[line][column]}</strong>"
    titles = "".join(f'<th scope="col">{html.escape(one_line(title))}</th>' for title in table.titles)
    lines = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells)
    head = f"<thead><tr>{titles}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _by_name(results: Mapping[str, Any]) -> dict[str, Row]:
    return {str(row.get("condition", "–")): row for row in _rows(results)}


def _rows(results: Mapping[str, Any]) -> Sequence[Row]:
    return results.get("rows") or []


def _lists_of(told: Mapping[str, Any]) -> Iterator[Any]:
    """The lists that a results object may hold, those of its slices too."""
    for key in ("rows", "pairs", "slices"):
        yield told.get(key) or []
    slices = told.get("slices")
    if _are_objects(slices):
        for part in slices or []:
            yield from _lists_of(part)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(inner, dict) for inner in value)
