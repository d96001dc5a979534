"""Download LaMP's official files into a folder that `open_dataset` reads.

A file gets its name only when it is complete. SHA256SUMS records the checksum of each file. A file that differs from
its checksum is an error; it is neither used nor replaced.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pooch
import requests

from personaplug.data.json_stream import copy_plain, existing_folder, plain_or_gz, stream_values
from personaplug.data.task import Task
from personaplug.data.task_registry import LAMP_TASKS, check_declared_task
from personaplug.errors import ConfigError, MissingData, RecordError, RunConflict, nearest
from personaplug.infra.atomic_io import storage_errors, write_json, write_text

logger = logging.getLogger(__name__)

BASE_URL = "https://ciir.cs.umass.edu/downloads/LaMP/"
SPLITS = ("train", "dev", "test")

_CHECKSUMS = "SHA256SUMS"
_RETRIES = 4
_CHUNK = 1 << 16  # bytes
_BUSY = {408, 425, 429}  # statuses besides 5xx for which a retry may succeed
_TERMS = (
    "%s: LaMP's data is licensed under CC BY-NC-SA 4.0 (non-commercial, share alike). Its sources have their own "
    "terms, so use it for research only. LaMP-6 is not public, so it cannot be downloaded."
)
_HINT = "Or set `source` to a local folder with the files."

# The labels and the marker are LaMP's. LaMP does not order an item's fields; this order follows LaMP_4.
_NEWS = Task(
    "LaMP_2_news", "label", ("title", "text", "category"), "category", ("accuracy", "f1"),
    labels=(
        "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
        "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
    ),
    query_after="article: ", max_new_tokens=12,
)  # fmt: skip


class _DataSet(NamedTuple):
    name: str
    task: Task
    path: str  # on the server


def _data_sets(ending: str, parent: str) -> Iterator[_DataSet]:
    for task in (*LAMP_TASKS.values(), _NEWS):
        # The movie task LaMP-2 is in the folder new/, next to the older news task.
        folder = "LaMP_2/new" if task.name == "LaMP_2" else task.name.removesuffix("_news")
        yield _DataSet(task.name.lower().replace("_", "-") + ending, task, f"{parent}{folder}/")


_DATA_SETS = {data_set.name: data_set for data_set in (*_data_sets("", ""), *_data_sets(":time", "time/"))}


def download_lamp(
    name: str,
    out: str | Path,
    *,
    splits: Sequence[str] = SPLITS,
    base_url: str = BASE_URL,
    source: str | Path | None = None,
) -> list[Path]:
    """Download a LaMP data set into a folder and return its files. Existing files are only checked.

    Args:
        name: such as "lamp-3" or "lamp-2-news" for the split by user; append ":time" for the split by time.
        splits: the splits; the answers of test are not public.
        source: a local folder to copy from instead. It contains the files (plain or .gz) directly, in a folder per
            split, or in the server's layout.
    """
    data_set, out = _find_data_set(name), Path(out)
    splits = (splits,) if isinstance(splits, str) else splits
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"LaMP has no split {split!r}; {nearest(split, SPLITS)}")
    files = [(split, f"{split}_{part}.json") for split in splits for part in ("questions", "outputs")]
    files = [(split, file) for split, file in files if file != "test_outputs.json"]
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url should begin with https:// or http://, found {base_url!r}. {_HINT}")
    origin = None if source is None else existing_folder(source)
    checksums = _Checksums(out, data_set.name)
    missing = [(split, file) for split, file in files if not checksums.has_valid_file(file)]
    if missing:
        logger.info(_TERMS, data_set.name)
        check_declared_task(out, data_set.task)
        # Official files name both LaMP-2 tasks LaMP_2, and test files name no task.
        write_json(out / "task.json", asdict(data_set.task))
    for split, file in missing:
        if origin is None:
            url = f"{base_url.rstrip('/')}/{data_set.path}{split}/{file}"
            _fetch(url, out / file, checksums, download=_download)
        else:
            path = _find_local(origin, file, folders=(split, f"{data_set.path}{split}"))
            _check_named_task(path, data_set)
            _fetch(str(path), out / file, checksums, download=copy_plain)
    return [out / file for _, file in files]


def _find_data_set(name: str) -> _DataSet:
    key = name.strip().lower().replace("_", "-").replace(":news", "-news")
    if re.fullmatch(r"lamp-6(:.*)?", key):
        raise ConfigError("LaMP-6 cannot be downloaded: it contains the Avocado emails, which are not public.")
    if key not in _DATA_SETS:
        raise ConfigError(f"There is no LaMP data set {name!r}; {nearest(key, _DATA_SETS)}")
    return _DATA_SETS[key]


class _Checksums:
    """The folder's SHA256SUMS, in the format of `sha256sum`; a comment names the data set."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / _CHECKSUMS, name
        self.digests: dict[str, str] = {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            if match := re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line):
                self.digests[match[2]] = match[1].lower()
            elif line.startswith("# ") and line[2:] in _DATA_SETS and line[2:] != name:
                conflict = f"{folder} holds {line[2:]}, whose files have the same names as the files of {name}"
                raise RunConflict(f"{conflict}. Choose a new folder.")
            elif line.strip() and not line.startswith("#"):
                raise RecordError(self.path, f"line {number}", reason="it is not in the format of sha256sum")

    def has_valid_file(self, file: str) -> bool:
        """Return whether a file exists, and raise an error if its checksum is missing or differs."""
        path = self.path.with_name(file)
        if not path.is_file():
            return False
        if file not in self.digests:
            raise RunConflict(
                f"{path} exists, but {_CHECKSUMS} does not list it, so this command did not download it. "
                "Choose a new folder, or delete the file."
            )
        if pooch.file_hash(str(path)) != self.digests[file]:
            reason = f"its checksum differs from {_CHECKSUMS}: changed or damaged; delete the file to download it again"
            raise RecordError(path, "the whole file", reason=reason)
        return True

    def record(self, file: str, digest: str, *, source: str) -> None:
        """Record the checksum of a new file, or compare it with the one recorded earlier."""
        if self.digests.setdefault(file, digest) != digest:
            reason = f"it differs from the checksum in {self.path}; remove that line to accept the new file"
            raise RecordError(source, "the whole file", reason=reason)
        lines = [f"{digest}  {file}" for file, digest in sorted(self.digests.items())]
        write_text(self.path, "\n".join([f"# {self.name}", *lines, ""]))


def _fetch(source: str, path: Path, checksums: _Checksums, *, download: Callable[[str, Path], None]) -> None:
    """Let pooch write a draft with `download`, try again if the connection fails, and rename the draft."""

    def checked_download(source: str, draft: str, _: pooch.Pooch) -> None:
        Path(draft).unlink()  # pooch makes it readable only for its owner
        download(source, Path(draft))
        _check_json(Path(draft), source, is_list=path.name.endswith("_questions.json"))
        checksums.record(path.name, pooch.file_hash(draft), source=source)

    store = pooch.Pooch(path.parent, "", registry={path.name: None}, urls={path.name: source}, retry_if_failed=_RETRIES)
    with storage_errors(path):
        try:
            store.fetch(path.name, downloader=checked_download)
        except requests.RequestException as error:
            failure = f"{_RETRIES + 1} attempts ({_status(error) or type(error).__name__})"
            raise MissingData(f"{source} was not downloaded after {failure}. Try again later. {_HINT}") from error


def _download(url: str, draft: Path) -> None:
    headers = {"User-Agent": "personaplug"}
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=_CHUNK, headers=headers)
    try:
        downloader(url, str(draft), None)
    except requests.HTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in _BUSY:
            raise  # pooch tries again
        raise MissingData(f"{url} is not available: {_status(error)}. Check `base_url`. {_HINT}") from error


def _status(error: requests.RequestException) -> str:
    return "" if error.response is None else f"the server answered {error.response.status_code}"


def _check_json(path: Path, source: str, *, is_list: bool) -> None:
    """Check the first and the last bracket, to detect a web page or a truncated file."""
    opening, closing = (b"[", b"]") if is_list else (b"{", b"}")
    with path.open("rb") as file:
        start = file.read(_CHUNK)
        file.seek(max(path.stat().st_size - 64, 0))
        end = file.read()
    if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(opening):
        reason = f"expected JSON that begins with {opening.decode()}, found something else (a web page?). {_HINT}"
        raise RecordError(source, "at the start", reason=reason)
    if not end.rstrip().endswith(closing):
        reason = f"the file is truncated: expected {closing.decode()} at the end; try again"
        raise RecordError(source, "at the end", reason=reason)


def _find_local(origin: Path, file: str, *, folders: Sequence[str]) -> Path:
    for name in ("", *folders):
        if path := plain_or_gz(origin / name, file):
            return path
    raise MissingData(f"Neither {file} nor {file}.gz is in {origin} or its folders {' and '.join(folders)}.")


def _check_named_task(path: Path, data_set: _DataSet) -> None:
    """Check the task that an outputs file names. A URL needs no check because it contains the task."""
    if "_outputs.json" not in path.name:
        return
    _, name = next(stream_values(path, "task", opening=b"{", unit="key"), (0, data_set.task.name))
    expected = data_set.task.name.removesuffix("_news")
    if str(name).replace("-", "_") not in (expected, data_set.task.name):
        raise RecordError(path, "its 'task'", reason=f"expected {expected} for {data_set.name}, found another task")
