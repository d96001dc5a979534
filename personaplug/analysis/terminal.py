"""Results for a terminal: the verdict first, then tables that fit its width.

Markdown, HTML and JSON hold all columns and comparisons.
"""

from __future__ import annotations

import shutil
import sys
import textwrap

from personaplug.analysis.rendering import ABSENT, Table
from personaplug.analysis.results_file import Results
from personaplug.analysis.tables import head, notes, tables
from personaplug.analysis.verdict import verdict

_WIDTH = 120  # if the output is no terminal
_MIN_USERS = 20  # whose resamples give intervals
_LEFT_OUT = ("± seeds", "per user", "McNemar p")


def terminal_text(results: Results, *, width: int | None = None) -> str:
    """Return results as lines of at most this width, from 80 on; None = the terminal's."""
    width = width or _terminal_width()
    facts, models = head(results)
    summary = [*verdict(results), *_caution(results)]
    blocks = ["\n".join(_wrapped(line, width) for line in lines) for lines in (summary, [facts, *models])]
    blocks += [
        f"{title}:\n{table}" if title else table
        for title, whole in tables(results)
        for table in ["\n\n".join(part.to_markdown() for part in _fitted(_shortened(whole, results), width))]
    ]
    shown = [note for note in notes(results) if not note.startswith(_LEFT_OUT)]
    blocks.append("\n".join(_wrapped(f"- {note}", width) for note in shown) if results.rows else "No rows.")
    return "\n\n".join(filter(None, blocks))


def _caution(results: Results) -> list[str]:
    users = results.about.users
    if users is None or users >= _MIN_USERS:
        return []
    return [f"Of {users} users, intervals and p-values say next to nothing; test on {_MIN_USERS} or more."]


def _terminal_width() -> int:
    return shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _shortened(table: Table, results: Results) -> Table:
    """Leave out the columns that only the wide form has, and all comparisons but those of the leading metric."""
    advantages = [index for index, title in enumerate(table.titles) if title.endswith(" advantage")]
    end = advantages[1] if len(advantages) > 1 else len(table.titles)
    kept = [index for index, title in enumerate(table.titles[:end]) if title not in _LEFT_OUT]
    return _columns(table, kept)


def _fitted(table: Table, width: int) -> list[Table]:
    """Split a table's columns into tables that fit the width; each starts with the first column."""
    table = _with_wrapped_names(table, width // 2)
    widths = [max(3, *map(len, column)) for column in zip(table.titles, *table.text_lines(), strict=True)]
    parts: list[list[int]] = []
    used = width
    for index in range(1, len(widths)):
        if used + widths[index] + 3 > width:
            parts.append([0])
            used = widths[0] + 4
        parts[-1].append(index)
        used += widths[index] + 3
    return [_columns(table, part).without_empty_lines() for part in parts]


def _with_wrapped_names(table: Table, width: int) -> Table:
    """Continue long cells of the first column on lines of their own."""
    lines: list[tuple[str | None, ...]] = []
    for name, *cells in table.lines:
        first, *rest = textwrap.wrap(name or ABSENT, width)
        lines += [(first, *cells), *((f"  {part}", *("" for _ in cells)) for part in rest)]
    return Table(table.titles, tuple(lines))


def _columns(table: Table, indices: list[int]) -> Table:
    lines = tuple(tuple(line[index] for index in indices) for line in table.lines)
    return Table(tuple(table.titles[index] for index in indices), lines)
