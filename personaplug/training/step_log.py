"""The log of a training: one JSON line per step and, optionally, TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from personaplug.errors import MissingExtra
from personaplug.infra.atomic_io import storage_errors, write_text
from personaplug.infra.distributed import is_main


class StepLog:
    """Writes `log.jsonl` and, optionally, TensorBoard events beside it; only in the main process.

    Args:
        after: drop lines of later steps, which a resumed training repeats.
    """

    def __init__(self, folder: Path, *, after: int, tensorboard: bool) -> None:
        self._path = folder / "log.jsonl"
        self._file: TextIO | None = None
        self._events: Any = None
        if is_main():
            with storage_errors(self._path):
                _drop_lines_after(after, self._path)
                self._file = self._path.open("a", encoding="utf-8")
            self._events = _open_tensorboard(folder) if tensorboard else None

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._file, self._events):
            if writer is not None:
                writer.close()

    def write(self, *, step: int, **values: float | None) -> None:
        if self._file is None:
            return
        with storage_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for name, value in values.items() if self._events else ():
            if value is not None:
                self._events.add_scalar(name, value, step)


def _drop_lines_after(step: int, path: Path) -> None:
    """Drop the lines of later steps, and a last line that a killed process cut off."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except ValueError:
            break
    write_text(path, "".join(f"{line}\n" for line in lines))


def _open_tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("training.tensorboard=true", extra="tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))
