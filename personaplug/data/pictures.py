"""Picture: the picture of a history item, as bytes or as a file. Nothing here decodes it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, Protocol

from personaplug.data.values import Flaw
from personaplug.errors import MissingData

MAX_PICTURE_BYTES = 32 * 2**20
"""The largest picture that a reader accepts."""

MAX_PIXELS = 50_000_000
"""The largest number of pixels that a picture may have; decoding takes three bytes for each."""

PICTURE_KEYS = frozenset({"bytes", "path"})
"""The keys of a picture in the data sets of Hugging Face; one of them has a value."""

_SIGNATURES = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "bmp": re.compile(rb"BM"),
}
FORMATS = tuple(_SIGNATURES)
"""The names of the formats that a picture may have."""

_DATA_URL = re.compile(r"data:image/[\w.+-]{1,32};base64,", re.ASCII | re.IGNORECASE)
_FORMS = "a data URL such as data:image/png;base64,…"


class MissingPicture(Flaw):
    """A path names no file."""


class StoredBytes(Protocol):
    """Bytes that are stored somewhere else than in a named file."""

    @property
    def digest(self) -> bytes:
        """See `Picture.digest`."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Picture:
    """A picture. Two pictures are equal if their bytes are.

    Attributes:
        source: the bytes, or the place that holds them; they are read when they are needed.
    """

    source: bytes | Path | StoredBytes

    def read(self) -> bytes:
        """Return the bytes; raise MissingData if the file is gone."""
        if isinstance(self.source, bytes):
            return self.source
        if not isinstance(self.source, Path):
            return self.source.read()
        with _readable(self.source):
            return self.source.read_bytes()

    @property
    def digest(self) -> bytes:
        """The 16-byte hash of the bytes."""
        if isinstance(self.source, bytes):
            return _digest(self.source)
        if not isinstance(self.source, Path):
            return self.source.digest
        with _readable(self.source):
            status = self.source.stat()
            return _digest_of_file(self.source, status.st_mtime_ns, status.st_size)

    @property
    def format(self) -> str:
        """The name of the file format, such as `png`."""
        return format_of(self.read()) or "unknown"

    def to_url(self) -> str:
        """Return the picture as a data URL."""
        content = self.read()
        return f"data:image/{format_of(content)};base64,{base64.b64encode(content).decode('ascii')}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return "Picture(file)" if isinstance(self.source, Path) else "Picture(bytes)"


def picture_of(value: object, what: str, *, folder: Path | None = None) -> Picture | None:
    """Convert a value to a picture; None, an empty text and empty bytes are no picture.

    A value is bytes, a data URL, a mapping with `bytes` or `path`, as in Parquet files of Hugging Face data sets, or an
    image of Pillow.

    Args:
        what: the value in messages.
        folder: the folder of relative paths; None = paths are refused, because the value comes from a stranger.
    """
    if isinstance(value, Mapping) and PICTURE_KEYS & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Picture):
        return value
    if value is None or (isinstance(value, str | bytes) and not value):
        return None
    if hasattr(value, "getbands") and hasattr(value, "save"):
        return _of_image(value, what)
    if isinstance(value, bytes | bytearray | memoryview):
        return _checked(bytes(value), what)
    if isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, str):
        raise Flaw(f"{what} is no picture: expected {_FORMS}")
    value = value.strip()
    if match := _DATA_URL.match(value):
        return _checked(_decoded(value[match.end() :], what), what)
    if is_data_url(value):
        raise Flaw(f"{what} is a data URL of another kind: expected {_FORMS}")
    if folder is None:
        raise Flaw(f"{what} is no picture: expected {_FORMS}")
    return _file(folder / value, what)


def is_data_url(text: str) -> bool:
    """Return whether a text is a data URL, so no path; spaces before it do not count."""
    return text[:64].lstrip()[:5].casefold() == "data:"


def is_picture_url(text: str) -> bool:
    """Return whether a text is a data URL of a picture; spaces before it do not count."""
    return text[:64].lstrip()[:11].casefold() == "data:image/"


def is_file(path: Path) -> bool:
    """Return whether a path names a file; False for a name that is too long, or with a null character."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def format_of(content: bytes) -> str | None:
    """Return the format of a picture by its first bytes: png, jpeg, gif, webp or bmp; None = none of them."""
    return next((name for name, signature in _SIGNATURES.items() if signature.match(content)), None)


def _decoded(text: str, what: str) -> bytes:
    if len(text) > MAX_PICTURE_BYTES * 4 // 3 + 4:
        raise _too_large(what)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Flaw(f"{what} is no picture: its base64 is not valid") from None


def _of_image(image: Any, what: str) -> Picture:
    """Return an image of Pillow as PNG."""
    content = io.BytesIO()
    try:
        eight_bits(image).convert("RGBA").save(content, "PNG")
    except Exception as error:  # Pillow reads the pixels of a file only now
        raise Flaw(f"{what} is an image that cannot be read ({type(error).__name__})") from None
    return _checked(content.getvalue(), what)


def eight_bits(image: Any) -> Any:
    """Return an image of Pillow with at most eight bits for a value; Pillow itself would cut gray values of 16 bits."""
    return image.convert("I").point(lambda value: value / 256).convert("L") if image.mode[0] == "I" else image


def _checked(content: bytes, what: str) -> Picture:
    if len(content) > MAX_PICTURE_BYTES:
        raise _too_large(what)
    if format_of(content) is None:
        raise Flaw(f"{what} is no picture in one of the formats {', '.join(FORMATS)}")
    return Picture(content)


def _file(path: Path, what: str) -> Picture:
    if not is_file(path):
        raise MissingPicture(f"{what} names a file that does not exist")
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise _too_large(what)
    with path.open("rb") as file:
        if format_of(file.read(16)) is None:
            raise Flaw(f"{what} names a file that is no picture in one of the formats {', '.join(FORMATS)}")
    return Picture(path.absolute())


def _too_large(what: str) -> Flaw:
    return Flaw(f"{what} is larger than {MAX_PICTURE_BYTES // 2**20} MiB")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MissingData(f"The picture {path} cannot be read: {error.strerror}.") from None


@lru_cache(maxsize=1 << 16)
def _digest_of_file(path: Path, changed: int, size: int) -> bytes:
    """Return the digest of a file; its time of change and its size are part of the cache's key."""
    return _digest(path.read_bytes())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
