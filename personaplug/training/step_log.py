"""StepLog: what each step of a training was, as JSON lines and, if asked for, as TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from personaplug.errors import MissingExtra
from personaplug.infra.atomic_io import storage_errors, write_text
from personaplug.infra.distributed import is_main


class StepLog:
    """`log.jsonl`: one JSON object a line, and TensorBoard events beside it if asked for.

    Of several processes only the main one keeps a log; the others' does nothing.
    """

    def __init__(self, folder: Path, *, after: int, tensorboard: bool) -> None:
        """Open the log.

        Args:
            folder: gets the files.
            after: lines of later steps, which a resumed training does again, are dropped.
            tensorboard: write events too.
        Raises:
            MissingExtra: if TensorBoard is asked for and not installed.
            StorageError: if the disk is full or not writable.
        """
        path = folder / "log.jsonl"
        self._path = path
        self._file: TextIO | None = None
        self._board: Any = None
        if not is_main():
            return
        with storage_errors(path):
            _drop_later_lines(path, after=after)
            self._file = path.open("a", encoding="utf-8")
        self._board = _open_board(folder) if tensorboard else None

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, *, step: int, **values: float | None) -> None:
        """Note values of a step.

        Raises:
            StorageError: if the disk is full.
        """
        if self._file is None:
            return
        with storage_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)


def _drop_later_lines(path: Path, *, after: int) -> None:
    """Forget the steps that a resumed run is going to do again, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= after:
                kept.append(line)
        except ValueError:
            break
    write_text(path, "".join(f"{line}\n" for line in kept))


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("training.tensorboard=true", extra="tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))
