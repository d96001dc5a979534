"""Report progress from the main process: live bars on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from personaplug.infra.distributed import is_main

if TYPE_CHECKING:
    from personaplug.infra.terminal_bars import TerminalBars

_SECONDS_BETWEEN_LINES = 20.0

_bars: TerminalBars | None = None  # the bars of all running stages
_is_shown = True


class Progress:
    """Report the progress of one stage on standard error.

    Stages may be nested: each has a bar. When a stage ends, one line with its duration remains.

    Args:
        total: total number of units; None if unknown.
        start: units that were done before a resumption.
    """

    def __init__(self, title: str, *, total: int | None, start: int = 0, unit: str = "items") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._start = start
        self.note = ""
        self._started = self._last_line = time.monotonic()
        self._bars = _open_bars() if is_main() and _is_shown and _is_live_terminal() else None
        self._bar = None if self._bars is None else self._bars.add(title, total=total, done=start, unit=unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        elapsed = time.monotonic() - self._started
        summary = f"{self.title}: {self.done - self._start:,} {self.unit} in {duration_text(elapsed)}"
        line = ", ".join(filter(None, (summary, self.note))) if kind is None and self.done > self._start else ""
        if self._bars is not None and self._bar is not None:
            self._bars.remove(self._bar, last_line=line)
            if self._bars is _bars and not self._bars.tasks:
                stop_bars()
        elif line and elapsed > _SECONDS_BETWEEN_LINES:
            self._print(line)

    def advance(self, count: int = 1, *, note: str | None = None) -> None:
        """Count `count` more units; a note, such as a loss, replaces the note that is shown."""
        self.done += count
        self.note = self.note if note is None else note
        if self._bars is not None and self._bar is not None:
            self._bars.show(self._bar, done=self.done, note=self.note)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            left, total = self.seconds_left(), f"/{self.total}" if self.total else ""
            parts = (f"{self.title}: {self.done}{total} {self.unit}", self.note)
            self._print(", ".join(filter(None, (*parts, f"{duration_text(left)} left" if left else ""))))

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the mean rate; return None if unknown."""
        done, elapsed = self.done - self._start, time.monotonic() - self._started
        return None if self.total is None or done == 0 else elapsed / done * (self.total - self.done)

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        if is_main() and _is_shown:
            print(line, file=sys.stderr, flush=True)


def show_progress(is_shown: bool) -> None:
    """Show the progress of the following stages, or hide it."""
    global _is_shown
    _is_shown = is_shown


def stop_bars() -> None:
    """Remove all bars and show the cursor. Stages that have not ended, such as suspended generators, lose their bar."""
    global _bars
    if _bars is not None:
        bars, _bars = _bars, None
        bars.end()


def duration_text(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _is_live_terminal() -> bool:
    if not sys.stderr.isatty():
        return False
    from rich.console import Console  # imported here, because the command line must start quickly

    return not Console(stderr=True).is_dumb_terminal


def _open_bars() -> TerminalBars:
    global _bars
    if _bars is None:
        from personaplug.infra.terminal_bars import TerminalBars

        _bars = TerminalBars()
    return _bars


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Hide the progress bars of transformers unless standard error is a terminal."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging  # its functions have no annotations
    is_hidden = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if is_hidden:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if is_hidden:
            bars.enable_progress_bar()
