"""Atomic writes and JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from personaplug.errors import DamagedFile, StorageError
from personaplug.infra.atomic_io import (
    JsonLines,
    atomic_folder,
    atomic_write,
    write_checked_json,
    write_json,
    write_text,
)
from personaplug.infra.checksums import read_json


def test_write_json_turns_nan_and_infinity_into_null(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": ("é", 2)})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": None, "b": [None, 1.5], "c": ["é", 2]}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_write_json_escapes_a_lone_surrogate(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"text": "a\ud83d"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"text": "a\ud83d"}


def test_write_text_on_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_write_text_below_a_file_raises_storage_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        write_text(tmp_path / "f" / "x.txt", "new")


def test_atomic_folder_replaces_the_target_only_if_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(StopIteration), atomic_folder(target) as folder:
        (folder / "b").write_text(next(iter("")))
    assert [p.name for p in target.iterdir()] == ["a"]
    with pytest.raises(StorageError), atomic_folder(target):
        raise OSError(28, "No space left on device")
    with atomic_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_atomic_folder_without_replace_keeps_the_existing_folder(tmp_path: Path) -> None:
    target = tmp_path / "t"
    for text in ("first", "second"):
        with atomic_folder(target, replace=False) as folder:
            (folder / "a").write_text(text)
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (OSError(28, "No space left on device"), StorageError),
        (SafetensorError("I/O error: No space left on device"), StorageError),
        (KeyError("a mistake of the program"), KeyError),
    ],
)
def test_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path, raised: Exception, seen: type[Exception]) -> None:
    path = tmp_path / "x.bin"
    atomic_write(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        assert temporary.parent == tmp_path
        temporary.write_text("half")
        raise raised

    with pytest.raises(seen, match=r"No space left on device|mistake"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_atomic_write_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existed_at_sync = []
    monkeypatch.setattr(os, "fsync", lambda _: existed_at_sync.append((tmp_path / "x").exists()))
    atomic_write(tmp_path / "x", lambda temporary: temporary.write_text("new"))
    assert existed_at_sync == [False]
    assert (tmp_path / "x").exists()


def test_json_lines_survive_a_kill_and_contain_no_nan(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "deep" / "x.jsonl")
    assert list(lines) == []
    lines.append({"a": float("nan"), "b": "é\u2028"})
    lines.append({"c": 2})
    whole = lines.path.read_bytes()
    assert list(lines) == [{"a": None, "b": "é\u2028"}, {"c": 2}]
    for cut in range(1, len(whole.splitlines()[-1]) + 2):
        lines.path.write_bytes(whole[:-cut])
        lines.append({"more": True})
        values = [{"c": 2}] if cut == 1 else []  # the line is complete if only its line end is missing
        assert list(lines) == [{"a": None, "b": "é\u2028"}, *values, {"more": True}]
    with pytest.raises(StorageError):
        JsonLines(tmp_path).append({})


def test_json_lines_skip_a_line_with_a_flipped_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append({"text": "é", "value": 0.25})
    lines.append({"text": "b", "value": 3})
    whole, first = lines.path.read_bytes(), {"text": "é", "value": 0.25}
    start = whole.index(b"\n") + 1
    for position in range(start, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        lines.path.write_bytes(damaged)
        caplog.clear()
        assert list(lines) == [first]
        assert "truncated or damaged lines" in caplog.text


def test_json_lines_without_checksums_are_read_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a":1}\n[2]\n')
    assert list(JsonLines(path)) == []
    assert list(JsonLines(path, is_strict=False)) == [{"a": 1}]


def test_read_json_detects_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    values = {"n": 12, "share": 0.5, "text": "é 🙂", "none": float("nan"), "list": [1, [True]]}
    write_checked_json(path, values)
    whole = path.read_bytes()
    assert read_json(path, remedy="Restore it.") == values | {"none": None}
    for position in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="Restore it"):
            read_json(path, remedy="Restore it.")


@pytest.mark.parametrize("content", ["", "{}", "[]", "7", '{"a": 1}', "[" * 100_000])
def test_read_json_refuses_a_file_without_a_checked_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json", remedy="Restore it.")
