"""Results for a terminal: the verdict, then one table with as many columns as fit its width.

Markdown, HTML and JSON hold all columns and comparisons.
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

_WIDTH = 80  # if the width is unknown
_MIN_WIDTH = 40
_MIN_USERS = 20  # whose resamples give intervals
_NAME_SHARE = 0.3  # of the width; longer names go on in a second line
_NEVER_SHOWN = ("± seeds", "per user", "McNemar p")
_ZERO = "0.0%"


def terminal_text(results: Results, *, width: int | None = None) -> str:
    """Return results as lines of at most this width, from 40 on; None = the terminal's, or that of COLUMNS."""
    width = max(_MIN_WIDTH, width or shutil.get_terminal_size((_WIDTH, 24)).columns)
    facts, models = head(results)
    table, left_out = _fitted(results, width)
    blocks = [
        _wrapped([*verdict(results), *_caution(results)], width),
        _wrapped([facts, *models], width),
        table,
        _wrapped([f"- {note}" for note in _notes(results, left_out)], width) if results.rows else "No rows.",
    ]
    return "\n\n".join(filter(None, blocks))


def _caution(results: Results) -> list[str]:
    users = results.about.users
    if users is None or users >= _MIN_USERS:
        return []
    return [f"With {users} users, intervals and p-values say little; test on {_MIN_USERS} users or more."]


def _fitted(results: Results, width: int) -> tuple[str, list[str]]:
    """Return the table of the columns that fit, and the titles of the others."""
    if not results.rows:
        return "", []
    names, *columns = _columns(results)
    name_width = int(width * _NAME_SHARE)
    table = _with_wrapped_names(Table.from_columns([names]), name_width)
    shown = [names]
    for column in columns:
        candidate = _with_wrapped_names(Table.from_columns([*shown, column]), name_width)
        if _width_of(candidate) > width:
            break
        table, shown = candidate, [*shown, column]
    return table.to_text(), [title for title, _ in columns[len(shown) - 1 :]]


def _columns(results: Results) -> list[Column]:
    """Return the columns that hold something, the most important first."""
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
    """Yield where the columns are that are left out, and what must be known to read the others."""
    hidden = {title.split()[0] for title in left_out}
    shown = [name for name in results.metric_names if name not in hidden]
    unused = [*_NEVER_SHOWN, *(f"{name}:" for name in ("choice", "divergence") if name in hidden)]
    unused += [] if any(map(has_estimate, shown)) else ["@median"]
    reason = f"Left out for lack of width: {', '.join(left_out)}. " if left_out else ""
    yield f"{reason}All metrics, intervals, comparisons and costs are in the results file (JSON)."
    yield from (note for note in notes(results) if not note.startswith(tuple(unused)))


def _width_of(table: Table) -> int:
    return max(map(len, table.to_text().splitlines()))


def _wrapped(lines: Sequence[str], width: int) -> str:
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _with_wrapped_names(table: Table, width: int) -> Table:
    """Continue long cells of the first column on lines of their own."""
    lines: list[tuple[str | None, ...]] = []
    for name, *cells in table.lines:
        first, *rest = textwrap.wrap(name or ABSENT, width)
        lines += [(first, *cells), *((f"  {part}", *("" for _ in cells)) for part in rest)]
    return Table(table.titles, tuple(lines))
