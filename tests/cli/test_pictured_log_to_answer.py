"""From a Parquet file with pictures to answers, by commands: import, train, split, serve --load, load, generate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_calls import call
from picture_rows import BLUE, RED, data_url, log_rows, png

from personaplug.data import open_dataset
from personaplug.serving.service import Service

pytest.importorskip("PIL", reason="Pillow is not installed")

OPENED = Path("/proc/self/fd")
TOY = ("llm=toy", "encoder=hash:32+pictures:pixels", "dtype=float32", "batch_size=8", "max_steps=3", "controls=false")
PROMPT = "Which verdict would this user choose? Answer with one of: kept, returned. product: a lamp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("pictured")
    parquet.write_table(arrow.Table.from_pylist(log_rows()), folder / "orders.parquet")
    call("import", folder / "orders.parquet", "--out", folder / "data")
    call("train", "--data", folder / "data", "--out", folder / "run", "learning_rate=0.1", *TOY)
    return folder


def _deleted_files() -> int:
    """Return the number of open files without a name."""
    return sum(os.readlink(link).endswith("(deleted)") for link in OPENED.iterdir() if link.is_symlink())


def test_the_log_is_loaded_and_its_pictures_are_left_in_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not OPENED.is_dir():
        pytest.skip("open files are listed on Linux alone")
    before, while_serving = _deleted_files(), list[int]()

    def serve(service: Service, **_: object) -> None:
        while_serving.append(_deleted_files())
        service.store.close()

    monkeypatch.setattr("personaplug.serving.app.serve", serve)
    place = ("--run", folder / "run", "--store", folder / "histories.db")
    done = call("serve", *place, "--port", 0, "--load", folder / "orders.parquet")
    assert done.stdout == "loaded: 6 users; 30 items new, 0 replaced, 0 as before\n"
    assert while_serving == [before]
    assert "30 items new" not in call("load", *place, folder / "orders.parquet", "--image", "photo").stdout
    content = b"".join(path.read_bytes() for path in folder.glob("histories.db*"))
    assert not any(row["photo"] in content for row in log_rows())


@pytest.mark.parametrize("as_url", [True, False], ids=["data URL", "path"])
def test_the_history_of_an_answer_may_hold_pictures(as_url: bool, folder: Path, tmp_path: Path) -> None:
    answers = []
    for color in (RED, BLUE):
        (tmp_path / "photo.png").write_bytes(png(color))
        photo = data_url(png(color)) if as_url else "photo.png"
        (tmp_path / "items.jsonl").write_text(json.dumps({"verdict": "kept", "photo": photo}))
        asked = ("--prompt", PROMPT, "--history", tmp_path / "items.jsonl", "--probabilities")
        answers.append(json.loads(call("generate", "--run", folder / "run", *asked).stdout)["probabilities"])
    assert answers[0] != answers[1]


def test_items_are_encoded_ahead_of_time_with_their_pictures(folder: Path, tmp_path: Path) -> None:
    done = call("encode", "--data", folder / "data", "--vectors", tmp_path / "vectors", TOY[1])
    assert "train: 18 new vectors, 18 in" in done.stdout
    assert "dev: 6 new vectors, 24 in" in done.stdout  # of 30 items, 6 are only asked


def test_synthetic_samples_have_the_pictures_of_their_history(folder: Path, tmp_path: Path) -> None:
    call("synthesize", "--data", folder / "data", "--out", tmp_path / "more", "--samples", 0, *TOY[:2])
    for split in ("train", "dev"):
        copied, original = (list(open_dataset(data, split)) for data in (tmp_path / "more", folder / "data"))
        assert copied == original
        assert all(item.picture for sample in copied for item in sample.history)
