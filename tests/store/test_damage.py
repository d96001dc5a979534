"""A flipped bit anywhere in the database raises an error or has no effect."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from stores import ENCODER, Place, add, item

from personaplug.errors import PersonaPlugError, StorageError
from personaplug.store.history_store import HistoryStore
from personaplug.store.schema import StoreSettings

USERS = [("t", f"user {number}") for number in range(4)]


def contents(path: Path) -> dict[str, Any]:
    """Read everything from the store; if a call raises an error of the package, return the error as its value."""

    def value_or_error(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except PersonaPlugError as error:
            return error

    store = value_or_error(lambda: HistoryStore.open(path, ENCODER))
    if isinstance(store, PersonaPlugError):
        return {"open": store}
    values: dict[str, Any] = {"settings": store.settings}
    for tenant, user in USERS:
        for latest in (None, 3):
            arrays = value_or_error(lambda: _arrays(store, tenant, user, latest))  # noqa: B023
            items = value_or_error(lambda: store.list_items(tenant, user, latest=latest))  # noqa: B023
            values |= {f"arrays {user} {latest}": arrays, f"items {user} {latest}": items}
        values[f"export {user}"] = value_or_error(lambda: json.loads("".join(store.export(tenant, user))))  # noqa: B023
    store.close()
    return values


def _arrays(store: HistoryStore, tenant: str, user: str, latest: int | None) -> tuple[Any, ...]:
    history = store.load_history(tenant, user, latest=latest)
    return history.version, history.vectors.tolist(), history.label_ids.tolist(), history.style.tolist()


def filled(tmp_path: Path) -> Path:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(settings=StoreSettings(labels=("1", "2"), keep_text=True, shards=1), secret=None)
    for number, (tenant, user) in enumerate(USERS):
        items = [item(str(k), f"{user} text {k}", day=date(2020, 1, 1 + k % 3)) for k in range(3 + 2 * number)]
        add(store, tenant, user, items)
    store.close()
    return tmp_path / "store.db"


def flip_bits(tmp_path: Path, *, times: int) -> int:
    path, random_bits = filled(tmp_path), random.Random(0)
    whole, expected = path.read_bytes(), contents(path)
    assert not any(isinstance(value, PersonaPlugError) for value in expected.values())
    detected = 0
    for _ in range(times):
        bit = random_bits.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        for log in path.parent.glob("store.db-*"):
            log.unlink()
        path.write_bytes(damaged)
        values = contents(path)
        errors = {name for name, value in values.items() if isinstance(value, PersonaPlugError)}
        changed = {name: value for name, value in values.items() if name not in errors and value != expected[name]}
        assert not changed, f"bit {bit}: {sorted(changed)}"
        detected += bool(errors)
    return detected


def test_flipped_bits_raise_errors_or_have_no_effect(tmp_path: Path) -> None:
    assert flip_bits(tmp_path, times=90) > 5


@pytest.mark.slow
def test_thousands_of_flipped_bits_raise_errors_or_have_no_effect(tmp_path: Path) -> None:
    assert flip_bits(tmp_path, times=4000) > 100


@pytest.mark.parametrize("start", [56, 200])
def test_flipped_bit_in_stored_vector_raises(tmp_path: Path, start: int) -> None:
    path = filled(tmp_path)
    vector = ENCODER.encode([item("1", "user 2 text 1").text])[0].astype("<f2").tobytes()
    content = path.read_bytes()
    offset = content.index(vector)
    path.write_bytes(content[:offset] + bytes([content[offset] ^ 64]) + content[offset + 1 :])
    store = HistoryStore.open(path, ENCODER)
    with pytest.raises(StorageError, match="damaged"):
        store.load_history("t", "user 2")
    with pytest.raises(StorageError, match="damaged"):
        list(store.export("t", "user 2"))
    assert len(store.load_history("t", "user 1")) == 5


def test_emptied_store_is_not_opened_as_a_new_store(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="is an empty file"):
        HistoryStore.open(path, ENCODER)
    assert path.read_bytes() == b""
