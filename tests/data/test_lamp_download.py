"""LaMP's official files, fetched from a server that misbehaves in every way a server can."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from personaplug.data import LAMP_TASKS, load_task, open_dataset
from personaplug.data import lamp_download as module
from personaplug.data.lamp_download import download_lamp, lamp_names
from personaplug.errors import ConfigError, MissingData, RecordError, RunConflict, StorageError

SECRET = "zanzibar"  # stands in every text here, and must stand in no error


def questions(count: int, *, word: str = SECRET) -> bytes:
    item = {"id": "i", "text": word * 1000, "score": 4}
    records = [{"id": str(n), "input": f"review: {word} {n}", "profile": [item]} for n in range(count)]
    return json.dumps(records).encode()


def outputs(count: int) -> bytes:
    return json.dumps({"task": "LaMP_3", "golds": [{"id": str(n), "output": "4"} for n in range(count)]}).encode()


@dataclass
class Site:
    """What the server has, how it misbehaves at each next request, and what it was asked."""

    files: dict[str, bytes]
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    faults: list[Any] = field(default_factory=list)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def version(self) -> str | None:
        return self.etag or self.modified

    def of(self, name: str) -> list[str | None]:
        """The ranges that were asked of a file."""
        return [wanted for path, wanted, _ in self.asked if path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        site, wanted = self.server.site, self.headers.get("Range")
        site.asked.append((self.path, wanted, self.headers.get("If-Range")))
        fault = site.faults.pop(0) if site.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
        elif self.path not in site.files:
            self.send_error(404)
        else:
            self.answer(site, site.files[self.path], wanted, fault or ("whole", None))

    def answer(self, site: Site, body: bytes, wanted: str | None, fault: tuple[str, int | None]) -> None:
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and site.ranges else 0
        if self.headers.get("If-Range") not in (None, site.version):
            start = 0
        kind, sent = fault
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            shift = 7 if kind == "other part" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        for name, value in (("ETag", site.etag), ("Last-Modified", site.modified)):
            if value:
                self.send_header(name, value)
        if kind != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:sent])
        self.wfile.flush()
        if kind == "stall":
            site.released.wait(30)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    site: Site


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    place = Site({})
    for split, count in (("train", 3), ("dev", 40), ("test", 2)):
        place.files[f"/LaMP_3/{split}/{split}_questions.json"] = questions(count)
        if split != "test":
            place.files[f"/LaMP_3/{split}/{split}_outputs.json"] = outputs(count)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.site, place.url = place, f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield place
        place.released.set()
        server.shutdown()
        thread.join()


DEV = "/LaMP_3/dev/dev_questions.json"


def fetch(site: Site, out: Path, **settings: Any) -> list[Path]:
    settings = {"splits": ["dev"], "base_url": site.url, "timeout": 10.0, **settings}
    return download_lamp("lamp-3", out, **settings)


def is_complete(site: Site, out: Path) -> bool:
    names = sorted(path.name for path in out.iterdir())
    assert names == ["SHA256SUMS", "dev_outputs.json", "dev_questions.json", "task.json"]
    return (out / "dev_questions.json").read_bytes() == site.files[DEV]


# ---- names and addresses


@pytest.mark.parametrize(
    ("name", "path", "task"),
    [
        ("lamp-1", "/LaMP_1/", "LaMP_1"),
        ("LaMP_3", "/LaMP_3/", "LaMP_3"),
        ("lamp-7:time", "/time/LaMP_7/", "LaMP_7"),
        ("lamp-2", "/LaMP_2/new/", "LaMP_2"),
        ("LaMP_2:time", "/time/LaMP_2/new/", "LaMP_2"),
        ("lamp-2-news", "/LaMP_2/", "LaMP_2_news"),
        ("lamp-2:news", "/LaMP_2/", "LaMP_2_news"),
        ("lamp-2-news:time", "/time/LaMP_2/", "LaMP_2_news"),
    ],
)
def test_each_name_has_its_address_and_its_task(tmp_path: Path, site: Site, name: str, path: str, task: str) -> None:
    wanted = [f"{path}{split}/{split}_questions.json" for split in ("train", "dev", "test")]
    wanted += [f"{path}{split}/{split}_outputs.json" for split in ("train", "dev")]
    site.files = {each: questions(1) if "questions" in each else outputs(1) for each in wanted}
    found = download_lamp(name, tmp_path, base_url=site.url.removesuffix("/"))
    assert sorted(each for each, _, _ in site.asked) == sorted(wanted)
    assert [path.name for path in found] == [
        "train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json", "test_questions.json",
    ]  # fmt: skip
    assert load_task(tmp_path).name == task
    assert load_task(tmp_path) == LAMP_TASKS.get(task, module._NEWS)


def test_lamp_6_is_refused_and_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    for name in ("lamp-6", "LaMP_6:time"):
        with pytest.raises(ConfigError, match=r"Avocado.*not public"):
            download_lamp(name, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'lamp-3:time'"):
        download_lamp("lamp-3:tine", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        download_lamp("lamp-3", tmp_path, splits=["trian"])
    with pytest.raises(ConfigError, match="base_url should begin with https://"):
        download_lamp("lamp-3", tmp_path, base_url="file:///etc/")
    assert "lamp-2-news:time" in lamp_names()
    assert not [name for name in lamp_names() if "6" in name]
    assert not list(tmp_path.iterdir())


def test_the_news_task_reads_the_older_files(tmp_path: Path, site: Site) -> None:
    item = {"id": "i", "text": "t", "title": "h", "category": "food & drink"}
    asked = [
        {"id": "1", "input": "Which category does this article relate to … article: An article", "profile": [item]}
    ]
    gold = {"task": "LaMP_2", "golds": [{"id": "1", "output": "food & drink"}]}
    site.files = {"/LaMP_2/dev/dev_questions.json": json.dumps(asked).encode()}
    site.files["/LaMP_2/dev/dev_outputs.json"] = json.dumps(gold).encode()
    download_lamp("lamp-2-news", tmp_path, splits=["dev"], base_url=site.url)
    (sample,) = open_dataset(tmp_path, "dev")
    assert (sample.query, sample.target, sample.history[0].answer) == ("An article", "food & drink", "food & drink")
    assert len(module._NEWS.labels) == len(set(module._NEWS.labels)) == 15


# ---- a whole download


def test_what_was_fetched_is_read_and_is_not_fetched_again(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fetch(site, tmp_path)
    assert is_complete(site, tmp_path)
    samples = list(open_dataset(tmp_path, "dev"))
    assert (len(samples), samples[7].target, samples[7].query) == (40, "4", f"{SECRET} 7")
    assert [record.message.count("CC BY-NC-SA 4.0") for record in caplog.records] == [1]
    assert "LaMP-6 is not public" in caplog.text
    caplog.clear()
    site.asked.clear()
    fetch(site, tmp_path)
    assert (site.asked, caplog.records) == ([], [])


def test_the_test_split_alone_is_readable(tmp_path: Path, site: Site) -> None:
    (path,) = fetch(site, tmp_path, splits="test")
    assert path.name == "test_questions.json"
    assert [sample.target for sample in open_dataset(tmp_path, "test")] == [None, None]


def test_checksums_are_in_the_form_of_sha256sum(tmp_path: Path, site: Site) -> None:
    fetch(site, tmp_path)
    digest = hashlib.sha256(site.files[DEV]).hexdigest()
    assert f"{digest}  dev_questions.json\n" in (tmp_path / "SHA256SUMS").read_text()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True)
    fetch(site, tmp_path, splits=["train"])
    assert (tmp_path / "SHA256SUMS").read_text().count("\n") == 5


# ---- connections that break


@pytest.mark.parametrize("kind", ["whole", "stall"])
def test_a_dropped_connection_is_gone_on_with(tmp_path: Path, site: Site, kind: str) -> None:
    site.faults = [(kind, 50_000), 503, (kind, 30_000)]
    fetch(site, tmp_path, timeout=0.2 if kind == "stall" else 10.0)
    assert is_complete(site, tmp_path)
    assert site.of("dev_questions.json") == [None, "bytes=50000-", "bytes=50000-", "bytes=80000-"]
    assert {wanted for path, _, wanted in site.asked if path == DEV} == {None, '"one"'}


def test_the_pauses_grow_and_end(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(module, "_FIRST_PAUSE", 1.0)
    monkeypatch.setattr(time, "sleep", paused.append)
    site.faults = [503] * 5
    with pytest.raises(MissingData, match=r"dev_questions\.json did not come whole in 5 attempts.*503.*`source`"):
        fetch(site, tmp_path)
    assert paused == [1.0, 2.0, 4.0, 8.0]
    assert len(site.asked) == 5


def test_a_server_that_cannot_be_reached_is_an_error_that_says_so(tmp_path: Path, site: Site) -> None:
    site.faults = [("whole", 50_000)] + [500] * 4
    with pytest.raises(MissingData, match="500"):
        fetch(site, tmp_path)
    with pytest.raises(MissingData, match=r"ConnectionRefusedError.*go on from what came"):
        fetch(site, tmp_path, base_url="http://127.0.0.1:1/")
    assert (tmp_path / "dev_questions.json.part").stat().st_size == 50_000


def test_a_killed_download_is_gone_on_with_by_the_next_call(tmp_path: Path, site: Site) -> None:
    site.faults, site.files["/LaMP_3/train/train_questions.json"] = [("stall", 150_000)], questions(40)
    code = (
        "import sys; from personaplug.data.lamp_download import download_lamp; "
        "download_lamp('lamp-3', sys.argv[1], base_url={!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code.format(site.url), str(tmp_path)], stderr=subprocess.DEVNULL)
    part = tmp_path / "train_questions.json.part"
    try:
        while process.poll() is None and not (part.is_file() and part.stat().st_size):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    came = part.stat().st_size
    assert 0 < came <= 150_000
    site.asked.clear()
    fetch(site, tmp_path, splits=["train"])
    assert site.of("train_questions.json") == [f"bytes={came}-"]
    assert (tmp_path / "train_questions.json").read_bytes() == questions(40)
    assert not list(tmp_path.glob("*.part*"))


def broken_off(site: Site, out: Path, *, after: int = 50_000) -> None:
    """Leave a part of the questions, and a server that is well again."""
    site.faults = [("whole", after)] + [503] * 4
    with pytest.raises(MissingData):
        fetch(site, out)
    assert (out / "dev_questions.json.part").stat().st_size == after
    site.asked.clear()


def test_a_server_without_ranges_sends_all_of_it_anew(tmp_path: Path, site: Site) -> None:
    site.ranges = False
    broken_off(site, tmp_path)
    fetch(site, tmp_path)
    assert site.of("dev_questions.json") == ["bytes=50000-"]
    assert is_complete(site, tmp_path)


@pytest.mark.parametrize(
    ("etag", "modified", "later"),
    [
        ('"one"', None, {"etag": '"two"'}),
        (None, "Mon, 01 Jan 2024 00:00:00 GMT", {"modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ('W/"one"', None, {"etag": 'W/"two"'}),
        (None, None, {}),
    ],
)
def test_a_file_that_changed_meanwhile_is_not_glued_to_what_came(
    tmp_path: Path, site: Site, etag: str | None, modified: str | None, later: dict[str, str]
) -> None:
    site.etag, site.modified = etag, modified
    broken_off(site, tmp_path)
    site.files[DEV] = questions(45, word="another")
    site.files["/LaMP_3/dev/dev_outputs.json"] = outputs(45)
    for name, value in later.items():
        setattr(site, name, value)
    fetch(site, tmp_path)
    assert is_complete(site, tmp_path)
    assert len(list(open_dataset(tmp_path, "dev"))) == 45


def test_a_part_of_another_address_is_not_gone_on_with(tmp_path: Path, site: Site) -> None:
    broken_off(site, tmp_path)
    site.files |= {f"/time{path}": body for path, body in site.files.items()}
    download_lamp("lamp-3:time", tmp_path, splits=["dev"], base_url=site.url)
    assert site.of("dev_questions.json") == [None]
    assert is_complete(site, tmp_path)


def test_a_part_of_something_else_than_asked_for_is_dropped(tmp_path: Path, site: Site) -> None:
    broken_off(site, tmp_path)
    site.faults = [("other part", None)]
    fetch(site, tmp_path)
    assert site.of("dev_questions.json") == ["bytes=50000-", None]
    assert is_complete(site, tmp_path)


def test_a_part_that_is_whole_already_needs_no_more(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._Sums, "accept", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(site, tmp_path)
    site.asked.clear()
    fetch(site, tmp_path)
    assert site.of("dev_questions.json") == [f"bytes={len(site.files[DEV])}-"]
    assert is_complete(site, tmp_path)


def test_a_part_longer_than_the_file_is_dropped(tmp_path: Path, site: Site) -> None:
    site.etag = None
    broken_off(site, tmp_path)
    site.files[DEV] = questions(2)
    site.files["/LaMP_3/dev/dev_outputs.json"] = outputs(2)
    fetch(site, tmp_path)
    assert site.of("dev_questions.json") == ["bytes=50000-", None]
    assert is_complete(site, tmp_path)


def test_a_body_of_unknown_length_that_breaks_off_is_seen(tmp_path: Path, site: Site) -> None:
    site.faults = [("no length", 50_000)]
    with pytest.raises(RecordError, match="at the end: it breaks off"):
        fetch(site, tmp_path)
    site.faults = [("no length", None)]
    fetch(site, tmp_path)
    assert is_complete(site, tmp_path)


# ---- what is not data


@pytest.mark.parametrize("code", [404, 403, 410])
def test_a_file_that_is_not_there_is_an_error_at_once(tmp_path: Path, site: Site, code: int) -> None:
    site.faults = [code]
    with pytest.raises(MissingData, match=rf"http://.*/LaMP_3/dev/dev_questions\.json.*answered {code}.*`source`"):
        fetch(site, tmp_path)
    assert len(site.asked) == 1


def test_a_web_page_is_not_taken_for_data_and_costs_nothing_that_came(tmp_path: Path, site: Site) -> None:
    data = site.files[DEV]
    broken_off(site, tmp_path)
    site.files[DEV], site.etag = f"<html>Please log in, {SECRET}</html>".encode(), '"page"'
    with pytest.raises(
        RecordError, match=r"dev_questions\.json, at the start: expected JSON that begins with \["
    ) as caught:
        fetch(site, tmp_path)
    assert SECRET not in str(caught.value)
    site.files[DEV], site.etag = data, '"one"'
    site.asked.clear()
    fetch(site, tmp_path)
    assert site.of("dev_questions.json") == ["bytes=50000-"]
    assert is_complete(site, tmp_path)


def test_a_full_disk_is_said_and_what_came_stays(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(site, tmp_path)
    usual = Path.open

    def full(self: Path, *args: Any, **settings: Any) -> Any:
        if self.suffix == ".part" and "a" in args[0]:
            raise OSError(28, "No space left on device")
        return usual(self, *args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(StorageError, match="No space left"):
            fetch(site, tmp_path)
    assert len(site.asked) == 1  # a full disk is no reason to ask again
    fetch(site, tmp_path)
    assert is_complete(site, tmp_path)


# ---- checksums that differ, folders that hold something else


def test_a_file_that_was_changed_is_an_error_and_is_left_alone(tmp_path: Path, site: Site) -> None:
    fetch(site, tmp_path)
    path = tmp_path / "dev_questions.json"
    path.write_bytes(questions(1))
    with pytest.raises(RecordError, match=r"dev_questions\.json, the whole file: its checksum.*delete it") as caught:
        fetch(site, tmp_path)
    assert SECRET not in str(caught.value)
    assert path.read_bytes() == questions(1)
    path.unlink()
    fetch(site, tmp_path)
    assert is_complete(site, tmp_path)


def test_a_new_file_that_differs_from_what_was_noted_is_not_kept(tmp_path: Path, site: Site) -> None:
    fetch(site, tmp_path)
    (tmp_path / "dev_questions.json").unlink()
    site.files[DEV] = questions(40, word="another")
    with pytest.raises(RecordError, match=r"differs from what .*SHA256SUMS notes.*remove that line"):
        fetch(site, tmp_path)
    assert not list(tmp_path.glob("dev_questions*"))
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "dev_questions" not in line))
    fetch(site, tmp_path)
    assert is_complete(site, tmp_path)


def test_a_folder_is_of_one_data_set(tmp_path: Path, site: Site) -> None:
    fetch(site, tmp_path)
    with pytest.raises(RunConflict, match=r"holds lamp-3, and lamp-3:time was asked for.*new folder"):
        download_lamp("lamp-3:time", tmp_path, base_url=site.url)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(RunConflict, match=r"dev_questions\.json is there, and no SHA256SUMS"):
        fetch(site, tmp_path)
    with pytest.raises(RunConflict, match=r"task\.json declares another task than LaMP_4"):
        download_lamp("lamp-4", tmp_path, splits=["train"], base_url=site.url)


def test_sums_that_cannot_be_read_are_an_error(tmp_path: Path, site: Site) -> None:
    (tmp_path / "SHA256SUMS").write_text("# mine\n\nabc  dev_questions.json\n")
    with pytest.raises(RecordError, match=r"SHA256SUMS, line 3: .*sha256sum"):
        fetch(site, tmp_path)


# ---- a local folder


@pytest.mark.parametrize("place", ["", "dev", "LaMP_3/dev"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_local_folder_is_a_source_too(tmp_path: Path, place: str, packed: bool) -> None:
    here, out = tmp_path / "here" / place, tmp_path / "out"
    here.mkdir(parents=True)
    for name, body in (("dev_questions.json", questions(3)), ("dev_outputs.json", outputs(3))):
        (here / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(body) if packed else body)
    for _ in range(2):
        download_lamp("lamp-3", out, splits=["dev"], source=tmp_path / "here")
    assert (out / "dev_questions.json").read_bytes() == questions(3)
    assert len(list(open_dataset(out, "dev"))) == 3
    assert hashlib.sha256(outputs(3)).hexdigest() in (out / "SHA256SUMS").read_text()


def test_a_local_folder_is_checked_like_a_server(tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    with pytest.raises(MissingData, match="no data folder"):
        download_lamp("lamp-3", out, source=here)
    here.mkdir()
    with pytest.raises(MissingData, match=re.escape("Neither test_questions.json nor test_questions.json.gz is in")):
        download_lamp("lamp-3", out, splits=["test"], source=here)
    (here / "test_questions.json").write_text(f"<html>{SECRET}")
    with pytest.raises(RecordError, match="at the start") as caught:
        download_lamp("lamp-3", out, splits=["test"], source=here)
    assert SECRET not in str(caught.value)
    (here / "test_questions.json").unlink()
    (here / "test_questions.json.gz").write_bytes(gzip.compress(questions(50))[:-20])
    with pytest.raises(RecordError, match="gzip data is broken"):
        download_lamp("lamp-3", out, splits=["test"], source=here)
    assert [path.name for path in out.iterdir()] == ["task.json"]


def test_a_local_folder_that_differs_from_what_was_noted(tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    here.mkdir()
    (here / "test_questions.json").write_bytes(questions(1))
    (path,) = download_lamp("lamp-3", out, splits=["test"], source=here)
    path.unlink()
    (here / "test_questions.json").write_bytes(questions(2))
    with pytest.raises(RecordError, match="differs from what"):
        download_lamp("lamp-3", out, splits=["test"], source=here)
    assert not path.exists()
