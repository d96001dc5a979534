"""A pseudo-terminal that runs a command and shows what a user sees."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyte

_ROWS = 60
_PATIENCE_S = 120


def _take_terminal() -> None:
    """Make standard input the controlling terminal; let Ctrl-C work, which a shell disables in background jobs."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A command on a terminal with some columns, and its screen.

    Args:
        words: the words after `python`.
        stdout: where standard output goes instead of the terminal; None = the terminal.
        echoes: whether the terminal shows the keys that are sent.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        columns: int = 100,
        variables: Mapping[str, str] | None = None,
        stdout: Any = None,
        echoes: bool = True,
    ) -> None:
        self._screen = pyte.Screen(columns, _ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._own_end, other_end = pty.openpty()
        fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        modes = termios.tcgetattr(other_end)
        modes[3] |= termios.NOFLSH  # otherwise Ctrl-C drops what the command has written and nobody has read
        if not echoes:
            modes[3] &= ~termios.ECHO
        termios.tcsetattr(other_end, termios.TCSANOW, modes)
        self.output = b""
        # These variables, which another test may set, would replace the size of the terminal.
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdin=other_end,
            stdout=other_end if stdout is None else stdout,
            stderr=other_end,
            env={**inherited, "TERM": "xterm-256color", **(variables or {})},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(other_end)

    @property
    def lines(self) -> list[str]:
        """The lines on the screen, without empty ones."""
        return [line.rstrip() for line in self._screen.display if line.strip()]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def shows_cursor(self) -> bool:
        return not self._screen.cursor.hidden

    def send(self, keys: bytes) -> None:
        os.write(self._own_end, keys)

    def wait_until(self, is_reached: Callable[[Terminal], bool]) -> None:
        """Read the output until the screen has some state. Bars write without end, so this has a time limit."""
        deadline = time.monotonic() + _PATIENCE_S
        while not is_reached(self):
            assert time.monotonic() < deadline, f"the screen does not get there; it shows:\n{self.text}"
            assert self._read(), f"the command has ended; the screen shows:\n{self.text}"

    def wait(self) -> int:
        """Read the output until the command ends; return its exit code."""
        while self._read():
            pass
        os.close(self._own_end)
        return self.process.wait()

    def _read(self) -> bool:
        """Read a part of the output; return whether there may be more."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if select.select([self._own_end], [], [], 1.0)[0]:
                try:
                    part = os.read(self._own_end, 65_536)
                except OSError:  # the other end is closed
                    return False
                self.output += part
                self._stream.feed(part)
                return bool(part)
            if self.process.poll() is not None:
                return False
        raise AssertionError(f"the command writes nothing; the screen shows:\n{self.text}")
