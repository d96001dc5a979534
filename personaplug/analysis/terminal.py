"""Results for a terminal: the verdict, then one table with the columns that fit its width.

The Markdown, HTML and JSON outputs contain all columns and comparisons.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from personaplug.analysis.metrics import has_estimate
from personaplug.analysis.rendering import ABSENT, Column, Table
from personaplug.analysis.results_file import Results
from personaplug.analysis.tables import (
    difference_cell,
    head,
    metric_title,
    notes,
    p_cell,
    p_title,
    rate_columns,
    score_cell,
    work_columns,
)
from personaplug.analysis.verdict import verdict

_DEFAULT_WIDTH = 80
_MIN_WIDTH = 40
_MIN_USERS = 20  # with fewer users, bootstrap intervals are too narrow
_NAME_SHARE = 0.3  # of the width; longer names continue on a second line
_NEVER_SHOWN = ("± seeds", "per user", "McNemar p")
_ZERO = "0.0%"
_EXPLAINED = dict.fromkeys(("choice", "divergence", "form_distance", "attribution", "identified_persona"), ":")
_EXPLAINED["own_words_recall"] = ","
"""Metrics with a note, and the mark behind their name there."""


def terminal_text(results: Results, *, width: int | None = None) -> str:
    """Return results as lines of at most `width` characters, 40 or more; None = the width of the terminal."""
    width = max(_MIN_WIDTH, width or shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns)
    facts, models = head(results)
    table, left_out = _fitted(results, width)
    blocks = [
        _wrapped([*map(str, verdict(results)), *_caution(results)], width),
        _wrapped([facts, *models], width),
        table,
        _wrapped([f"- {note}" for note in _notes(results, left_out)], width) if results.rows else "No rows.",
    ]
    return "\n\n".join(filter(None, blocks))


def _caution(results: Results) -> list[str]:
    users = results.about.users
    if users is None or users >= _MIN_USERS:
        return []
    return [f"{users} users are too few for reliable intervals and p-values. Test on {_MIN_USERS} users or more."]


def _fitted(results: Results, width: int) -> tuple[str, list[str]]:
    """Return a table of the columns that fit, and the titles of the other columns."""
    if not results.rows:
        return "", []
    names, *columns = _columns(results)
    name_width = int(width * _NAME_SHARE)
    table = _with_wrapped_names(Table.from_columns([names]), name_width)
    fitting = [names]
    for column in columns:
        candidate = _with_wrapped_names(Table.from_columns([*fitting, column]), name_width)
        if _width_of(candidate) > width:
            break
        table, fitting = candidate, [*fitting, column]
    return table.to_text(), [title for title, _ in columns[len(fitting) - 1 :]]


def _columns(results: Results) -> list[Column]:
    """Return the columns that are not empty, the most important first."""
    rows, (metric, *others) = results.rows, results.metric_names or [""]
    gains = results.personal_gains(metric)
    pairs = [gains.get(row.name) for row in rows]
    columns: list[Column] = [
        (metric_title(metric), [score_cell(row, metric) for row in rows]),
        ("personal gain", [None if pair is None else difference_cell(pair) for pair in pairs]),
        (max((p_title(pair) for pair in pairs if pair), key=len, default="p"),
         [None if pair is None else p_cell(pair.deciding_p) for pair in pairs]),
        *((title, cells) for title, cells in rate_columns(rows) if {*cells} - {_ZERO, None}),
        *((metric_title(name), [score_cell(row, name) for row in rows]) for name in others),
        *work_columns(rows),
    ]  # fmt: skip
    return [("method", [row.name for row in rows]), *(column for column in columns if any(column[1]))]


def _notes(results: Results, left_out: Sequence[str]) -> Iterator[str]:
    """Yield where to find the hidden columns, and explanations of the shown ones."""
    hidden = {title.split()[0] for title in left_out}
    shown_metrics = [name for name in results.metric_names if name not in hidden]
    unused = [*_NEVER_SHOWN, *(f"{name}{end}" for name, end in _EXPLAINED.items() if name in hidden)]
    unused += [] if any(map(has_estimate, shown_metrics)) else ["@median"]
    reason = f"Columns that do not fit the terminal: {', '.join(left_out)}. " if left_out else ""
    yield f"{reason}All metrics, intervals, comparisons and costs are in the results file (JSON)."
    yield from (note for note in notes(results) if not note.startswith(tuple(unused)))


def _width_of(table: Table) -> int:
    return max(map(len, table.to_text().splitlines()))


def _wrapped(lines: Sequence[str], width: int) -> str:
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _with_wrapped_names(table: Table, width: int) -> Table:
    """Continue long cells of the first column on further lines."""
    lines: list[tuple[str | None, ...]] = []
    for name, *cells in table.lines:
        first, *rest = textwrap.wrap(name or ABSENT, width)
        lines += [(first, *cells), *((f"  {part}", *("" for _ in cells)) for part in rest)]
    return Table(table.titles, tuple(lines))
