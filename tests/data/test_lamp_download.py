"""LaMP's official files, downloaded from a small local server and copied from a local folder."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pooch
import pytest

from personaplug.data import LAMP_TASKS, load_task, open_dataset
from personaplug.data import lamp_download as module
from personaplug.data.lamp_download import download_lamp
from personaplug.errors import ConfigError, MissingData, RecordError, RunConflict, StorageError

SECRET = "zanzibar"  # part of every text; no error may contain it
DEV = "/LaMP_3/dev/dev_questions.json"


def questions(count: int, *, word: str = SECRET) -> bytes:
    item = {"id": "i", "text": word * 1000, "score": 4}
    records = [{"id": str(n), "input": f"review: {word} {n}", "profile": [item]} for n in range(count)]
    return json.dumps(records).encode()


def outputs(count: int) -> bytes:
    return json.dumps({"task": "LaMP_3", "golds": [{"id": str(n), "output": "4"} for n in range(count)]}).encode()


@dataclass
class Site:
    """The server's files, its faults for the next requests (a status or a number of bytes), and the requested paths."""

    files: dict[str, bytes]
    faults: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        site = self.server.site
        site.paths.append(self.path)
        fault = site.faults.pop(0) if site.faults else 200
        if self.path not in site.files or 400 <= fault < 600:
            self.send_error(fault if fault >= 400 else 404)
            return
        body = site.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if fault == 200 else body[:fault])

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    site: Site


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "*")
    site = Site({"/LaMP_3/test/test_questions.json": questions(2)})
    for split, count in (("train", 3), ("dev", 40)):
        site.files[f"/LaMP_3/{split}/{split}_questions.json"] = questions(count)
        site.files[f"/LaMP_3/{split}/{split}_outputs.json"] = outputs(count)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.site, site.url = site, f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def download(site: Site, out: Path, **settings: Any) -> list[Path]:
    return download_lamp("lamp-3", out, **{"splits": ["dev"], "base_url": site.url, **settings})


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
def test_each_name_has_its_address_and_task(tmp_path: Path, site: Site, name: str, path: str, task: str) -> None:
    expected = [f"{path}{split}/{split}_questions.json" for split in ("train", "dev", "test")]
    expected += [f"{path}{split}/{split}_outputs.json" for split in ("train", "dev")]
    site.files = {each: questions(1) if "questions" in each else outputs(1) for each in expected}
    files = download_lamp(name, tmp_path, base_url=site.url.removesuffix("/"))
    assert sorted(site.paths) == sorted(expected)
    assert [file.name for file in files] == [
        "train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json", "test_questions.json",
    ]  # fmt: skip
    assert load_task(tmp_path).name == task
    assert load_task(tmp_path) == LAMP_TASKS.get(task, module._NEWS)


def test_unknown_name_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    for name in ("lamp-6", "LaMP_6:time"):
        with pytest.raises(ConfigError, match=r"Avocado.*not public"):
            download_lamp(name, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'lamp-3:time'"):
        download_lamp("lamp-3:tine", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        download_lamp("lamp-3", tmp_path, splits=["trian"])
    with pytest.raises(ConfigError, match="base_url should begin with https://"):
        download_lamp("lamp-3", tmp_path, base_url="file:///etc/")
    assert "lamp-2-news:time" in module._DATA_SETS
    assert not [name for name in module._DATA_SETS if "6" in name]
    assert not list(tmp_path.iterdir())


def test_news_task_reads_the_older_files(tmp_path: Path, site: Site) -> None:
    item = {"id": "i", "text": "t", "title": "h", "category": "food & drink"}
    question = {"id": "1", "input": "Which category does this article relate to … article: An article"}
    gold = {"task": "LaMP_2", "golds": [{"id": "1", "output": "food & drink"}]}
    site.files = {"/LaMP_2/dev/dev_questions.json": json.dumps([{**question, "profile": [item]}]).encode()}
    site.files["/LaMP_2/dev/dev_outputs.json"] = json.dumps(gold).encode()
    download_lamp("lamp-2-news", tmp_path, splits=["dev"], base_url=site.url)
    (sample,) = open_dataset(tmp_path, "dev")
    assert (sample.query, sample.target, sample.history[0].answer) == ("An article", "food & drink", "food & drink")
    assert len(module._NEWS.labels) == len(set(module._NEWS.labels)) == 15


# ---- complete downloads


def test_second_download_requests_no_file_and_repeats_no_terms(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    download(site, tmp_path)
    assert is_complete(site, tmp_path)
    assert (tmp_path / "dev_questions.json").stat().st_mode == (tmp_path / "task.json").stat().st_mode
    samples = list(open_dataset(tmp_path, "dev"))
    assert (len(samples), samples[7].target, samples[7].query) == (40, "4", f"{SECRET} 7")
    assert caplog.text.count("CC BY-NC-SA 4.0") == 1
    assert "LaMP-6 is not public" in caplog.text
    caplog.clear()
    site.paths.clear()
    download(site, tmp_path)
    assert (site.paths, caplog.records) == ([], [])


def test_downloaded_test_split_has_no_targets(tmp_path: Path, site: Site) -> None:
    (path,) = download(site, tmp_path, splits="test")
    assert path.name == "test_questions.json"
    assert [sample.target for sample in open_dataset(tmp_path, "test")] == [None, None]


def test_checksums_are_in_the_format_of_sha256sum(tmp_path: Path, site: Site) -> None:
    download(site, tmp_path)
    digest = hashlib.sha256(site.files[DEV]).hexdigest()
    assert f"{digest}  dev_questions.json\n" in (tmp_path / "SHA256SUMS").read_text()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True)
    download(site, tmp_path, splits=["train"])
    assert (tmp_path / "SHA256SUMS").read_text().count("\n") == 5


# ---- faults of the server


def test_interrupted_download_is_tried_again(tmp_path: Path, site: Site) -> None:
    site.faults = [50_000, 503, 30_000, 429]
    download(site, tmp_path)
    assert is_complete(site, tmp_path)
    assert site.paths.count(DEV) == 5


@pytest.mark.parametrize("fault", [503, 50_000])
def test_download_that_fails_five_times_leaves_no_data_file(tmp_path: Path, site: Site, fault: int) -> None:
    site.faults = [fault] * 5
    with pytest.raises(MissingData, match=r"dev_questions\.json was not downloaded after 5 attempts.*`source`"):
        download(site, tmp_path)
    assert (len(site.paths), [path.name for path in tmp_path.iterdir()]) == (5, ["task.json"])


def test_unreachable_server_is_an_error(tmp_path: Path, site: Site) -> None:
    with pytest.raises(MissingData, match=r"after 5 attempts \(ConnectionError\).*`source`"):
        download(site, tmp_path, base_url="http://127.0.0.1:1/")


@pytest.mark.parametrize("status", [404, 403, 410])
def test_download_of_a_missing_file_is_not_tried_again(tmp_path: Path, site: Site, status: int) -> None:
    site.faults = [status]
    with pytest.raises(MissingData, match=rf"http://.*/LaMP_3/dev/dev_questions\.json.*answered {status}.*`source`"):
        download(site, tmp_path)
    assert len(site.paths) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"<html>Please log in, {SECRET}</html>".encode(), r"at the start: expected JSON that begins with \["),
        (questions(2)[:-30], "at the end: the file is truncated"),
    ],
)
def test_download_that_is_not_json_is_refused(tmp_path: Path, site: Site, body: bytes, message: str) -> None:
    site.files[DEV] = body
    with pytest.raises(RecordError, match=rf"dev_questions\.json, {message}") as caught:
        download(site, tmp_path)
    assert SECRET not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["task.json"]


def test_full_disk_is_a_storage_error(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fail)
    with pytest.raises(StorageError, match="No space left"):
        download(site, tmp_path)


# ---- checksums that differ, folders with other data


def test_changed_file_is_an_error_and_is_kept(tmp_path: Path, site: Site) -> None:
    download(site, tmp_path)
    path = tmp_path / "dev_questions.json"
    path.write_bytes(questions(1))
    with pytest.raises(
        RecordError, match=r"dev_questions\.json, the whole file: its checksum.*delete the file"
    ) as caught:
        download(site, tmp_path)
    assert SECRET not in str(caught.value)
    assert path.read_bytes() == questions(1)
    path.unlink()
    download(site, tmp_path)
    assert is_complete(site, tmp_path)


def test_new_file_with_another_checksum_is_refused(tmp_path: Path, site: Site) -> None:
    download(site, tmp_path)
    (tmp_path / "dev_questions.json").unlink()
    site.files[DEV] = questions(40, word="another")
    with pytest.raises(RecordError, match=r"differs from the checksum in .*SHA256SUMS.*remove that line"):
        download(site, tmp_path)
    assert not list(tmp_path.glob("dev_questions*"))
    checksums = tmp_path / "SHA256SUMS"
    lines = checksums.read_text().splitlines(keepends=True)
    checksums.write_text("".join(line for line in lines if "dev_questions" not in line))
    download(site, tmp_path)
    assert is_complete(site, tmp_path)


def test_folder_of_another_data_set_is_refused(tmp_path: Path, site: Site) -> None:
    download(site, tmp_path)
    with pytest.raises(RunConflict, match=r"holds lamp-3, .*lamp-3:time.*new folder"):
        download_lamp("lamp-3:time", tmp_path, base_url=site.url)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(RunConflict, match=r"dev_questions\.json exists, but SHA256SUMS does not list it"):
        download(site, tmp_path)
    with pytest.raises(RunConflict, match=r"task\.json declares a task other than LaMP_4"):
        download_lamp("lamp-4", tmp_path, splits=["train"], base_url=site.url)


def test_checksums_in_another_format_are_an_error(tmp_path: Path, site: Site) -> None:
    (tmp_path / "SHA256SUMS").write_text("# mine\n\nabc  dev_questions.json\n")
    with pytest.raises(RecordError, match=r"SHA256SUMS, line 3: .*sha256sum"):
        download(site, tmp_path)


# ---- a local folder


@pytest.mark.parametrize("folder", ["", "dev", "LaMP_3/dev"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_local_folder_is_copied(tmp_path: Path, folder: str, is_packed: bool) -> None:
    source, out = tmp_path / "source" / folder, tmp_path / "out"
    source.mkdir(parents=True)
    for name, body in (("dev_questions.json", questions(3)), ("dev_outputs.json", outputs(3))):
        (source / (f"{name}.gz" if is_packed else name)).write_bytes(gzip.compress(body) if is_packed else body)
    for _ in range(2):
        download_lamp("lamp-3", out, splits=["dev"], source=tmp_path / "source")
    assert (out / "dev_questions.json").read_bytes() == questions(3)
    assert len(list(open_dataset(out, "dev"))) == 3
    assert hashlib.sha256(outputs(3)).hexdigest() in (out / "SHA256SUMS").read_text()


def test_local_folder_with_broken_files_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    with pytest.raises(MissingData, match="no data folder"):
        download_lamp("lamp-3", out, source=source)
    source.mkdir()
    with pytest.raises(MissingData, match=r"Neither test_questions\.json nor test_questions\.json\.gz is in"):
        download_lamp("lamp-3", out, splits=["test"], source=source)
    (source / "test_questions.json").write_text(f"<html>{SECRET}")
    with pytest.raises(RecordError, match="at the start") as caught:
        download_lamp("lamp-3", out, splits=["test"], source=source)
    assert SECRET not in str(caught.value)
    (source / "test_questions.json").unlink()
    (source / "test_questions.json.gz").write_bytes(gzip.compress(questions(50))[:-20])
    with pytest.raises(RecordError, match="gzip data is broken"):
        download_lamp("lamp-3", out, splits=["test"], source=source)
    assert [path.name for path in out.iterdir()] == ["task.json"]


def test_local_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "test_questions.json").write_bytes(questions(1))
    (path,) = download_lamp("lamp-3", out, splits=["test"], source=source)
    path.unlink()
    (source / "test_questions.json").write_bytes(questions(2))
    with pytest.raises(RecordError, match="differs from the checksum"):
        download_lamp("lamp-3", out, splits=["test"], source=source)
    assert not path.exists()
