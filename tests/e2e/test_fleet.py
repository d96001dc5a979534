"""Several servers behind one PostgreSQL, under load, with a kill and a rolling change (`benchmarks/fleet.py`).

PERSONAPLUG_FLEET_RATE and PERSONAPLUG_FLEET_SECONDS change the load, for example to 200 requests a second for 60 s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fleet import Settings, check_fleet
from fleet_check.clients import Clients, Given, Record
from fleet_check.final_check import References, check_answers, check_store, count_interchangeable
from fleet_check.servers import Fleet
from postgres_server import PostgresServer
from stores import ENCODER

from personaplug.data.records import HistoryItem
from personaplug.store.history_store import HistoryStore, StoreSettings

SECRET = b"a secret of sixteen bytes or more"
RECORDS: tuple[Record, ...] = tuple({"id": f"i{n}", "text": f"a film {n}", "score": "4"} for n in range(3))


@pytest.mark.slow
def test_kill_and_rolling_change_lose_and_mix_up_nothing(postgres: PostgresServer, tmp_path: Path) -> None:
    rate, seconds = (float(os.environ.get(f"PERSONAPLUG_FLEET_{name}", 30)) for name in ("RATE", "SECONDS"))
    settings = Settings(rate=rate, seconds=seconds)
    results = check_fleet(tmp_path, store=postgres.cleaned_database(), settings=settings)
    print(results)
    assert results["faults"] == []
    assert results["answers_of_the_new_plug"] > 0
    assert results["answers_that_fit_another_user_too"] <= 10  # of 200
    assert results["receipts_checked"] > 0
    assert sum(results["broken_connections"].values()) > 0, "the kill has hit requests"


class _Constant(References):
    """References that depend on the number of items only."""

    def __init__(self) -> None:
        pass

    def probabilities(self, answers: Sequence[Given]) -> list[Mapping[str, float]]:
        return [{"1": 0.1 * len(given.history), "2": 1 - 0.1 * len(given.history)} for given in answers]


def test_answer_of_another_user_or_another_plug_is_a_fault() -> None:
    right = Given("v1", "a film", RECORDS[:2], {"1": 0.2, "2": 0.8})
    other = Given("v1", "a film", RECORDS, {"1": 0.3, "2": 0.7})
    assert check_answers([right, other], _Constant()) == []
    (fault,) = check_answers([right, replace(other, probabilities=right.probabilities)], _Constant())
    assert "is not that of its user" in fault
    assert count_interchangeable([right, other], _Constant()) == 0
    assert count_interchangeable([right, replace(right, history=RECORDS[1:])], _Constant()) == 2


def _store(where: Path, records: tuple[Record, ...]) -> HistoryStore:
    settings = StoreSettings(labels=tuple("12345"), keep_text=True, shards=2)
    store = HistoryStore.open(where, ENCODER, settings=settings, secret=SECRET)
    items = [HistoryItem(each["id"], (("text", each["text"]), ("score", each["score"])), "score") for each in records]
    store.add(store.admit("shop", "user-0"), items)
    return store


@pytest.mark.parametrize(
    ("stored", "told", "fault"),
    [
        (RECORDS, RECORDS, ""),
        (RECORDS[:2], RECORDS, "the store has 2 items, expected 3"),
        (RECORDS, RECORDS[:2], "the store has 3 items, expected 2"),
        (RECORDS, (*RECORDS[:2], RECORDS[2] | {"score": "5"}), "the store has 3 items, expected 3"),
    ],
)
def test_lost_or_changed_write_is_a_fault(
    tmp_path: Path, stored: tuple[Record, ...], told: tuple[Record, ...], fault: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET.hex())
    secret.chmod(0o600)
    store = _store(tmp_path / "store.db", stored)
    clients = Clients(Fleet([]), None, {"shop": "key"}, users=1, new_model="v2")  # type: ignore[arg-type]  # sends nothing
    clients.users[0].items = list(told)
    found = check_store(clients, url=str(tmp_path / "store.db"), secret=secret)
    assert found == ([f"shop/user-0: {fault}"] if fault else [])
    clients.users[0].items = list(stored)
    clients.log.erased.add(("shop", "user-0", stored[0]["id"]))
    assert check_store(clients, url=str(tmp_path / "store.db"), secret=secret) == [
        "shop/user-0: 1 erased items are back"
    ]
    receipt = store.erase_user("shop", "user-0").to_dict()
    clients.users[0].items = []
    clients.log.receipts = [("shop", "user-0", receipt), ("shop", "user-1", receipt)]
    found = check_store(clients, url=str(tmp_path / "store.db"), secret=secret)
    assert found == ["shop/user-1: a receipt is not valid"]
    store.close()
