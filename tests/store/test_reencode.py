"""reencoding.py: another encoder's vectors, while others read and write; stopped, it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from cheap_encoder import CheapEncoder
from stores import ENCODER, LABELS, Place, item

from personaplug.encoders import HashEncoder
from personaplug.errors import EncoderMismatch, ItemError, StoreConflict
from personaplug.store.history_store import HistoryStore
from personaplug.store.schema import StoreSettings

OTHER = HashEncoder(64)


class Watching(CheapEncoder):
    """Does something before each batch."""

    def __init__(self) -> None:
        super().__init__(16)
        self.steps: Iterator[object] = iter(())

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        step = next(self.steps, None)
        if callable(step):
            step()
        return super().encode(texts)


@pytest.fixture
def store(place: Place) -> HistoryStore:
    store = place.open()
    for i in range(7):
        store.add("t", f"u{i}", [item(f"{j}", f"text {i} {j}") for j in range(i + 1)])
    return store


def expected(user: int, encoder: HashEncoder | CheapEncoder) -> npt.NDArray[np.float16]:
    texts = [item("", f"text {user} {j}").text for j in range(user + 1)]
    return encoder.encode(texts).astype(np.float16)


def stopped_halfway(store: HistoryStore) -> Watching:
    """The encoder of a migration that was stopped after its first batch."""
    encoder = Watching()

    def stop() -> None:
        raise KeyboardInterrupt

    encoder.steps = iter([None, stop])
    with pytest.raises(KeyboardInterrupt):
        store.re_encode(encoder)
    return encoder


def test_all_vectors_are_made_anew(store: HistoryStore, place: Place) -> None:
    told, versions = list[int](), [store.version("t", f"u{i}") for i in range(7)]
    assert store.re_encode(OTHER, progress=told.append) == 28
    assert told[-1] == 28
    for i in range(7):
        history = store.read("t", f"u{i}")
        np.testing.assert_array_equal(history.vectors, expected(i, OTHER))
        assert history.version == store.version("t", f"u{i}") > versions[i], "caches must know"
    assert store.identity == OTHER.identity
    with store._database.reading() as connection:
        kept = [[len(connection.execute(table.select()).all()) for table in s.vectors] for s in store._tables.shards]
    assert sum(kept[0]) + sum(kept[1]) == 28, "the old vectors are gone"
    assert store.add("t", "u0", [item("new")]) == (1, 0, 0)
    assert place.open(OTHER).re_encode(OTHER) == 0
    with pytest.raises(EncoderMismatch):
        place.open()


def test_there_and_back_again(store: HistoryStore) -> None:
    store.re_encode(OTHER)
    assert store.re_encode(ENCODER) == 28
    np.testing.assert_array_equal(store.read("t", "u6").vectors, expected(6, ENCODER))


def test_texts_without_answers_are_encoded_without(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, encodes_answers=False, shards=1))
    store.add("t", "u", [item("a")])
    store.re_encode(OTHER)
    np.testing.assert_array_equal(store.read("t", "u").vectors, OTHER.encode([item("a").content]).astype(np.float16))


def test_others_go_on_with_the_old_vectors_until_the_switch(store: HistoryStore, place: Place) -> None:
    reader, encoder = place.open(), Watching()

    def meanwhile() -> None:
        np.testing.assert_array_equal(reader.read("t", "u6").vectors[:7], expected(6, ENCODER))
        reader.add("t", "u6", [item("7", "added meanwhile")])
        reader.add("t", "u5", [item("0", "replaced meanwhile")])
        reader.delete_item("t", "u4", "0")
        reader.add("t", "new", [item("0", "of somebody new")])
        assert len(reader.read("t", "u6")) == 8

    encoder.steps = iter([meanwhile, None, None, None])
    store.re_encode(encoder)
    with pytest.raises(EncoderMismatch):
        reader.read("t", "u6")
    with pytest.raises(EncoderMismatch):
        reader.add("t", "u6", [item("8")])
    after = place.open(encoder)
    assert [len(after.read("t", user)) for user in ("u6", "u5", "u4", "new", "u0")] == [8, 6, 4, 1, 1]
    for user in ("u0", "u3", "u4", "u5", "u6", "new"):
        texts = [" ".join(f"{name}: {value}" for name, value in one.fields) for one in after.list_items("t", user)]
        np.testing.assert_array_equal(after.read("t", user).vectors, encoder.encode(texts).astype(np.float16))


def test_a_change_just_before_the_switch_is_not_left_out(
    store: HistoryStore, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from personaplug.store import reencode as reencoding

    switch, reader, late = reencoding._switch, place.open(), [item("late")]

    def switch_late(*given: object) -> object:
        while late:
            reader.add("t", "u0", [late.pop()])
        return switch(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(reencoding, "_switch", switch_late)
    assert store.re_encode(OTHER) == 29
    assert len(store.read("t", "u0")) == 2


def test_a_stopped_migration_goes_on(store: HistoryStore, place: Place) -> None:
    encoder = stopped_halfway(store)
    np.testing.assert_array_equal(store.read("t", "u6").vectors, expected(6, ENCODER))
    with pytest.raises(StoreConflict, match="being moved to cheap"):
        store.re_encode(OTHER)
    done = sum(encoder.calls)
    assert 0 < done < 28
    assert place.open().re_encode(encoder) == 28 - done
    np.testing.assert_array_equal(place.open(encoder).read("t", "u6").vectors, expected(6, encoder))


def test_a_migration_is_given_up_by_going_to_where_the_store_is(store: HistoryStore, place: Place) -> None:
    stopped_halfway(store)
    assert store.re_encode(ENCODER) == 0
    np.testing.assert_array_equal(store.read("t", "u6").vectors, expected(6, ENCODER))
    assert store.re_encode(OTHER) == 28
    np.testing.assert_array_equal(store.read("t", "u6").vectors, expected(6, OTHER))


def test_giving_up_stops_who_is_at_it(store: HistoryStore, place: Place) -> None:
    encoder, other = Watching(), place.open()
    encoder.steps = iter([lambda: other.re_encode(ENCODER)])
    with pytest.raises(StoreConflict, match="given up"):
        store.re_encode(encoder)
    np.testing.assert_array_equal(other.read("t", "u6").vectors, expected(6, ENCODER))


def test_two_at_once_bring_it_to_one_end(store: HistoryStore, place: Place) -> None:
    encoder, other = Watching(), place.open()
    encoder.steps = iter([lambda: other.re_encode(CheapEncoder(16))])
    store.re_encode(encoder)
    for i in range(7):
        np.testing.assert_array_equal(store.read("t", f"u{i}").vectors, expected(i, encoder))


def test_clearing_up_spares_the_next_migration(
    store: HistoryStore, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from personaplug.store import reencode as reencoding

    switch, third = reencoding._switch, Watching()

    def stop() -> None:
        raise KeyboardInterrupt

    def switch_and_begin_anew(*given: object) -> object:
        monkeypatch.setattr(reencoding, "_switch", switch)
        state = switch(*given)  # type: ignore[arg-type]
        third.steps = iter([None, stop])
        with pytest.raises(KeyboardInterrupt):
            place.open(OTHER).re_encode(third)
        return state

    monkeypatch.setattr(reencoding, "_switch", switch_and_begin_anew)
    store.re_encode(OTHER)
    done = sum(third.calls)
    assert store.re_encode(third) == 28 - done < 28
    for i in range(7):
        np.testing.assert_array_equal(store.read("t", f"u{i}").vectors, expected(i, third))


def test_without_texts_it_cannot_be_done(place: Place) -> None:
    store = place.open(keep_text=False)
    with pytest.raises(StoreConflict, match="keeps no texts"):
        store.re_encode(OTHER)
    assert len(store.read("t", "u")) == 0


def test_an_encoder_that_gives_nan_changes_nothing(store: HistoryStore) -> None:
    class Broken(CheapEncoder):
        def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
            return super().encode(texts) * np.nan

    with pytest.raises(ItemError, match="NaN"):
        store.re_encode(Broken(16))
    np.testing.assert_array_equal(store.read("t", "u6").vectors, expected(6, ENCODER))
    assert store.re_encode(ENCODER) == 0
