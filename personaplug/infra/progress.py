"""Progress: a bar on a terminal, a line now and then elsewhere, numbers only; of several processes one tells it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from personaplug.infra.distributed import is_main

_SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Reports how far a long piece of work is, on standard error.

    Args:
        title: what is being done.
        total: how many units it has; None if unknown.
        start: units done earlier, such as the steps before a resumption.
        unit: what one unit is called.
    """

    def __init__(self, title: str, *, total: int | None, start: int = 0, unit: str = "items") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self._start = start, start
        self._began = self._said = time.monotonic()
        self._bar = (
            tqdm(desc=title, total=total, initial=start, unit=unit) if is_main() and sys.stderr.isatty() else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._began > _SECONDS_BETWEEN_LINES:
            self._say("")

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more units; `note` shows beside the rate (a loss, say)."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._say(note)

    def seconds_left(self) -> float | None:
        """Time left at the mean rate so far; None while that is unknown."""
        made, spent = self.done - self._start, time.monotonic() - self._began
        return None if self.total is None or made == 0 else spent / made * (self.total - self.done)

    def _say(self, note: str) -> None:
        self._said = time.monotonic()
        if not is_main():
            return
        left = self.seconds_left()
        parts = [f"{self.title}: {self.done}{f'/{self.total}' if self.total else ''} {self.unit}"]
        parts += [note] if note else []
        parts += [f"{left:.0f} s left"] if left else []
        print(", ".join(parts), file=sys.stderr, flush=True)
