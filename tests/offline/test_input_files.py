"""The input of a job: which files are read, equal columns, and unique ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline_jobs import write_parquet

from personaplug.errors import ConfigError, MissingData, RecordError
from personaplug.offline.input_files import read_input
from personaplug.offline.row_reader import RowReader

SECRET = "zanzibar"


def test_files_are_found_below_the_folder_and_hidden_ones_are_skipped(tmp_path: Path) -> None:
    for name in ("b.parquet", "day=1/a.parquet", "_temporary/c.parquet", ".d.parquet"):
        write_parquet(tmp_path / name, [{"prompt": name, "other": 1}])
    (tmp_path / "_SUCCESS").touch()
    found = read_input(tmp_path)
    assert [file.name for file in found.files] == ["b.parquet", "day=1/a.parquet"]
    assert (found.columns, found.rows) == (("prompt",), 2)
    assert [file.name for file in read_input(tmp_path / "b.parquet").files] == ["b.parquet"]


def test_digest_depends_on_the_content(tmp_path: Path) -> None:
    one = read_input(write_parquet(tmp_path / "a.parquet", [{"prompt": "x"}])).files[0]
    same = read_input(write_parquet(tmp_path / "a.parquet", [{"prompt": "x"}])).files[0]
    other = read_input(write_parquet(tmp_path / "a.parquet", [{"prompt": "y"}])).files[0]
    assert one.digest == same.digest != other.digest
    assert (other.is_unchanged(), one.is_unchanged()) == (True, False)


def test_two_rows_with_one_id_are_refused_without_the_id(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": "x"}, {"id": SECRET}])
    write_parquet(tmp_path / "b.parquet", [{"id": "y"}, {"id": "z"}, {"id": SECRET}])
    with pytest.raises(RecordError, match=r"b\.parquet, row 3: its id is also the id of row 2 of a\.parquet") as error:
        read_input(tmp_path)
    assert SECRET not in str(error.value)


def test_missing_id_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": "x"}, {"id": None}])
    with pytest.raises(RecordError, match="row 2: its 'id' is null"):
        read_input(tmp_path)


def test_files_with_different_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": "x", "prompt": "p"}])
    write_parquet(tmp_path / "b.parquet", [{"prompt": "p"}])
    with pytest.raises(ConfigError, match=r"a\.parquet has id, prompt; b\.parquet has prompt"):
        read_input(tmp_path)


def test_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text(SECRET)
    with pytest.raises(RecordError, match="not valid Parquet") as error:
        read_input(tmp_path)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "empty", "no-rows"])
def test_input_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "no-rows").mkdir()
    parquet.write_table(arrow.table({"prompt": arrow.array([], arrow.string())}), tmp_path / "no-rows" / "a.parquet")
    with pytest.raises(MissingData, match=r"There is no file|no \*\.parquet file with rows"):
        read_input(tmp_path / name)


def test_reader_returns_blocks_of_any_position_and_size(tmp_path: Path) -> None:
    rows = [{"prompt": str(number)} for number in range(300)]
    one = write_parquet(tmp_path / "a.parquet", rows, row_group_size=70)
    other = write_parquet(tmp_path / "b.parquet", rows[::-1])
    reader = RowReader(["prompt"])
    for path, expected in ((one, rows), (one, rows), (other, rows[::-1]), (one, rows)):
        for first, count in ((0, 5), (5, 150), (200, 100), (199, 2), (0, 300), (299, 1)):
            assert reader.read(path, first=first, rows=count) == expected[first : first + count]
    with pytest.raises(RecordError, match="row 301: the file has fewer rows"):
        reader.read(one, first=299, rows=2)
