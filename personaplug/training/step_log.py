"""The log of a training: one JSON line per step and per validation, and the trackers of `report_to`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from personaplug.infra.atomic_io import storage_errors, write_text
from personaplug.infra.distributed import is_main
from personaplug.infra.trackers import ReportTo, Trackers

_TAGS = {
    "loss": "train/loss",
    "gradient_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "samples_per_second": "train/samples_per_second",
    "validation_loss": "eval/loss",
    "personal_gain": "eval/personal_gain",
}
"""The values that trackers get, and their names there, which are those of transformers if it has the value."""


class StepLog:
    """Writes `log.jsonl` and reports to trackers; only in the main process.

    Args:
        after: drop lines of later steps, which a resumed training repeats.
        owner, config: see `Trackers`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        after: int,
        report_to: ReportTo = "none",
        owner: str = "",
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._path = folder / "log.jsonl"
        self._file: TextIO | None = None
        self._trackers: Trackers | None = None
        if is_main():
            self._trackers = Trackers(report_to, folder=folder, owner=owner, config=config or {}, after=after)
            with storage_errors(self._path):
                _drop_lines_after(after, self._path)
                self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._file, self._trackers):
            if writer is not None:
                writer.close()

    def write(self, *, step: int, **values: float | None) -> None:
        if self._file is None or self._trackers is None:
            return
        with storage_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        known = {_TAGS[name]: value for name, value in values.items() if name in _TAGS and value is not None}
        self._trackers.log(known, step=step)


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
