"""The embedding store: crash safety, deduplication by content, one encoder per store, threads and processes."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import sqlite3
import time
import tracemalloc
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cheap_encoder import CheapEncoder

from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import EncoderIdentity, HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore, content_key
from personaplug.encoders.encoded_sample import encode_samples
from personaplug.encoders.row_checks import RowHash
from personaplug.errors import DamagedFile, EncoderMismatch, ShapeMismatch, StorageError, UserError

TEXTS = ["a film", "a book", "", "A film", "broken \ud83d", "a film 🙂"]
SECRET = "the text of a user"


class BrokenEncoder(CheapEncoder):
    """Return NaN for the text SECRET, or a wrong shape."""

    def __init__(self, *, shape: bool = False) -> None:
        super().__init__()
        self.shape = shape

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        vectors = super().encode(texts)
        vectors[[text == SECRET for text in texts]] = np.nan
        return vectors[:, :-1] if self.shape else vectors


def count_added(table: EmbeddingStore, texts: Iterable[str], *, chunk: int = 4096) -> tuple[int, int]:
    """Add texts; return the number of new rows, and the number of texts that needed no new row."""
    before = len(table)
    row_ids = table.add(texts, chunk=chunk)
    new = len(table) - before
    return new, len(row_ids) - new


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.open(tmp_path / "table", HashEncoder(32))


def test_gather_returns_float16_vectors(table: EmbeddingStore) -> None:
    assert count_added(table, TEXTS) == (len(TEXTS), 0)
    vectors = table.gather(table.add(TEXTS))
    assert type(vectors) is np.ndarray
    assert vectors.dtype == np.float16
    assert vectors.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(vectors, table.encoder.encode(TEXTS), atol=1e-3)
    assert len(table) == len(TEXTS)


def test_repeated_text_is_stored_once(table: EmbeddingStore) -> None:
    assert count_added(table, ["x", "y", "x"], chunk=2) == (2, 1)
    assert count_added(table, iter(["y", "z", "y"])) == (1, 2)
    assert len(table) == 3
    assert table.add(["z", "x", "x"]).tolist() == [2, 0, 0]


def test_add_without_texts_returns_no_rows(table: EmbeddingStore) -> None:
    assert count_added(table, []) == (0, 0)
    assert table.add([]).shape == (0,)
    assert table.gather(np.zeros(0, dtype=np.int64)).shape == (0, 32)
    assert table.gather(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0, 32)


def test_store_can_grow_after_it_is_opened_again(table: EmbeddingStore) -> None:
    table.add(TEXTS[:3])
    again = EmbeddingStore.open(table.folder, HashEncoder(32))
    first = again.gather(again.add(TEXTS[:3]))
    assert count_added(again, TEXTS) == (3, 3)
    np.testing.assert_array_equal(table.gather(table.add(TEXTS))[:3], first)
    assert len(table) == len(TEXTS), "an open store sees rows that were added later"


def test_add_in_another_order_gives_equal_vectors(tmp_path: Path) -> None:
    one = EmbeddingStore.open(tmp_path / "one", HashEncoder(32))
    two = EmbeddingStore.open(tmp_path / "two", HashEncoder(32))
    one.add(TEXTS)
    for text in reversed(TEXTS):
        two.add([text])
    np.testing.assert_array_equal(one.gather(one.add(TEXTS)), two.gather(two.add(TEXTS)))


def test_store_files_contain_no_text(table: EmbeddingStore) -> None:
    table.add([SECRET])
    assert (table.folder / "vectors.f16").stat().st_size == 2 * 32
    description = json.loads((table.folder / "table.json").read_text())
    assert (description["format"], description["width"]) == (3, 32)
    assert EncoderIdentity.from_dict(description["encoder"]) == HashEncoder(32).identity
    assert not any(SECRET.encode() in file.read_bytes() for file in table.folder.iterdir())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_add_returns_row_ids_in_the_order_of_the_texts(table: EmbeddingStore, chunk: int) -> None:
    table.add(["old"])
    assert table.add(["a", "old", "b", "a", "c", "b"], chunk=chunk).tolist() == [1, 0, 2, 1, 3, 2]
    assert table.add([]).dtype == np.int64


def test_add_hashes_and_looks_up_each_text_once(table: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    table.add(["a", "b"])
    hashed: list[str] = []
    looked_up: list[int] = []
    look_up = table._look_up

    def counting_key(text: str) -> bytes:
        hashed.append(text)
        return content_key(text)

    def counting_look_up(keys: Collection[bytes]) -> dict[bytes, int]:
        looked_up.append(len(keys))
        return look_up(keys)

    monkeypatch.setattr("personaplug.encoders.embedding_store.content_key", counting_key)
    monkeypatch.setattr(table, "_look_up", counting_look_up)
    table.add(["a", "b", "a", "b", "a"])
    assert (hashed, looked_up) == (["a", "b"], [2])


# Refusals


def test_open_with_another_encoder_raises(table: EmbeddingStore) -> None:
    with pytest.raises(EncoderMismatch, match=r"hash:32.*hash:64"):
        EmbeddingStore.open(table.folder, HashEncoder(64))
    with pytest.raises(EncoderMismatch):
        EmbeddingStore.open(table.folder, HashEncoder(32, seed=1))


def test_open_with_a_renamed_encoder_succeeds(table: EmbeddingStore) -> None:
    moved = HashEncoder(32)
    moved.identity = replace(moved.identity, name="/elsewhere", revision="abc", query_prompt="query: ")
    assert EmbeddingStore.open(table.folder, moved).encoder.identity == moved.identity


@pytest.mark.parametrize("row", [-1, 1, 10**9])
def test_gather_unknown_row_raises(table: EmbeddingStore, row: int) -> None:
    table.add(["only"])
    with pytest.raises(UserError, match="rows 0 to 0"):
        table.gather(np.array([0, row]))


def test_nan_raises_and_stores_nothing_of_the_chunk(tmp_path: Path) -> None:
    table = EmbeddingStore.open(tmp_path, BrokenEncoder())
    with pytest.raises(UserError, match="NaN or infinite values for 1 of 2 items") as raised:
        table.add(["fine", "also", "more", SECRET], chunk=2)
    assert SECRET not in str(raised.value)
    assert len(table) == 2
    assert count_added(table, ["more"]) == (1, 0)


def test_vectors_of_wrong_shape_raise(tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match=r"\(1, 63\).*\(1, 64\)"):
        EmbeddingStore.open(tmp_path, BrokenEncoder(shape=True)).add(["x"])


# Damage


def test_uncommitted_vectors_are_dropped_at_open(table: EmbeddingStore) -> None:
    table.add(["x"])
    with (table.folder / "vectors.f16").open("ab") as file:
        file.write(b"\xff" * 100)  # one row and a half
    again = EmbeddingStore.open(table.folder, HashEncoder(32))
    assert len(again) == 1
    again.add(["y"])
    assert (table.folder / "vectors.f16").stat().st_size == 2 * 2 * 32
    np.testing.assert_allclose(again.gather(again.add(["x", "y"])), HashEncoder(32).encode(["x", "y"]), atol=1e-3)


def test_open_with_lost_vectors_raises(table: EmbeddingStore) -> None:
    table.add(["x", "y"])
    os.truncate(table.folder / "vectors.f16", 3 * 32)
    with pytest.raises(UserError, match=r"has 2 rows, vectors.f16 or checks.u64 has 1. Delete the folder"):
        EmbeddingStore.open(table.folder, HashEncoder(32))


def test_open_with_damaged_index_raises(table: EmbeddingStore) -> None:
    (table.folder / "index.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 50)
    with pytest.raises(UserError, match="damaged"):
        EmbeddingStore.open(table.folder, HashEncoder(32))
    (table.folder / "index.sqlite").unlink()
    with pytest.raises(UserError, match="damaged"):
        EmbeddingStore.open(table.folder, HashEncoder(32))


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1, "encoder": {"name": "x"}}', "[]"])
def test_open_with_damaged_description_raises(table: EmbeddingStore, content: str) -> None:
    (table.folder / "table.json").write_text(content)
    with pytest.raises(UserError, match="does not describe an embedding store"):
        EmbeddingStore.open(table.folder, HashEncoder(32))


def test_open_store_of_later_format_raises(table: EmbeddingStore) -> None:
    description = json.loads((table.folder / "table.json").read_text())
    (table.folder / "table.json").write_text(json.dumps(description | {"format": 4}))
    with pytest.raises(UserError, match="format 4; this version reads format 3"):
        EmbeddingStore.open(table.folder, HashEncoder(32))


def _copy_with_flipped_bit(source: Path, target: Path, *, name: str, position: int, bit: int) -> EmbeddingStore:
    shutil.copytree(source, target)
    content = bytearray((target / name).read_bytes())
    content[position] ^= 1 << bit
    (target / name).write_bytes(content)
    return EmbeddingStore.open(target, HashEncoder(32))


@pytest.mark.parametrize("name", ["vectors.f16", "checks.u64", "table.json", "index.sqlite"])
def test_flipped_bit_never_gives_a_text_a_wrong_vector(table: EmbeddingStore, tmp_path: Path, name: str) -> None:
    texts, more = [f"text {i}" for i in range(40)], ["new", "newer"]
    table.add(texts)
    expected = HashEncoder(32).encode(texts + more).astype(np.float16)
    size = (table.folder / name).stat().st_size
    detected = 0
    for number, position in enumerate(range(0, size - 1, max(1, size // 25))):
        try:
            with warnings.catch_warnings(action="ignore", category=ResourceWarning):
                damaged = _copy_with_flipped_bit(
                    table.folder, tmp_path / f"{number}", name=name, position=position, bit=number % 8
                )
                vectors = damaged.gather(damaged.add(texts + more))
        except DamagedFile:
            detected += 1
        except EncoderMismatch:
            assert name == "table.json"  # the bit is in the encoder's fingerprint
        else:
            np.testing.assert_array_equal(vectors, expected)
    assert detected > 20 or name in ("index.sqlite", "table.json")


def test_each_flipped_bit_of_a_vector_is_detected_when_its_row_is_read(table: EmbeddingStore) -> None:
    row_ids = table.add(["x", "y"])
    path = table.folder / "vectors.f16"
    whole = path.read_bytes()
    for position in range(64):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        again = EmbeddingStore.open(table.folder, HashEncoder(32))
        again.gather(row_ids[1:])  # the other row is intact
        with pytest.raises(DamagedFile, match="row 0 does not match its checksum"):
            again.gather(row_ids)


def test_swapped_rows_and_noise_are_detected(table: EmbeddingStore) -> None:
    row_ids, path = table.add(["x", "y"]), table.folder / "vectors.f16"
    whole = path.read_bytes()
    for content in (whole[64:] + whole[:64], b"\xff" * 128, bytes(128)):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match="checksum"):
            EmbeddingStore.open(table.folder, HashEncoder(32)).gather(row_ids)


def test_index_with_the_row_of_another_text_is_detected(table: EmbeddingStore) -> None:
    table.add(["x", "y"])
    with contextlib.closing(sqlite3.connect(table.folder / "index.sqlite")) as index, index:
        index.execute("UPDATE items SET row = 1 WHERE row = 0")
    with pytest.raises(DamagedFile, match=r"index\.sqlite is damaged: .* encode again"):
        table.add(["x", "y"])


def test_index_without_row_count_never_overwrites_vectors(table: EmbeddingStore) -> None:
    table.add(["x", "y"])
    with contextlib.closing(sqlite3.connect(table.folder / "index.sqlite")) as index, index:
        index.execute("DELETE FROM items WHERE row = 2")
    with pytest.raises(DamagedFile, match="number of rows is missing"):
        table.add(["z"])
    assert (table.folder / "vectors.f16").stat().st_size == 2 * 2 * 32


@pytest.mark.parametrize("width", [1, 2, 3, 7, 384])
def test_row_hash_depends_on_row_ids_and_values(width: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(200, width)).astype(np.float16)
    row_ids, row_hash = np.arange(200), RowHash(width)
    checks = row_hash(vectors, row_ids)
    np.testing.assert_array_equal(row_hash(vectors[150:], row_ids[150:]), checks[150:])
    assert not (row_hash(vectors, row_ids[::-1]) == checks).any()
    assert not (row_hash(-vectors, row_ids) == checks).any(), "all signs flipped"


def test_open_vectors_without_description_raises(table: EmbeddingStore) -> None:
    table.add(["x"])
    (table.folder / "table.json").unlink()
    with pytest.raises(UserError, match=r"does not say|no table.json"):
        EmbeddingStore.open(table.folder, HashEncoder(32))


def test_open_completes_an_interrupted_creation(tmp_path: Path) -> None:
    (tmp_path / "vectors.f16").touch()
    (tmp_path / "index.sqlite").touch()
    assert count_added(EmbeddingStore.open(tmp_path, HashEncoder(32)), ["x"]) == (1, 0)


def test_full_disk_keeps_earlier_chunks(table: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    table.add(["x"])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            table.add(["x", "y"])
    assert len(EmbeddingStore.open(table.folder, HashEncoder(32))) == 1
    assert count_added(table, ["x", "y"]) == (1, 1)


def test_add_resumes_after_a_failed_write(table: EmbeddingStore) -> None:
    resource = pytest.importorskip("resource")
    table.add(["x"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="Earlier chunks are complete"):
            table.add(str(i) for i in range(4000))  # 256 kB of vectors
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (table.folder / "vectors.f16").stat().st_size == 100_000
    assert len(table) == 1
    assert count_added(table, (str(i) for i in range(4000))) == (4000, 0)


class Slow(HashEncoder):
    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        time.sleep(0.02)
        return super().encode(texts)


def add_slowly(folder: Path, progress: Connection) -> None:
    def texts() -> Iterator[str]:
        for i in range(4000):
            if i and i % 20 == 0:
                progress.send(i)  # the chunks before this text are complete
            yield f"text {i}"

    EmbeddingStore.open(folder, Slow(32)).add(texts(), chunk=20)


@pytest.mark.parametrize("after_chunks", [1, 4])
def test_killed_process_loses_at_most_one_chunk(table: EmbeddingStore, after_chunks: int) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=add_slowly, args=(table.folder, sender))
    process.start()
    completed = [receiver.recv() for _ in range(after_chunks)]
    time.sleep(0.013 * after_chunks)
    process.kill()
    process.join()
    texts = [f"text {i}" for i in range(500)]
    stored = len(EmbeddingStore.open(table.folder, HashEncoder(32)))
    assert completed[-1] <= stored < 500
    assert stored % 20 == 0
    assert count_added(table, texts) == (500 - stored, stored), "the killed process left no lock"
    rows = table.add(texts)
    assert sorted(rows) == list(range(500))
    assert len(table) == 500
    np.testing.assert_allclose(table.gather(rows), HashEncoder(32).encode(texts), atol=1e-3)
    assert (table.folder / "vectors.f16").stat().st_size == 500 * 2 * 32


# Several at once


def test_second_writer_raises_and_readers_continue(table: EmbeddingStore) -> None:
    table.add(["x"])
    other = EmbeddingStore.open(table.folder, HashEncoder(32))

    def texts() -> Iterator[str]:
        yield "y"
        with pytest.raises(UserError, match="Another process is writing"):
            other.add(["z"])
        assert count_added(other, ["x", "y"]) == (0, 2), "no text is missing, so no lock is needed"
        assert other.add(["x", "y"]).tolist() == [0, 1]
        yield "z"

    assert count_added(table, texts(), chunk=1) == (2, 0)
    assert count_added(other, ["z", "w"]) == (1, 1)


def test_store_shared_by_threads_gives_equal_rows(table: EmbeddingStore) -> None:
    expected = table.add(TEXTS).tolist()
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda _: table.add(TEXTS).tolist(), range(40)))
    assert rows == [expected] * 40


def test_store_inherited_by_forked_process_opens_its_own_connection(table: EmbeddingStore) -> None:
    rows = table.add(TEXTS).tolist()
    parent_connection = table._connection.get()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        queue.put((table.add([*TEXTS, "of the child"]).tolist(), table._connection.get() is parent_connection))

    process = context.Process(target=child)
    process.start()
    child_rows, is_shared = queue.get(timeout=60)
    process.join(timeout=60)
    assert (child_rows, is_shared) == ([*rows, len(rows)], False)
    assert table._connection.get() is parent_connection
    assert table.add(["of the child"]).tolist() == [len(rows)]


def read(folder: str) -> list[int]:
    table = EmbeddingStore.open(folder, HashEncoder(32))
    rows = table.add(TEXTS)
    assert np.isfinite(table.gather(rows)).all()
    return [int(row) for row in rows]


def test_several_processes_read_a_store_at_once(table: EmbeddingStore) -> None:
    table.add(TEXTS)
    table.gather(table.add(TEXTS))  # the forked processes inherit an open memory map
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map_async(read, [str(table.folder)] * 6).get(timeout=60) == [list(range(len(TEXTS)))] * 6


def test_pickled_store_has_no_vectors(tmp_path: Path) -> None:
    table = EmbeddingStore.open(tmp_path, HashEncoder(64))
    table.add(str(i) for i in range(1000))
    expected = table.gather(table.add(["7"]))
    sent = pickle.dumps(table)
    assert len(sent) < 5000
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again.gather(again.add(["7"])), expected)


def test_store_in_read_only_folder_is_readable(table: EmbeddingStore) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    table.add(["x"])
    for path in table.folder.iterdir():
        path.chmod(0o444)
    table.folder.chmod(0o555)
    try:
        again = EmbeddingStore.open(table.folder, HashEncoder(32))
        assert count_added(again, ["x"]) == (0, 1)
        with pytest.raises(StorageError):
            again.add(["y"])
    finally:
        table.folder.chmod(0o755)


# Size and speed


def test_add_many_texts_takes_little_memory(tmp_path: Path) -> None:
    count = 200_000
    table = EmbeddingStore.open(tmp_path, CheapEncoder(64))
    tracemalloc.start()
    table.add(f"user {i % 977} liked item {i}" for i in range(count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == count
    assert peak < 15e6, f"{peak / 1e6:.0f} MB; all vectors in float32 would be 51 MB"


# Samples


def make_sample(name: str, *answers: str | None) -> Sample:
    items = [
        HistoryItem(
            id=str(i),
            fields=(("title", f"{SECRET} {name} {i}"), *([("tag", answer)] if answer is not None else [])),
            answer_name="tag" if answer is not None else None,
        )
        for i, answer in enumerate(answers)
    ]
    return Sample(id=name, user_id="u" + name, prompt=f"{SECRET}?", query="q", target="b", history=tuple(items))


def test_encode_samples_keeps_order_and_fields(table: EmbeddingStore) -> None:
    samples = [make_sample("1", "b", "a ", None, "other"), make_sample("2"), make_sample("3", "a")]
    encoded = encode_samples(iter(samples), table, labels=["a", "b"])
    assert [item.label_ids.tolist() for item in encoded] == [[1, 0, -1, -1], [], [0]]
    for sample, result in zip(samples, encoded, strict=True):
        texts = [item.text for item in sample.history]
        np.testing.assert_array_equal(result.rows, table.add(texts))
        assert (result.id, result.owner, result.user_id) == (sample.id, sample.owner, sample.user_id)
        assert (result.prompt, result.query, result.target) == (sample.prompt, sample.query, sample.target)
    assert encoded[0].rows.dtype == np.int64
    assert encoded[0].label_ids.dtype == np.int16
    assert encoded[0].rows.base is None, "no sample keeps the rows of other samples in memory"


def test_encode_samples_without_answer_ignores_answers(table: EmbeddingStore) -> None:
    (with_b,) = encode_samples([make_sample("1", "b")], table, with_answer=False)
    (with_a,) = encode_samples([make_sample("1", "a")], table, with_answer=False)
    assert with_a.rows.tolist() == with_b.rows.tolist()
    (text_a,) = encode_samples([make_sample("1", "a")], table)
    (text_b,) = encode_samples([make_sample("1", "b")], table)
    assert text_a.rows.tolist() != text_b.rows.tolist()
    assert (with_a.label_ids.tolist(), text_b.label_ids.tolist()) == ([-1], [-1])


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_encode_samples_gives_equal_rows_with_any_chunk_size(tmp_path: Path, chunk: int) -> None:
    samples = [make_sample(str(i), *["a"] * (i % 4)) for i in range(10)]
    table, counts = EmbeddingStore.open(tmp_path, CheapEncoder()), list[int]()
    encoded = encode_samples(iter(samples), table, labels=["a"], chunk=chunk, progress=counts.append)
    assert [len(item.rows) for item in encoded] == [i % 4 for i in range(10)]
    assert counts[-1] == 13 == len(table)
    for sample, result in zip(samples, encoded, strict=True):
        assert result.rows.tolist() == table.add([item.text for item in sample.history]).tolist()


def test_encode_samples_has_one_chunk_of_texts_in_memory(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        for i in range(400):
            fields = (("text", f"{i} " + "long " * 200),)
            items = tuple(HistoryItem(id=str(j), fields=(*fields, ("n", str(j)))) for j in range(50))
            yield Sample(id=str(i), user_id=None, prompt="p", query="q", target=None, history=items)

    table = EmbeddingStore.open(tmp_path, CheapEncoder(16))
    tracemalloc.start()
    encoded = encode_samples(samples(), table, chunk=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(encoded) == 400
    assert len(table) == 20_000
    assert peak < 5e6, f"{peak / 1e6:.1f} MB; all texts would be 20 MB"


def test_repr_contains_no_text(table: EmbeddingStore) -> None:
    (encoded,) = encode_samples([make_sample("1", "b")], table)
    assert SECRET not in repr(encoded) + repr(table)
    assert repr(encoded) == "EncodedSample(id='1', user_id='u1', items=1)"


def test_encode_samples_without_samples_is_empty(table: EmbeddingStore) -> None:
    assert encode_samples([], table) == []


def test_add_releases_the_writer_lock(table: EmbeddingStore) -> None:
    table.add(["x"])
    connection = sqlite3.connect(table.folder / "writer.lock", timeout=0)
    connection.execute("BEGIN EXCLUSIVE")
    connection.close()


class _OddEncoder(HashEncoder):
    """Return changed vectors, as an external encoder might."""

    def __init__(self, change: Any) -> None:
        super().__init__(32)
        self._change = change

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Any:
        return self._change(super().encode(texts, batch_size=batch_size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: vectors * 0, "from 0 to 0, wrong for 2 of 2 items"),
        (lambda vectors: vectors * 3, "from 3 to 3, wrong for 2 of 2 items"),
        (lambda vectors: vectors.tolist(), "returned shape list for 2 items"),
        (torch.from_numpy, r"returned shape torch.Size\(\[2, 32\]\)"),
        (lambda vectors: None, "returned shape NoneType"),
    ],
)
def test_vectors_that_are_not_unit_vectors_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    store = EmbeddingStore.open(tmp_path, _OddEncoder(change))
    with pytest.raises(UserError, match=message):
        store.add(["a", "b"])
    assert len(store) == 0


def _vectors(folder: Path, texts: Sequence[str]) -> npt.NDArray[np.float16]:
    store = EmbeddingStore.open(folder, HashEncoder(32))
    return store.gather(store.add(texts))


def test_files_of_another_store_are_refused(tmp_path: Path) -> None:
    texts = ["a", "b", "c"]
    for name in ("one", "two"):
        EmbeddingStore.open(tmp_path / name, HashEncoder(32)).add(texts if name == "one" else texts[::-1])
    for names in (["index.sqlite"], ["vectors.f16", "checks.u64"], ["table.json"]):
        mixed = tmp_path / names[0].partition(".")[0]
        shutil.copytree(tmp_path / "one", mixed)
        for name in names:
            shutil.copy(tmp_path / "two" / name, mixed / name)
        with pytest.raises(DamagedFile, match="does not match its checksum"):
            _vectors(mixed, texts)
