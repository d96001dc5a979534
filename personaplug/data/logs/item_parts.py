"""Pictures and vectors in the rows of a log."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt

from personaplug.data.logs.column_names import IMAGE_NAMES, VECTOR_NAMES, key_of, rank_of
from personaplug.data.logs.options import LogOptions
from personaplug.data.parsing import vector_of
from personaplug.data.pictures import PICTURE_KEYS, Picture, format_of, is_data_url, is_file, is_picture_url, picture_of
from personaplug.data.values import Flaw
from personaplug.errors import StorageError
from personaplug.infra.json_parsing import parse_json

Vector = npt.NDArray[np.float32]
Part = Picture | Vector | Flaw
"""A picture, a vector, or the defect of a value that should be one."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"})


class PictureFile:
    """A temporary file for the pictures of a log, so that they are not held in memory.

    The file has no name, so nothing of it is left when the last of its pictures or the process is gone.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}  # start and size by digest

    @cached_property
    def _file(self) -> FileIO:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # open as long as this object
        weakref.finalize(self, file.close)
        return file

    def keep(self, picture: Picture) -> Picture:
        """Write a picture to the file, unless an equal one is there, and return the stored one.

        Raises:
            StorageError: if the disk is full.
        """
        if isinstance(picture.source, Path):
            return picture
        digest = picture.digest
        if digest not in self._places:
            self._places[digest] = self._write(picture.read())
        return Picture(_FilePart(self, *self._places[digest], digest))

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, start)

    def _write(self, content: bytes) -> tuple[int, int]:
        start = self._file.tell()
        try:
            written = self._file.write(content)
        except OSError:
            written = -1
        if written != len(content):
            raise StorageError(
                f"The pictures of the log do not fit into a temporary file in {tempfile.gettempdir()}. Name a larger "
                f"folder by the variable TMPDIR."
            )
        return start, len(content)


@dataclass(frozen=True, slots=True, repr=False)
class _FilePart:
    file: PictureFile
    start: int
    size: int
    digest: bytes

    def read(self) -> bytes:
        return self.file.read(self.start, self.size)


@dataclass(frozen=True)
class PartReader:
    """Finds the pictures and vectors of rows, in named columns and, if the options allow it, in others.

    Attributes:
        folder: of relative paths.
        file: where pictures are kept; None = in memory, because the caller holds them anyway.
    """

    options: LogOptions
    folder: Path
    file: PictureFile | None
    _names: dict[str, tuple[bool, bool]] = field(default_factory=dict)

    def part_of(self, name: str, value: object) -> Part | None:
        """Return the picture or the vector in a column, or its defect; None for a value of another kind."""
        try:
            part = self._find(name, value)
        except Flaw as flaw:
            return flaw
        return self.file.keep(part) if self.file and isinstance(part, Picture) else part

    def _find(self, name: str, value: object) -> Part | None:
        options = self.options
        if name == options.vector:
            return _vector_of(value)
        if name == options.image:
            return self._picture_at(value) if is_path(value) else _picture_of(value, self.folder)
        if not options.detects_parts:
            return None
        if name not in self._names:
            key = key_of(name)
            self._names[name] = rank_of(key, IMAGE_NAMES) is not None, rank_of(key, VECTOR_NAMES) is not None
        may_be_picture, may_be_vector = self._names[name]
        if may_be_vector and not isinstance(value, str):
            return _vector_of(value)
        if may_be_picture and is_path(value):
            return self._picture_at(value) if _is_picture_name(str(value)) else None
        return _picture_of(value, self.folder) if _must_be_picture(value) else None

    def _picture_at(self, value: object) -> Picture | None:
        """Return the picture of a file; None if there is no such file, because the value may be something else."""
        path = str(value).strip()
        return _picture_of(path, self.folder) if path and is_file(self.folder / path) else None


class OtherWidth(Flaw):
    """A vector is not as wide as most of its column."""


def with_one_width(parts: Sequence[Mapping[str, Part]], column: str) -> list[Mapping[str, Part]]:
    """Return the parts of rows with `OtherWidth` for each vector that is not as wide as most of its column."""
    widths = Counter(len(part) for of_row in parts if isinstance(part := of_row.get(column), np.ndarray))
    width = widths.most_common(1)[0][0] if widths else 0
    return [
        {**of_row, column: OtherWidth(f"it has {len(part)} numbers, and most have {width}")}
        if isinstance(part := of_row.get(column), np.ndarray) and len(part) != width
        else of_row
        for of_row in parts
    ]


def is_path(value: object) -> bool:
    """Return True for a text that is no data URL: it may be the path of a picture, or a text."""
    return isinstance(value, PurePath) or (isinstance(value, str) and not is_data_url(value))


def _is_picture_name(text: str) -> bool:
    return "://" not in text and PurePath(text.strip()).suffix.casefold() in _SUFFIXES


def _picture_of(value: object, folder: Path) -> Picture | None:
    return picture_of(value, "it", folder=folder)


def _must_be_picture(value: object) -> bool:
    """Return True for a value that is a picture and cannot be a text."""
    if isinstance(value, str):
        return is_picture_url(value)
    if isinstance(value, bytes | bytearray | memoryview):
        start = bytes(value[:32])
        return format_of(start) is not None and b"\0" in start
    if isinstance(value, Mapping):
        return value.keys() == PICTURE_KEYS
    return hasattr(value, "getbands")


def _vector_of(value: object) -> Vector | None:
    """Return a list of numbers as float32, (E,); CSV files have such lists as JSON. None if it is no list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value.encode())
        except ValueError as error:
            raise Flaw(str(error)) from None
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    return np.frombuffer(vector_of(value, "it"), dtype="<f4")
