"""Receipts of erasures: a store recognizes its own receipts, and receipts do not reveal users."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import ENCODER, SECRET, Place, add, item

from personaplug.errors import ConfigError, UserError
from personaplug.store.history_store import HistoryStore
from personaplug.store.receipts import Receipt, Secret


@pytest.fixture
def receipt(tmp_path: Path) -> Receipt:
    store = Place(str(tmp_path / "store.db")).open()
    add(store, "t", "u", [item("a")])
    return store.erase_user("t", "u")


def test_has_issued_own_receipt_is_true(tmp_path: Path, receipt: Receipt) -> None:
    store = Place(str(tmp_path / "store.db")).open(encoder=None)
    assert store.has_issued(receipt)
    assert store.has_issued(receipt, tenant="t", user="u")
    assert not store.has_issued(receipt, user="v")
    assert not store.has_issued(receipt, tenant="other", user="u")
    assert store.has_issued(Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))))
    other = Place(str(tmp_path / "other.db")).open(secret=b"another secret, as long")
    assert not other.has_issued(receipt)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "other"},
        {"user": "0" * 64},
        {"items": 2},
        {"erased_at": "2020-01-01T00:00:00+00:00"},
        {"wiped": ("tables",)},
        {"signature": "0" * 64},
        {"signature": ""},
        {"signature": "é"},
    ],
)
def test_has_issued_changed_receipt_is_false(tmp_path: Path, receipt: Receipt, change: dict[str, object]) -> None:
    store = Place(str(tmp_path / "store.db")).open(encoder=None)
    assert not store.has_issued(replace(receipt, **change))  # type: ignore[arg-type]


def test_receipt_does_not_name_user(receipt: Receipt) -> None:
    text = json.dumps(receipt.to_dict())
    ids = (b"u", b"tu", b'["t", "u"]')
    hashes = [hashlib.new(name, value).hexdigest() for name in ("sha256", "blake2b") for value in ids]
    assert not any(value in text for value in hashes), "a hash without a key could be guessed"
    assert receipt.user == Secret(SECRET).hash("user", "t", "u")
    assert receipt.user != Secret(b"another secret, as long").hash("user", "t", "u")
    assert receipt.user != Secret(SECRET).hash("user", "other", "u")


def test_receipt_from_other_fields_raises() -> None:
    with pytest.raises(UserError, match="exactly these fields: tenant"):
        Receipt.from_dict({"tenant": "t"})
    with pytest.raises(UserError):
        Receipt.from_dict({"wiped": [], "more": 1})


@pytest.mark.parametrize("signature", ["\ud800", "é", "", 1, ["a"], None])
def test_invalid_signature_is_not_accepted(tmp_path: Path, receipt: Receipt, signature: Any) -> None:
    store = Place(str(tmp_path / "store.db")).open()
    assert store.has_issued(receipt)
    assert not store.has_issued(replace(receipt, signature=signature))


def test_secret_file_is_created_once_and_not_shown(tmp_path: Path) -> None:
    first = Secret.from_file(tmp_path / "secret", create=True)
    again = Secret.from_file(tmp_path / "secret", create=True)
    assert first.hash("x") == again.hash("x")
    assert (tmp_path / "secret").read_text() not in repr(first)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    (tmp_path / "secret").write_text("not hex")
    with pytest.raises(ConfigError, match="hex digits"):
        Secret.from_file(tmp_path / "secret", create=False)


def test_erase_user_with_default_settings_returns_a_receipt(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "s.db", ENCODER)
    add(store, "t", "u", [item("a")])
    assert store.has_issued(store.erase_user("t", "u"))
