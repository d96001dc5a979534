"""Offline jobs with pictures and vectors in the histories of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from offline_jobs import planned, read_output, write_parquet
from picture_rows import BLUE, RED, cut_png, data_url, log_rows, png

from personaplug import Plug, inference
from personaplug.data.parsing import item_of
from personaplug.errors import ConfigError
from personaplug.offline.rows import RowParser
from personaplug.offline.running import run_job
from personaplug.run import Run, open_models

pytest.importorskip("PIL", reason="Pillow is not installed")

PROMPT = "Which verdict would this user choose? Answer with one of: kept, returned. product: a lamp"
SECRET = "zanzibar"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = [row | {"embedding": [1, number % 2]} for number, row in enumerate(log_rows())]
    plug = Plug.train(
        rows,
        user="customer",
        question="product",
        answer="verdict",
        image="photo",
        vector="embedding",
        out=tmp_path_factory.mktemp("pictured"),
        llm="toy",
        encoder="hash:32+pictures:pixels+vectors:cat:2",
        dtype="float32",
        controls=False,
        max_steps=2,
        batch_size=4,
        learning_rate=0.1,
    )
    return plug.run


def _item(photo: object, **others: object) -> dict[str, object]:
    return {"product": "thing", "verdict": "kept", "photo": photo, **others}


HISTORIES: dict[str, list[dict[str, object]]] = {
    "bytes": [_item(png(RED)), _item(png(BLUE)), _item(None)],
    "Hugging Face": [_item({"bytes": png(RED), "path": "red.png"}), _item({"bytes": None, "path": None})],
    "picture alone": [{"product": None, "verdict": "kept", "photo": png(RED)}],
    "vectors": [_item(png(RED), embedding=[0.5, 1.0]), _item(None, embedding=None)],
    "with a preference": [
        _item(png(RED), preference=None),
        {"product": None, "verdict": None, "photo": None, "preference": "No red, please."},
    ],
}


@pytest.mark.parametrize("form", HISTORIES)
@pytest.mark.parametrize("as_json", [False, True], ids=["structs", "JSON"])
def test_answers_equal_those_of_single_calls(form: str, as_json: bool, run: Run, tmp_path: Path) -> None:
    records, history = HISTORIES[form], HISTORIES[form]
    if as_json:
        records = [row | {"photo": _url(row["photo"])} for row in history]
    row = {"prompt": PROMPT, "history": json.dumps(records) if as_json else records}
    run_job(planned(run, write_parquet(tmp_path / "in" / "a.parquet", [row]), tmp_path / "out"))
    (result,) = read_output(tmp_path / "out")
    present = [{name: value for name, value in item.items() if value is not None} for item in history]
    items = [item_of(run.task, item, default_id=str(n))[1] for n, item in enumerate(present)]
    expected = inference.generate(run, PROMPT, history=items, models=open_models(run.config))
    assert (result["error"], result["items"], result["answer"]) == (
        *(None, sum(item.kind == "answer" for item in items)),  # the run was trained without preferences
        expected,
    )
    assert expected.distribution is not None
    assert result["probabilities"] == pytest.approx(dict(expected.distribution.probabilities), abs=1e-3)


def _url(value: object) -> object:
    value = value["bytes"] if isinstance(value, dict) else value
    return data_url(value) if isinstance(value, bytes) else None


def test_personas_depend_on_the_pictures(run: Run, tmp_path: Path) -> None:
    histories = [[_item(png(RED))], [_item(png(BLUE))], [_item(png(RED))], [_item(None)]]
    source = write_parquet(tmp_path / "in" / "a.parquet", [{"history": history} for history in histories])
    run_job(planned(run, source, tmp_path / "out", command="encode"))
    red, blue, again, without = (np.array(row["soft_tokens"]) for row in read_output(tmp_path / "out"))
    np.testing.assert_allclose(red, again, atol=1e-5)  # rounding depends on the shard
    assert min(np.abs(red - blue).max(), np.abs(red - without).max()) > 1e-4


def test_a_row_with_a_broken_part_gets_an_error_and_stops_no_job(run: Run, tmp_path: Path) -> None:
    broken: list[tuple[dict[str, object], str]] = [
        (_item(cut_png()), "a picture of its 'history' cannot be decoded"),
        (_item(SECRET.encode()), "item 1: its 'photo' is no picture in one of the formats"),
        (_item(None, embedding=[1.0, 2.0, 3.0]), "a vector of its 'history' has 3 numbers; expected 2"),
        (_item(None, embedding=[0.0, -0.0]), "item 1: its 'embedding' has only zeros, so it has no direction"),
        (_item(None, embedding=[]), "item 1: its 'embedding' is no vector"),
    ]
    rows = [{"prompt": PROMPT, "history": [item]} for item, _ in broken]
    source = write_parquet(tmp_path / "in" / "a.parquet", [{"prompt": PROMPT, "history": [_item(png(RED))]}, *rows])
    manifest = run_job(planned(run, source, tmp_path / "out"))
    good, *others = read_output(tmp_path / "out")
    assert (manifest["rows"], manifest["errors"], good["error"]) == (6, 5, None)
    for row, (_, message) in zip(others, broken, strict=True):
        assert message in row["error"]
        assert SECRET not in row["error"]


def test_paths_are_refused_because_the_rows_may_come_from_strangers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(RED))
    for value in (str(tmp_path / "red.png"), {"bytes": None, "path": str(tmp_path / "red.png")}):
        row = RowParser(run.task, ("prompt", "history")).parse(
            {"prompt": PROMPT, "history": [_item(value)]}, default_id="a:1"
        )
        assert "its 'photo' is no picture: expected a data URL" in row.error
    source = write_parquet(tmp_path / "in" / "a.parquet", [{"prompt": PROMPT, "history": [_item("/etc/passwd")]}])
    with pytest.raises(ConfigError, match=r"All of the first 1 rows of .* are invalid"):
        planned(run, source, tmp_path / "out")
