"""LaMP's official files, fetched into a folder that `open_dataset` reads.

A file has its name only once it is whole; until then it is a `.part`, which a later call goes on with. SHA256SUMS notes
what came: a file that differs from it later is an error, never taken and never replaced.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from personaplug.data.json_stream import existing_folder, plain_or_gz, stream_values, unpacked
from personaplug.data.task import Task
from personaplug.data.task_registry import LAMP_TASKS, read_task
from personaplug.errors import ConfigError, MissingData, RecordError, RunConflict, nearest
from personaplug.infra.atomic_io import atomic_write, storage_errors, write_json, write_text
from personaplug.infra.progress import Progress

logger = logging.getLogger(__name__)

BASE_URL = "https://ciir.cs.umass.edu/downloads/LaMP/"
SPLITS = ("train", "dev", "test")
SUMS = "SHA256SUMS"

_ATTEMPTS = 5
_FIRST_PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
_CHUNK = 1 << 16
_BUSY = {408, 425, 429}  # beside 5xx: the server says itself that another attempt may go well

# ---- which data there is

# The labels and the marker are LaMP's. It gives an item's fields in no order: this one is ours, after LaMP_4's.
_NEWS = Task(
    "LaMP_2_news", "label", ("title", "text", "category"), "category", ("accuracy", "f1"),
    labels=(
        "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
        "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
    ),
    query_after="article: ", max_new_tokens=12,
)  # fmt: skip


@dataclass(frozen=True)
class _Set:
    """One of the data sets: its name, its task, and the folder of its splits on the server."""

    name: str
    task: Task
    path: str


def _sets() -> dict[str, _Set]:
    sets = []
    for task in (*LAMP_TASKS.values(), _NEWS):
        # What LaMP calls LaMP-2 now is the movie task, which lies in new/ beside the older news task.
        number, inner = task.name.removesuffix("_news"), "new/" if task.name == "LaMP_2" else ""
        name = task.name.lower().replace("_", "-")
        sets += [_Set(name, task, f"{number}/{inner}"), _Set(f"{name}:time", task, f"time/{number}/{inner}")]
    return {each.name: each for each in sets}


_SETS = _sets()


def lamp_names() -> tuple[str, ...]:
    """Return the names that `download_lamp` knows: the split by users, and with `:time` the split by time."""
    return tuple(_SETS)


def download_lamp(
    name: str,
    out: str | Path,
    *,
    splits: Sequence[str] = SPLITS,
    base_url: str = BASE_URL,
    source: str | Path | None = None,
    timeout: float = 60.0,
) -> list[Path]:
    """Fetch one of LaMP's data sets into a folder of its own, and return its files.

    A file that is there and agrees with SHA256SUMS is left alone; one that broke off is gone on with.

    Args:
        name: one of `lamp_names()`, such as "lamp-3" or "lamp-2-news:time"; `LaMP_3` is the same as `lamp-3`.
        out: the folder; it is made where absent.
        splits: which of train, dev and test (whose answers are not public).
        base_url: where LaMP's folders lie.
        source: a local folder to copy from instead, without any network: the files (plain or .gz) in it, in a folder
            per split, or as they lie on the server.
        timeout: seconds that the server may be silent.

    Raises:
        ConfigError: for an unknown name, split or kind of URL, or LaMP-6, which is not public.
        MissingData: if a file is not there, or did not come whole in five attempts; what came of it stays.
        RecordError: if what came is no JSON, or a file differs from its checksum.
        RunConflict: if the folder holds something else.
        StorageError: if the disk is full or not writable.
    """
    wanted, out = _known_set(name), Path(out)
    files, base_url = _files_of(splits), _checked_url(base_url)
    origin = None if source is None else existing_folder(source)
    sums = _Sums(out, wanted.name)
    missing = [(split, file) for split, file in files if not sums.agrees(file)]
    if missing:
        _tell_terms(wanted)
        _declare(out / "task.json", wanted.task)
    for split, file in missing:
        if origin is None:
            _Download(f"{base_url}{wanted.path}{split}/{file}", out / file, timeout=timeout).run(sums)
        else:
            path = _found(origin, file, (split, f"{wanted.path}{split}"))
            _check_task(path, wanted)
            _copy(path, out / file, sums)
    return [out / file for _, file in files]


def _known_set(name: str) -> _Set:
    wanted = name.strip().lower().replace("_", "-").replace(":news", "-news")
    if re.fullmatch(r"lamp-6(:.*)?", wanted):
        raise ConfigError("LaMP-6 rests on the Avocado mails, which are not public, so it cannot be fetched.")
    if wanted not in _SETS:
        raise ConfigError(f"There is no LaMP data set {name!r}; {nearest(wanted, _SETS)}")
    return _SETS[wanted]


def _files_of(splits: Sequence[str]) -> list[tuple[str, str]]:
    """Split and name of each file; the answers of test are not public."""
    splits = (splits,) if isinstance(splits, str) else splits
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"LaMP has no split {split!r}; {nearest(split, SPLITS)}")
    parts = [(split, part) for split in splits for part in ("questions", "outputs")]
    return [(split, f"{split}_{part}.json") for split, part in parts if (split, part) != ("test", "outputs")]


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"base_url should begin with https:// or http://, found {url!r}; a local folder is a `source`."
        )
    return url if url.endswith("/") else f"{url}/"


def _tell_terms(wanted: _Set) -> None:
    logger.info(
        "%s: LaMP's data is under CC BY-NC-SA 4.0 (not commercial, share alike), and the sources it was made of have "
        "terms of their own: for research use. LaMP-6 is not public, so it is not there.",
        wanted.name,
    )


def _declare(path: Path, task: Task) -> None:
    # The official files call both LaMP-2 tasks LaMP_2, and test alone names no task at all.
    if not path.is_file():
        write_json(path, asdict(task))
    elif read_task(path) != task:
        raise RunConflict(f"{path} declares another task than {task.name}. Give a new folder.")


# ---- checksums


class _Sums:
    """The folder's SHA256SUMS, as `sha256sum -c` reads it; a comment in its first line names the data set."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / SUMS, name
        self.noted: dict[str, str] = {}
        if self.path.is_file():
            self._read(self.path.read_text(encoding="utf-8", errors="replace").splitlines())

    def _read(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, 1):
            entry = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
            if entry:
                self.noted[entry[2]] = entry[1].lower()
            elif line.startswith("# ") and line[2:] in _SETS and line[2:] != self.name:
                said = f"{self.path.parent} holds {line[2:]}, and {self.name} was asked for, whose files have the same"
                raise RunConflict(f"{said} names. Give a new folder.")
            elif line.strip() and not line.startswith("#"):
                raise RecordError(self.path, f"line {number}", reason="it is no line of sha256sum; mend or remove it")

    def agrees(self, file: str) -> bool:
        """Say whether a file is there as it was noted; False if it is not there.

        Raises:
            RunConflict: if it is there and nothing is noted of it.
            RecordError: if it differs from what is noted.
        """
        path = self.path.with_name(file)
        if not path.is_file():
            return False
        if file not in self.noted:
            said = f"{path} is there, and no {SUMS} beside it knows it, so it was not fetched by this command."
            raise RunConflict(f"{said} Give a new folder, or delete the file to fetch it.")
        if _sha256(path) != self.noted[file]:
            reason = f"its checksum is not the one in {SUMS}: it was changed or damaged; delete it to fetch it again"
            raise RecordError(path, "the whole file", reason=reason)
        return True

    def accept(self, attempt: Path, file: str, *, came_from: str) -> None:
        """Note the checksum of a file that came whole, or compare it with the one noted earlier.

        Raises:
            RecordError: if it differs from that, or is no JSON list or object.
        """
        _check_ends(attempt, came_from)
        found = _sha256(attempt)
        if self.noted.get(file, found) != found:
            reason = (
                f"it differs from what {self.path} notes of {file} and was not kept; to accept it, remove that line"
            )
            raise RecordError(came_from, "the whole file", reason=reason)
        self.noted[file] = found
        entries = [f"{digest}  {name}" for name, digest in sorted(self.noted.items())]
        write_text(self.path, "\n".join([f"# {self.name}", *entries, ""]))


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_ends(path: Path, came_from: str) -> None:
    with path.open("rb") as handle:
        start = handle.read(_CHUNK)
        handle.seek(max(path.stat().st_size - 64, 0))
        end = handle.read().rstrip()
    _check_start(start, path.name, came_from)
    if end[-1:] not in (b"]", b"}"):
        raise RecordError(came_from, "at the end", reason="it breaks off: JSON would end with ] or }; try again")


def _check_start(start: bytes, file: str, came_from: str) -> None:
    # Enough to tell a web page, such as an error or a log-in, from data; the reader checks the rest.
    opening = b"[" if "_questions.json" in file else b"{"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != opening:
        reason = (
            f"expected JSON that begins with {opening.decode()}, found something else (a web page?); look at it, or"
        )
        raise RecordError(came_from, "at the start", reason=f"{reason} give a local folder as `source`")


# ---- from a server


class _Interrupted(Exception):
    """An attempt that broke off, and why; the next one goes on from what came."""


class _Download:
    """One file on its way: the `.part`, beside it what that is a part of, and the attempts to complete it."""

    def __init__(self, url: str, target: Path, *, timeout: float) -> None:
        self.url, self.target, self.timeout = url, target, timeout
        self.part = target.with_name(f"{target.name}.part")
        self.about = target.with_name(f"{target.name}.part.json")

    def run(self, sums: _Sums) -> None:
        """Fetch the file, compare or note its checksum, and give it its name."""
        self._complete()
        try:
            sums.accept(self.part, self.target.name, came_from=self.url)
        except RecordError:
            self._forget()
            raise
        with storage_errors(self.target):
            self.part.replace(self.target)
            self.about.unlink(missing_ok=True)

    def _complete(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._attempt()
            except _Interrupted as error:
                reason = str(error)
            if attempt < _ATTEMPTS:
                logger.info(
                    "%s broke off because %s; trying again (%d of %d)", self.target.name, reason, attempt + 1, _ATTEMPTS
                )
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
        raise MissingData(
            f"{self.url} did not come whole in {_ATTEMPTS} attempts, the last time because {reason}. Run the same "
            f"command again to go on from what came, or give a local folder that holds the files as `source`."
        )

    def _attempt(self) -> None:
        told = self._told()
        have = self.part.stat().st_size if told else 0
        try:
            with urllib.request.urlopen(self._request(told, have), timeout=self.timeout) as response:
                self._receive(response, told, have)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, have)
        except (OSError, http.client.HTTPException) as error:
            # Of the disk nothing arrives here: what is stored is stored under `storage_errors`.
            raise _Interrupted(_in_words(error)) from error

    def _told(self) -> dict[str, Any]:
        """What the part is a part of; empty where there is none, or it is of another file."""
        try:
            told = json.loads(self.about.read_bytes())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) and told.get("url") == self.url and self.part.is_file() else {}

    def _request(self, told: dict[str, Any], have: int) -> urllib.request.Request:
        headers = {"User-Agent": "personaplug"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if told.get("version"):
                # The server then sends the whole file if it is no longer that version.
                headers["If-Range"] = told["version"]
        return urllib.request.Request(self.url, headers=headers)

    def _receive(self, response: http.client.HTTPResponse, told: dict[str, Any], have: int) -> None:
        length = _whole(response.headers.get("Content-Length"))
        chunks = _chunks(response, length)
        if have and response.status == 206:
            self._check_range(response, told, have)
        else:
            first = next(chunks, b"")
            if not first:
                raise _Interrupted("nothing of it came")
            # Before anything is overwritten: a page of words must not cost what came before.
            _check_start(first, self.target.name, self.url)
            have, chunks = 0, chain([first], chunks)
            self._begin(response, length)
        self._store(chunks, have, None if length is None else have + length)

    def _begin(self, response: http.client.HTTPResponse, length: int | None) -> None:
        # A weak ETag may stay the same when bytes change, and If-Range does not take it.
        tag = response.headers.get("ETag") or "W/"
        version = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        with storage_errors(self.part):
            self.part.unlink(missing_ok=True)
        write_json(self.about, {"url": self.url, "version": version, "size": length})

    def _check_range(self, response: http.client.HTTPResponse, told: dict[str, Any], have: int) -> None:
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        size = told.get("size")
        if not found or int(found[1]) != have or (size and found[2] not in ("*", str(size))):
            self._forget()
            raise _Interrupted("the server sent another part of it, or of another file, than was asked for")

    def _store(self, chunks: Iterator[bytes], have: int, size: int | None) -> None:
        with (
            Progress(self.target.name, total=size, start=have, unit="bytes") as progress,
            storage_errors(self.part),
            self.part.open("ab") as handle,
        ):
            for chunk in chunks:
                handle.write(chunk)
                progress.advance(len(chunk))
            handle.flush()
            os.fsync(handle.fileno())
        stored = self.part.stat().st_size
        if size is not None and stored < size:
            raise _Interrupted(f"the connection ended after {stored} of {size} bytes")
        if stored != progress.done:
            self._forget()
            raise _Interrupted("another process wrote to the same file")

    def _refused(self, error: urllib.error.HTTPError, have: int) -> None:
        if error.code == 416 and have:
            if error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
                return  # nothing is left to send: it was whole already
            self._forget()
            raise _Interrupted("the server has nothing from where it broke off") from error
        if error.code in _BUSY or error.code >= 500:
            raise _Interrupted(f"the server answered {error.code}") from error
        raise MissingData(
            f"{self.url} is not to be had: the server answered {error.code}. Check `base_url`, or give a local folder "
            f"that holds the files as `source`."
        ) from error

    def _forget(self) -> None:
        with storage_errors(self.part):
            self.part.unlink(missing_ok=True)
            self.about.unlink(missing_ok=True)


def _chunks(response: http.client.HTTPResponse, length: int | None) -> Iterator[bytes]:
    """What comes, up to the announced length (a server may keep the connection open after it).

    Raises:
        _Interrupted: where the connection breaks off with an error.
    """
    came = 0
    while length is None or came < length:
        try:
            chunk = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            # Caught here: among the writes it would look like an error of the disk.
            raise _Interrupted(_in_words(error)) from error
        if not chunk:
            return
        came += len(chunk)
        yield chunk


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _in_words(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"of {type(reason).__name__} ({reason})" if isinstance(reason, Exception) else f"of {reason}"


# ---- from a local folder


def _found(origin: Path, file: str, places: Sequence[str]) -> Path:
    for folder in (origin, *(origin / place for place in places)):
        path = plain_or_gz(folder, file)
        if path is not None:
            return path
    raise MissingData(f"Neither {file} nor {file}.gz is in {origin}, nor in its {' or '.join(places)}.")


def _check_task(path: Path, wanted: _Set) -> None:
    """An address says which task its files are of; a folder's answers say it themselves."""
    if "_outputs.json" in path.name:
        said = next((str(name) for _, name in stream_values(path, "task", opening=b"{", unit="key")), "")
        number = wanted.task.name.removesuffix("_news")
        if said.replace("-", "_") not in ("", number, wanted.task.name):
            raise RecordError(path, "its 'task'", reason=f"expected {number} for {wanted.name}, found another task")


def _copy(path: Path, target: Path, sums: _Sums) -> None:
    def write(attempt: Path) -> None:
        with attempt.open("wb") as copy, Progress(target.name, total=None, unit="bytes") as progress:
            for chunk in unpacked(path, size=_CHUNK):
                copy.write(chunk)
                progress.advance(len(chunk))
        sums.accept(attempt, target.name, came_from=str(path))

    atomic_write(target, write)
