"""Refill: a new store gets the histories of an old store with another encoder's vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cheap_encoder import CheapEncoder
from stores import ENCODER, LABELS, SECRET, Place, add, add_encoded, encoded, item, item_ids

from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError, EncoderMismatch, MissingData, StoreConflict
from personaplug.store.history_store import HistoryStore, StoreSettings
from personaplug.store.refill import open_target, refill

OTHER = HashEncoder(64)
SETTINGS = StoreSettings(labels=LABELS)
USERS = [f"u{i}" for i in range(7)]


class HookedEncoder(CheapEncoder):
    """Calls `hook` before each batch."""

    def __init__(self, hook: Callable[[], object]) -> None:
        super().__init__(16)
        self.hook = hook

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        self.hook()
        return super().encode(texts)


@pytest.fixture
def source(place: Place) -> HistoryStore:
    store = place.open()
    for i, user in enumerate(USERS):
        add(store, "t", user, [item(str(j), f"text {i} {j}") for j in range(i + 1)])
    return store


def target_of(source: HistoryStore, folder: Path, encoder: HashEncoder | CheapEncoder = OTHER) -> HistoryStore:
    return open_target(source, folder / "new.db", encoder, settings=SETTINGS, save_secret=False)


def assert_same(source: HistoryStore, target: HistoryStore, user: str, encoder: HashEncoder | CheapEncoder) -> None:
    """Check that a user has the encoder's vectors in the target, and otherwise the same values as in the source."""
    items = source.list_items("t", user)
    assert target.list_items("t", user) == items
    assert [copy.label_id for copy in target.list_items("t", user)] == [each.label_id for each in items]
    history, original = target.load_history("t", user), source.load_history("t", user)
    assert history.version == original.version
    np.testing.assert_array_equal(history.vectors, encoder.encode([each.text for each in items]).astype(np.float16))
    np.testing.assert_array_equal(history.label_ids, original.label_ids)
    np.testing.assert_array_equal(history.style, original.style)


def test_refill_copies_everything_but_vectors(source: HistoryStore, tmp_path: Path) -> None:
    add(source, "t", "u0", [item("late", "dated", day=date(2020, 5, 1)), item("early", "x", day=date(2019, 1, 1))])
    add(source, "other", "u0", [item("a", "of another tenant")])
    target, examined = target_of(source, tmp_path), list[int]()
    assert refill(source, target, progress=examined.append) == 8 == sum(examined)
    for user in USERS:
        assert_same(source, target, user, OTHER)
    assert item_ids(target, user="u0") == ["early", "late", "0"]
    assert item_ids(target, "other", "u0") == ["a"]
    assert add(target, "t", "u0", [item("early", "x", day=date(2019, 1, 1)), item("new")]) == (1, 0, 1)


def test_free_text_equal_to_a_label_has_no_label_in_the_copy(source: HistoryStore, tmp_path: Path) -> None:
    label, text = item("a"), replace(item("b"), answer_labels=())
    assert label.answer == text.answer
    add(source, "t", "u", [label, text])
    target = target_of(source, tmp_path)
    refill(source, target)
    for store in (source, target):
        assert [each.label_id >= 0 for each in store.list_items("t", "u")] == [True, False]


def test_refill_replaced_item_keeps_position_after_copy(source: HistoryStore, tmp_path: Path) -> None:
    add(source, "t", "u", [item("first", day=date(2020, 1, 2)), item("second", day=date(2020, 1, 1))])
    target = target_of(source, tmp_path)
    refill(source, target)
    for store in (source, target):
        add(store, "t", "u", [item("first", day=date(2020, 1, 1))])
    assert item_ids(target, user="u") == item_ids(source, user="u") == ["first", "second"]


def test_refill_without_encodes_answers_encodes_only_content(place: Place, tmp_path: Path) -> None:
    source = place.open()
    add(source, "t", "u", [item("a")])
    settings = StoreSettings(encodes_answers=False)
    target = open_target(source, tmp_path / "new.db", OTHER, settings=settings, save_secret=False)
    refill(source, target)
    history = target.load_history("t", "u")
    np.testing.assert_array_equal(history.vectors, OTHER.encode([item("a").content]).astype(np.float16))
    assert history.label_ids.tolist() == [-1], "the new store has no labels"


def test_refill_copies_items_and_erasures_to_both_databases(place: Place, tmp_path: Path) -> None:
    source = Place(str(tmp_path / "old.db")).open()
    for user in ("u1", "u2", "u3"):
        add(source, "t", user, [item("a", f"text of {user}"), item("b")])
    source.erase_user("t", "u1")
    target = open_target(source, place.where, OTHER, settings=SETTINGS, save_secret=False)
    assert refill(source, target) == 2
    assert_same(source, target, "u2", OTHER)
    source.erase_user("t", "u3")
    assert refill(source, target) == 0
    assert (target.version("t", "u1"), target.version("t", "u3")) == (0, 0)
    assert target.erased_at("t", "u3") == source.erased_at("t", "u3")


def test_refill_again_copies_only_changed_users(source: HistoryStore, tmp_path: Path) -> None:
    encoder = CheapEncoder(16)
    target = target_of(source, tmp_path, encoder)
    assert refill(source, target) == 7
    assert refill(source, target) == 0
    add(source, "t", "u1", [item("new"), item("0", "replaced")])
    source.delete_item("t", "u2", "1")
    add(source, "t", "newcomer", [item("a")])
    source.delete_item("t", "u0", "0")
    encoder.calls.clear()
    assert refill(source, target) == 4
    assert sum(encoder.calls) == 3 + 2 + 1 + 0
    for user in (*USERS[1:], "newcomer"):
        assert_same(source, target, user, encoder)
    assert item_ids(target, user="u0") == []
    assert target.version("t", "u0") == source.version("t", "u0")


def test_refill_after_interruption_continues(source: HistoryStore, tmp_path: Path) -> None:
    batches = iter([None, KeyboardInterrupt])

    def interrupt() -> None:
        if error := next(batches, None):
            raise error

    encoder = HookedEncoder(interrupt)
    target = target_of(source, tmp_path, encoder)
    with pytest.raises(KeyboardInterrupt):
        refill(source, target)
    count = sum(bool(target.version("t", user)) for user in USERS)
    assert 0 < count < 7
    assert refill(source, target_of(source, tmp_path, encoder)) == 7 - count
    for user in USERS:
        assert_same(source, target, user, encoder)


def test_refill_leaves_newer_history_in_target(source: HistoryStore, tmp_path: Path) -> None:
    target = target_of(source, tmp_path)
    refill(source, target)
    add(target, "t", "u1", [item("only in the target")])
    assert refill(source, target) == 0
    assert "only in the target" in item_ids(target, user="u1")


def test_refill_copies_erasures(source: HistoryStore, tmp_path: Path) -> None:
    receipt = source.erase_user("t", "u3")
    target = target_of(source, tmp_path)
    assert refill(source, target) == 6
    assert target.erased_at("t", "u3") == source.erased_at("t", "u3") is not None
    assert target.has_issued(receipt, user="u3")
    assert target.version("t", "u3") == 0


def test_user_erased_from_the_source_later_is_removed_from_the_target(source: HistoryStore, tmp_path: Path) -> None:
    target = target_of(source, tmp_path)
    refill(source, target)
    (tmp_path / "new.db.secret").unlink(missing_ok=True)
    trace = target.load_history("t", "u3").vectors[0].tobytes()
    target.close()
    assert trace in (tmp_path / "new.db").read_bytes()
    source.erase_user("t", "u3")
    assert refill(source, target) == 0
    assert (target.version("t", "u3"), target.list_items("t", "u3")) == (0, [])
    files = b"".join(path.read_bytes() for path in tmp_path.glob("new.db*"))
    assert trace not in files
    assert b"text 3 0" not in files
    with pytest.raises(MissingData):
        target.erase_user("t", "u3")


def test_user_erased_from_the_target_does_not_return(source: HistoryStore, tmp_path: Path) -> None:
    target = target_of(source, tmp_path)
    refill(source, target)
    target.erase_user("t", "u3")
    assert refill(source, target) == 0
    add(source, "t", "u3", [item("new")])
    assert refill(source, target) == 0
    assert target.version("t", "u3") == 0
    assert refill(source, target) == 0


def test_user_erased_during_the_copy_does_not_return(place: Place, tmp_path: Path) -> None:
    source = place.open()
    add(source, "t", "u", [item("a")])
    add(source, "t", "returning", [item("a")])

    def erase_once() -> None:
        if source.version("t", "u"):
            source.erase_user("t", "u")
            source.erase_user("t", "returning")
            add(source, "t", "returning", [item("b")])

    encoder = HookedEncoder(erase_once)
    target = target_of(source, tmp_path, encoder)
    refill(source, target)
    assert target.version("t", "u") == 0
    assert target.erased_at("t", "u") is not None
    assert_same(source, target, "returning", encoder)


def test_open_target_of_store_without_texts_raises(place: Place, tmp_path: Path) -> None:
    source = place.open(keep_text=False)
    add_encoded(source, "t", encoded(["u"], ["a"]))
    with pytest.raises(StoreConflict, match="keeps no texts"):
        target_of(source, tmp_path)
    assert not (tmp_path / "new.db").exists()


def test_open_target_with_other_settings_encoder_or_secret_raises(source: HistoryStore, tmp_path: Path) -> None:
    target_of(source, tmp_path).close()
    with pytest.raises(StoreConflict, match="labels"):
        open_target(source, tmp_path / "new.db", OTHER, settings=StoreSettings(), save_secret=False)
    with pytest.raises(EncoderMismatch):
        target_of(source, tmp_path, ENCODER)
    HistoryStore.open(tmp_path / "foreign.db", OTHER, settings=StoreSettings(LABELS, keep_text=True, shards=2)).close()
    with pytest.raises(StoreConflict, match="secret"):
        open_target(source, tmp_path / "foreign.db", OTHER, settings=SETTINGS, save_secret=True)


def test_open_target_same_store_raises(place: Place, source: HistoryStore) -> None:
    with pytest.raises(ConfigError, match="same store"):
        open_target(source, place.where, ENCODER, settings=SETTINGS, save_secret=False)


def test_open_target_saves_secret_beside_target(source: HistoryStore, tmp_path: Path) -> None:
    open_target(source, tmp_path / "new.db", OTHER, settings=SETTINGS, save_secret=True).close()
    assert bytes.fromhex((tmp_path / "new.db.secret").read_text()) == SECRET
    assert HistoryStore.open(tmp_path / "new.db", OTHER).settings.shards == 2
