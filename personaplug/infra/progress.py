"""Report progress from the main process: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from personaplug.infra.distributed import is_main

_SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Report progress on standard error.

    Args:
        total: total number of units; None if unknown.
        start: units that were done before a resumption.
    """

    def __init__(self, title: str, *, total: int | None, start: int = 0, unit: str = "items") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._start = start
        self._started = self._last_line = time.monotonic()
        is_bar = is_main() and sys.stderr.isatty()
        self._bar = tqdm(desc=title, total=total, initial=start, unit=unit) if is_bar else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._started > _SECONDS_BETWEEN_LINES:
            self._print_line("")

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more units, and show a note, such as a loss, next to the rate."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._print_line(note)

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the mean rate; return None if unknown."""
        done, elapsed = self.done - self._start, time.monotonic() - self._started
        return None if self.total is None or done == 0 else elapsed / done * (self.total - self.done)

    def _print_line(self, note: str) -> None:
        self._last_line = time.monotonic()
        if is_main():
            left = self.seconds_left()
            total = f"/{self.total}" if self.total else ""
            parts = (f"{self.title}: {self.done}{total} {self.unit}", note, f"{left:.0f} s left" if left else "")
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


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
