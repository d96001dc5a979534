"""Sections of a page, and their renderers: aligned Markdown, and HTML with the template `report.html`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jinja2

ABSENT = "–"

Column = tuple[str, Sequence[str | None]]  # a title, and a cell for each line; None if unknown


@dataclass(frozen=True)
class Table:
    """Text in lines and columns; the first column names the lines."""

    titles: tuple[str, ...]
    lines: tuple[tuple[str | None, ...], ...]  # a cell per column; None if unknown
    strong: frozenset[tuple[int, int]] = frozenset()  # (line, column) of the cells in bold

    @classmethod
    def from_columns(cls, columns: Sequence[Column]) -> Table:
        """Make a table of columns. Leave out columns without known cells, except the first."""
        first, *rest = columns
        columns = [first, *(column for column in rest if any(cell is not None for cell in column[1]))]
        return cls(tuple(title for title, _ in columns), tuple(zip(*(cells for _, cells in columns), strict=True)))

    def without_empty_lines(self) -> Table:
        """Leave out the lines that have only a name."""
        return Table(self.titles, tuple(line for line in self.lines if any(cell is not None for cell in line[1:])))

    def text_lines(self) -> list[list[str]]:
        """Return the cells of each line as text without line breaks."""
        return [[ABSENT if cell is None else one_line(cell) for cell in line] for line in self.lines]

    def to_text(self) -> str:
        """Return text with the first column aligned left, the others right, and two blanks between columns."""
        lines = [list(map(one_line, self.titles)), *self.text_lines()]
        columns = []
        for index, column in enumerate(zip(*lines, strict=True)):
            width = max(map(len, column))
            title, *cells = [cell.rjust(width) if index else cell.ljust(width) for cell in column]
            columns.append([title, "-" * width, *cells])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def to_markdown(self) -> str:
        """Return Markdown with the first column aligned left, the others right."""
        lines = [map(one_line, self.titles), *self.text_lines()]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        for line, column in self.strong:
            cells[line + 1][column] = f"**{cells[line + 1][column]}**"
        columns = [_padded(column, left=index == 0) for index, column in enumerate(zip(*cells, strict=True))]
        return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


@dataclass(frozen=True)
class Answer:
    """The answer to a question in a word, and the reason; without a word, the reason is the answer."""

    question: str
    word: str
    reason: str

    def __str__(self) -> str:
        return f"{self.question} {self.word}: {self.reason}" if self.word else f"{self.question} {self.reason}"


@dataclass(frozen=True)
class Picture:
    """A figure: a file for Markdown, an SVG element for HTML."""

    path: str  # relative to the page
    text: str  # the alternative text, which states what the figure shows
    svg: str = ""
    caption: str = ""  # how to read it; HTML shows it below the figure
    links: Mapping[str, str] = field(default_factory=dict)  # for each link in the figure, its name
    is_wide: bool = False  # whether HTML gives it a whole line


@dataclass(frozen=True)
class Entry:
    """A part of a page that opens on a click or a key; only HTML has it."""

    anchor: str
    title: str
    text: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A part of a page; its attributes appear on the page in this order."""

    title: str = ""
    level: int = 3  # 1 for the page, 2 for a set, 3 for a table
    anchor: str = ""  # the target of links to this section
    link: str = ""  # the anchor to which the title links
    text: str = ""
    answers: Sequence[Answer] = ()
    bullets: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    entries: Sequence[Entry] = ()
    table: Table | None = None
    caption: str = ""  # of the table in HTML; the title if empty
    parts: Sequence[Section] = ()  # sections side by side, below this one
    is_folded: bool = False  # whether HTML shows it only after a click or a key
    is_open: bool = False  # whether a folded section is open at first


def to_markdown(sections: Sequence[Section]) -> str:
    """Render sections as Markdown without a line break at the end."""
    return "\n\n".join(block for section in sections for block in _markdown_blocks(section) if block)


def to_html(sections: Sequence[Section], *, title: str, css: str = "") -> str:
    """Render sections as an HTML page; all text is escaped, the SVG of pictures and the CSS are not."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("personaplug.analysis", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["one_line"] = one_line
    page = environment.get_template("report.html").render(sections=sections, title=title, css=css)
    return re.sub(r"\n\s*\n", "\n", page).lstrip()


def one_line(value: object) -> str:
    """Return a value as text without line breaks."""
    return " ".join(str(value).split())


def _markdown_blocks(section: Section) -> Iterator[str]:
    yield f"{'#' * section.level} {one_line(section.title)}" if section.title else ""
    yield one_line(section.text)
    yield "\n".join(f"- {one_line(answer)}" for answer in section.answers)
    yield "\n".join(f"- {one_line(bullet)}" for bullet in section.bullets)
    for picture in section.pictures:
        yield f"![{re.sub(r'[][]', '', picture.text)}]({picture.path})"
    yield section.table.to_markdown() if section.table else ""
    for part in section.parts:
        yield from _markdown_blocks(part)


def _padded(cells: Sequence[str], *, left: bool) -> list[str]:
    width = max(3, *map(len, cells))
    padded = [cell.ljust(width) if left else cell.rjust(width) for cell in cells]
    rule = ":" + "-" * (width - 1) if left else "-" * (width - 1) + ":"
    return [padded[0], rule, *padded[1:]]
