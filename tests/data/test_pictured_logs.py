"""Logs with columns of pictures and vectors: which columns are found, which rows are dropped, what is written."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from picture_rows import BLUE, DECLARED, RED, cut_png, data_url, log_rows, packed, png

from personaplug.cli.main import main
from personaplug.data import open_dataset
from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.lamp_writer import PICTURES
from personaplug.data.logs.log import Log, read_log, read_rows
from personaplug.data.logs.options import LogOptions
from personaplug.data.logs.row_form import RowForm
from personaplug.data.logs.writing import describe_columns, describe_rows, write_log, write_user_split
from personaplug.data.pictures import Picture
from personaplug.data.task_registry import parse_task
from personaplug.errors import ConfigError, MissingData, RecordError, StorageError, UserError

Rows = list[dict[str, Any]]


def _parquet(path: Path, rows: Rows, column: Callable[[bytes | None], object] = lambda content: content) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([{**row, "photo": column(row["photo"])} for row in rows]), path)
    return path


def _csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _with_paths(folder: Path, rows: Rows, *, key: str = "photo") -> Rows:
    """Write the pictures of rows as files in a folder, and return the rows with relative paths."""
    (folder / "photos").mkdir(parents=True)
    for number, row in enumerate(rows):
        (folder / "photos" / f"{number}.PNG").write_bytes(row["photo"])
    others = [{name: value for name, value in row.items() if name != "photo"} for row in rows]
    return [{**row, key: f"photos/{number}.PNG"} for number, row in enumerate(others)]


FILES: dict[str, Callable[[Path], Path]] = {
    "Parquet, bytes": lambda folder: _parquet(folder / "log.parquet", log_rows()),
    "Parquet, Hugging Face": lambda folder: _parquet(
        folder / "log.parquet", log_rows(), lambda content: {"bytes": content, "path": "1.png"}
    ),
    "CSV, paths": lambda folder: _csv(folder / "log.csv", _with_paths(folder, log_rows())),
    "JSON lines, data URLs": lambda folder: _jsonl(
        folder / "log.jsonl", [row | {"photo": data_url(row["photo"])} for row in log_rows()]
    ),
    "CSV, data URLs": lambda folder: _csv(
        folder / "log.csv", [row | {"photo": data_url(row["photo"])} for row in log_rows()]
    ),
}


def _read(source: object, **options: Any) -> Log:
    return read_log([source], LogOptions(**options))


def _pictures(log: Log) -> list[bytes]:
    """Return the pictures of all items, in the order of the rows."""
    items = [item for _, items in log.reader().histories() for item in items]
    return [item.picture.read() if item.picture else b"" for item in items]


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("name", ["photo", None], ids=["named", "found"])
def test_pictures_of_a_file_are_read(form: str, name: str | None, tmp_path: Path) -> None:
    log = _read(FILES[form](tmp_path), image=name)
    assert (log.task.image_field, log.form.mapping.image) == ("photo", "photo")
    assert _pictures(log) == [row["photo"] for row in log_rows()]
    reason = "--image; 30 of them" if name else "30 of its values are pictures"
    assert f"  image    'photo': {reason}" in list(describe_columns(log))


@pytest.mark.parametrize("form", FILES)
def test_the_written_data_set_holds_the_pictures(form: str, tmp_path: Path) -> None:
    written = write_log(_read(FILES[form](tmp_path)), tmp_path / "data")
    rows = {f"row-{number}": row for number, row in enumerate(log_rows(), 1)}
    samples = [s for split in ("train", "dev") for s in open_dataset(tmp_path / "data", split)]
    assert (written.train.samples, written.dev.samples, len(samples)) == (18, 6, 24)
    for sample in samples:
        assert all(item.picture == Picture(rows[item.id]["photo"]) for item in sample.history)
    assert len(list((tmp_path / "data" / PICTURES).iterdir())) == 12  # each picture once
    assert json.loads((tmp_path / "data" / "task.json").read_text())["image_field"] == "photo"


def test_import_prints_the_column_of_pictures(tmp_path: Path) -> None:
    path = FILES["Parquet, bytes"](tmp_path)
    arguments = ["import", str(path), "--out", str(tmp_path / "data"), "--image", "photo"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "image    'photo': --image; 30 of them" in result.output
    assert "30 rows read, 30 kept, 0 dropped" in result.output


def test_pictures_of_a_file_are_in_a_file_without_a_name_as_long_as_an_item_needs_them(tmp_path: Path) -> None:
    if not (opened := Path("/proc/self/fd")).is_dir():
        pytest.skip("open files are listed on Linux alone")

    def deleted() -> dict[str, int]:
        links = {link: os.readlink(link) for link in opened.iterdir() if link.is_symlink()}
        return {str(link): link.stat().st_size for link, target in links.items() if target.endswith("(deleted)")}

    before, log = deleted(), _read(FILES["JSON lines, data URLs"](tmp_path))
    (size,) = [size for link, size in deleted().items() if link not in before]
    assert size == sum(map(len, {row["photo"] for row in log_rows()}))  # each picture once
    item = next(items[0] for _, items in log.reader().histories())
    del log
    assert item.picture == Picture(log_rows()[0]["photo"])
    assert len(deleted()) == len(before) + 1
    del item
    assert deleted() == before


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: open("/dev/full", "r+b", **options))  # noqa: SIM115
    with pytest.raises(StorageError, match=r"do not fit into a temporary file in .* by the variable TMPDIR"):
        _read(FILES["JSON lines, data URLs"](tmp_path))


@pytest.mark.parametrize("as_path", [str, Path], ids=["text", "Path"])
def test_rows_in_memory_may_hold_paths_from_the_working_folder(
    as_path: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row | {"photo": as_path(row["photo"])} for row in _with_paths(tmp_path, log_rows())]
    assert _pictures(_read(rows, image="photo")) == [row["photo"] for row in log_rows()]


def test_rows_in_memory_may_hold_images_of_pillow() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rows = [row | {"photo": image.new("RGB", (8, 8), RED)} for row in log_rows()]
    assert {picture[:4] for picture in _pictures(_read(rows))} == {b"\x89PNG"}


def test_texts_that_only_look_like_pictures_are_texts() -> None:
    rows = [row | {"photo": b"BMW %d" % number} for number, row in enumerate(log_rows())]
    log = _read(rows)
    assert log.task.image_field is None
    assert _read(rows, questions=("photo",)).rows[0]["photo"] == "BMW 0"


@pytest.mark.parametrize(
    "value", ["https://shop.example/{}.png", "gone/{}.png", "", "a picture of thing {}"], ids=lambda value: value[:5]
)
def test_a_column_with_such_a_name_but_without_pictures_is_not_used(value: str, tmp_path: Path) -> None:
    rows = [row | {"photo": value.format(number)} for number, row in enumerate(log_rows())]
    log = _read(_csv(tmp_path / "log.csv", rows))
    assert (log.task.image_field, len(log.rows)) == (None, 30)


def test_of_two_columns_of_pictures_the_name_decides_or_nothing() -> None:
    rows = [row | {"thumbnail": row["photo"], "x": row["photo"]} for row in log_rows()]
    log = _read(rows)
    assert log.task.image_field == "photo"
    assert any("30 of its values are pictures, not 'thumbnail', 'x'" in line for line in describe_columns(log))
    without_name = [{**{key: row[key] for key in row if key != "photo"}, "y": row["photo"]} for row in rows]
    assert _read(without_name).task.image_field == "thumbnail"
    unclear = [{key: row[key] for key in row if key != "thumbnail"} for row in without_name]
    with pytest.raises(ConfigError, match=r"unclear which column is the image\. It may be 'x', 'y'"):
        _read(unclear)
    assert _read(unclear, image="y").task.image_field == "y"


def test_rows_with_unusable_pictures_are_dropped_and_rows_without_one_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed, and only its decoder finds the first defect")
    rows: Rows = log_rows()
    for number, content in enumerate([cut_png(), b"\xff is no text", b"", None]):
        rows[number]["photo"] = content
    log = _read(_parquet(tmp_path / "log.parquet", rows))
    assert log.report.dropped == {"with a damaged picture": 2}
    assert _pictures(log)[:3] == [b"", b"", rows[4]["photo"]]
    assert next(describe_rows(log, _reader_report(log))) == (
        "30 rows read, 28 kept, 2 dropped: 2 with a damaged picture"
    )


def _reader_report(log: Log) -> Any:
    reader = log.reader()
    list(reader)
    return reader.report


def test_missing_files_are_dropped_as_missing_and_other_files_as_damaged(tmp_path: Path) -> None:
    rows = _with_paths(tmp_path, log_rows())
    (tmp_path / "photos" / "0.PNG").unlink()
    (tmp_path / "photos" / "1.PNG").write_text("no picture")
    rows[2]["photo"] = ""
    log = _read(_csv(tmp_path / "log.csv", rows))
    assert log.report.dropped == {"whose picture file does not exist": 1, "with a damaged picture": 1}
    assert _pictures(log)[0] == b""


def test_a_path_in_a_structure_that_names_no_file_is_dropped_as_missing(tmp_path: Path) -> None:
    rows: Rows = [row | {"photo": {"bytes": row["photo"], "path": None}} for row in log_rows()]
    rows[0]["photo"] = {"bytes": None, "path": "elsewhere.png"}
    rows[1]["photo"] = {"bytes": b"no picture", "path": None}
    log = _read(_parquet(tmp_path / "log.parquet", rows))
    assert log.report.dropped == {"whose picture file does not exist": 1, "with a damaged picture": 1}


def test_a_row_with_a_picture_alone_is_in_histories_but_not_asked(tmp_path: Path) -> None:
    rows = log_rows()
    for row in rows[::2]:
        row["product"] = ""
    log = _read(rows)
    assert len(_pictures(log)) == 30
    assert "15 of the kept rows have no text: they are in histories, and are not asked" in list(
        describe_rows(log, _reader_report(log))
    )
    samples = [sample for split in ("train", "dev") for sample in log.reader(split)]
    assert {sample.query for sample in samples} == {row["product"] for row in rows if row["day"][-1] != "1"} - {""}
    assert max(sum(not item.fields[0][1] for item in sample.history) for sample in samples) > 1
    rows[0]["photo"] = None
    assert _read(rows).report.dropped == {"without a value in 'product'": 1}


def test_rows_that_differ_in_their_pictures_are_no_copies() -> None:
    rows = [row | {"product": "the same long name of a product, over and over"} for row in log_rows()]
    for row in rows:
        row["day"] = "2026-01-01"
    reader = _read(rows).reader()
    histories = dict(reader.histories())
    assert [len(items) for items in histories.values()] == [2] * 6  # one of each color
    assert reader.report.copies == 18


VECTORS: dict[str, Callable[[Path, Rows], object]] = {
    "Parquet": lambda folder, rows: _vectors_in_parquet(folder, rows, size=-1),
    "Parquet, fixed size": lambda folder, rows: _vectors_in_parquet(folder, rows, size=3),
    "JSON lines": lambda folder, rows: _jsonl(folder / "log.jsonl", rows),
    "rows": lambda _, rows: [row | {"embedding": np.array(row["embedding"])} for row in rows],
    "CSV": lambda folder, rows: _csv(folder / "log.csv", rows),
}


def _vector_rows() -> Rows:
    rows = [{key: value for key, value in row.items() if key != "photo"} for row in log_rows()]
    return [row | {"embedding": [number, -0.5, 0.1]} for number, row in enumerate(rows)]


def _vectors_in_parquet(folder: Path, rows: Rows, *, size: int) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_pylist(rows)
    column = arrow.array([row["embedding"] for row in rows], arrow.list_(arrow.float32(), size))
    parquet.write_table(
        table.set_column(table.schema.get_field_index("embedding"), "embedding", column), folder / "v.parquet"
    )
    return folder / "v.parquet"


@pytest.mark.parametrize("form", VECTORS)
def test_vectors_are_read_and_written(form: str, tmp_path: Path) -> None:
    source = VECTORS[form](tmp_path, _vector_rows())
    log = _read(source, vector="embedding" if form == "CSV" else None)
    assert (log.task.image_field, log.task.vector_field) == (None, "embedding")
    write_log(log, tmp_path / "data")
    (items,) = [s.history for s in open_dataset(tmp_path / "data", "dev") if s.user_id == "c0"]
    assert [item.vector for item in items] == [packed(day, -0.5, 0.1) for day in range(4)]


def test_rows_with_broken_vectors_are_dropped() -> None:
    rows = _vector_rows()
    for number, value in enumerate([[1, None], [], "text", [1, float("nan")], None]):
        rows[number]["embedding"] = value
    log = _read(rows)
    assert log.report.dropped == {"whose vector is no list of finite numbers or has only zeros": 4}
    assert len(log.rows) == 26


@pytest.mark.parametrize("odd", [0, 5])
def test_rows_whose_vectors_are_not_as_wide_as_most_are_dropped(odd: int) -> None:
    rows = _vector_rows()
    rows[odd]["embedding"], rows[odd + 1]["embedding"] = [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]
    for options in (LogOptions(), LogOptions(vector="embedding")):
        log = read_log([rows[:8], rows[8:]], options)
        assert log.task.vector_field == "embedding"
        assert log.report.dropped == {"whose vector is not as wide as most": 2}


@pytest.mark.parametrize("role", ["image", "vector"])
def test_a_named_column_of_something_else_is_refused(role: str) -> None:
    with pytest.raises(
        ConfigError, match=f"The column 'product' holds no {role.replace('image', 'picture')}s: expected"
    ):
        _read(log_rows(), **{role: "product"}, questions=("day",))
    with pytest.raises(ConfigError, match="no column 'foto' with values; did you mean 'photo'"):
        _read(log_rows(), **{role: "foto"})


def test_a_file_whose_pictures_are_all_elsewhere_is_refused(tmp_path: Path) -> None:
    rows = _with_paths(tmp_path / "elsewhere", log_rows())
    with pytest.raises(ConfigError, match="paths of PNG, JPEG, GIF, WebP or BMP files that start in the log's folder"):
        _read(_csv(tmp_path / "log.csv", rows), image="photo")


def test_a_log_is_read_for_the_task_of_a_run() -> None:
    plain, with_photos = parse_task(DECLARED), parse_task({**DECLARED, "image_field": "shot"})
    log = read_log([log_rows()], LogOptions(), task=plain)
    assert log.form.mapping.image is None
    assert set(_pictures(log)) == {b""}
    log = read_log([log_rows()], LogOptions(), task=with_photos)  # the column may have another name
    assert _pictures(log) == [row["photo"] for row in log_rows()]
    with pytest.raises(ConfigError, match="task Kept has no image_field"):
        read_log([log_rows()], LogOptions(image="photo"), task=plain)
    without = [row | {"photo": None} for row in log_rows()]
    assert set(_pictures(read_log([without], LogOptions(), task=with_photos))) == {b""}


def test_a_history_of_one_missing_picture_says_so() -> None:
    form = _read(log_rows()).form
    with pytest.raises(RecordError, match="row 1: it is a row whose picture file does not exist"):
        list(read_rows([{"customer": "c1", "day": "2026-01-01", "verdict": "kept", "photo": "missing.png"}], form))


def test_the_form_of_rows_is_saved_with_its_columns() -> None:
    log = _read([row | {"embedding": [1, 2]} for row in log_rows()])
    form = RowForm.from_dict(json.loads(json.dumps(log.form.to_dict())), task=log.task)
    row = {"customer": "a", "product": "lamp", "verdict": "kept", "day": "2026-01-01", "photo": png(BLUE)}
    ((_, (item,)),) = read_rows([row | {"embedding": [3, 4]}], form).histories()
    assert (item.picture, item.vector) == (Picture(png(BLUE)), packed(3, 4))
    ((_, (item,)),) = read_rows([{key: row[key] for key in row if key != "photo"}], form).histories()
    assert (item.picture, item.vector) == (None, None)
    with pytest.raises(RecordError, match="row 1: it is a row with a damaged picture"):
        read_rows([row | {"photo": b"broken"}], form)
    old = log.form.to_dict()
    del old["mapping"]["image"], old["mapping"]["vector"]  # saved before there were such columns
    assert RowForm.from_dict(old, task=log.task).mapping.image is None


def test_a_mapping_names_columns_for_the_task_only(tmp_path: Path) -> None:
    mapping = ColumnMapping("customer", {"product": "product"}, "verdict", "{product}", date="day", image="photo")
    task = parse_task({**DECLARED, "image_field": "shot"})
    path = _csv(tmp_path / "log.csv", _with_paths(tmp_path, log_rows()))
    items = dict(EventLogReader(path, mapping, task).histories())["c0"]
    assert [item.picture for item in items] == [Picture(row["photo"]) for row in log_rows()[:5]]
    with pytest.raises(
        ConfigError, match="The mapping's image is the column 'photo', but task Kept has no image_field"
    ):
        EventLogReader(path, mapping, parse_task(DECLARED))
    (tmp_path / "photos" / "0.PNG").unlink()
    with pytest.raises(RecordError, match="line 2: its 'photo' names a file that does not exist"):
        list(EventLogReader(path, mapping, task))


def test_a_user_split_with_pictures_can_be_written_again(tmp_path: Path) -> None:
    for change in (None, None, png(BLUE, side=40)):
        rows = log_rows()
        rows[0]["photo"] = change or rows[0]["photo"]
        log = _read(rows)
        reader = log.reader("dev", dev_queries=4)
        if change is None:
            parts = write_user_split(log, reader, tmp_path / "data", dev_share=0.4)
            assert (parts.train_users, parts.dev_users) == (4, 2)
        else:
            with pytest.raises(UserError, match="holds data of other rows"):
                write_user_split(log, reader, tmp_path / "data", dev_share=0.4)


def test_a_log_in_which_no_row_can_be_used_says_why() -> None:
    rows = [row | {"photo": cut_png(), "verdict": ("kept", "returned")[n % 2]} for n, row in enumerate(log_rows())]
    pytest.importorskip("PIL", reason="Pillow is not installed, and only its decoder finds the defect")
    with pytest.raises(MissingData, match="None of the 30 rows can be used: 30 with a damaged picture"):
        _read(rows)
