"""Live progress bars on a terminal. Log lines and warnings appear above the bars."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from personaplug.infra.progress import duration_text


class TerminalBars(RichProgress):
    """A bar for each running stage, with a note below it. The terminal is in this state until `end`."""

    def __init__(self) -> None:
        title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        bar = BarColumn(bar_width=None, table_column=Column(max_width=40))
        # A file or pipe on standard output must not lose its lines to the terminal.
        has_terminal_output = sys.stdout.isatty()
        super().__init__(
            *(title, bar, _Count(), _TimeLeft()),
            console=Console(stderr=True, highlight=False),
            refresh_per_second=5,
            transient=True,
            redirect_stdout=has_terminal_output,
        )
        self._stderr = sys.stderr
        self.start()
        _redirect_logs(self._stderr, sys.stderr)

    def get_renderables(self) -> Iterable[RenderableType]:
        # A terminal writes ^C wherever the cursor is, even into a line that is being drawn. Two free columns keep the
        # line whole; a line that wrapped would stay on the screen.
        for task in self.tasks:
            width = self.console.width - 2
            yield Constrain(self.make_tasks_table([task]), width)
            if note := task.fields["note"]:
                yield Text(textwrap.fill(note, width, initial_indent="  ", subsequent_indent="  "))

    def add(self, title: str, *, total: int | None, done: int, unit: str) -> TaskID:
        """Add a bar, and return its name."""
        return self.add_task(title, total=total, completed=done, unit=unit, note="")

    def show(self, bar: TaskID, *, done: int, note: str) -> None:
        self.update(bar, completed=done, note=note)

    def remove(self, bar: TaskID, *, last_line: str) -> None:
        """Remove a bar, and print a line in its place unless it is empty."""
        self.remove_task(bar)
        if last_line:
            self.console.print(Text(last_line))

    def end(self) -> None:
        """Remove all bars and restore the terminal."""
        _redirect_logs(sys.stderr, self._stderr)
        self.stop()


class _Count(ProgressColumn):
    """The number of finished units."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total} {task.fields['unit']}")


class _TimeLeft(ProgressColumn):
    """The remaining time, estimated from the rate of the last half minute."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None else f"{duration_text(left)} left")


def _redirect_logs(old: TextIO | Any, new: TextIO | Any) -> None:
    """Make the log handlers that write to `old` write to `new`: they hold the stream itself, not `sys.stderr`."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)
