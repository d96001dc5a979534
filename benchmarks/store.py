"""What the store of histories costs: adding, reading, erasing, and what int8 loses.

    python benchmarks/store.py [--users 100000] [--where FILE|URL] [--encoder MODEL] [--json FILE]

Users with ten generated items each are added in bulk, and between them a hundred users with 512, whose histories are
read again and again while the number of users grows; then some of the users are erased. With `--encoder`, the loss is
measured on its vectors of short texts, else on random unit vectors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from personaplug.data.records import HistoryItem
from personaplug.encoders import HashEncoder
from personaplug.encoders.style_features import FEATURES
from personaplug.infra.atomic_io import write_json
from personaplug.run import machine, versions
from personaplug.store.history_store import EncodedItems, HistoryStore

WIDTH = 384
ITEMS = 10
LONG = 512
LONG_USERS = 100
BATCH = 5_000  # users that are added in one transaction
READS = 2_000
TENANT = "benchmark"
SECRET = b"the secret of the benchmark"
"""Kept here only because nothing in this store is anybody's."""


def batch(names: list[str], each: int, *, seed: int) -> EncodedItems:
    """So many items for each of some users, with random vectors."""
    count = len(names) * each
    random = np.random.default_rng(seed)
    return EncodedItems(
        users=[name for name in names for _ in range(each)],
        items=[HistoryItem(str(i % each), ()) for i in range(count)],
        vectors=random.standard_normal((count, WIDTH), dtype=np.float32) / WIDTH**0.5,
        encoder=HashEncoder(WIDTH).identity,
        label_ids=np.full(count, -1, dtype=np.int16),
        style=random.standard_normal((count, len(FEATURES)), dtype=np.float32).astype(np.float16),
    )


class Spent(NamedTuple):
    """Seconds by the clock on the wall and of a processor; beside other work, the former say little of the store."""

    wall: float
    processor: float


def spent_on(work: Callable[..., object], *given: object, **named: object) -> Spent:
    """How long something takes."""
    wall, processor = time.perf_counter(), time.process_time()
    work(*given, **named)
    return Spent(time.perf_counter() - wall, time.process_time() - processor)


def milliseconds(times: Sequence[Spent]) -> dict[str, float]:
    """The middle, the 99th percentile and the longest of some durations."""
    walls, processors = zip(*times, strict=True)
    return {
        "p50_ms": round(1e3 * float(np.percentile(walls, 50)), 2),
        "p99_ms": round(1e3 * float(np.percentile(walls, 99)), 2),
        "longest_ms": round(1e3 * max(walls), 2),
        "processor_p50_ms": round(1e3 * float(np.percentile(processors, 50)), 2),
        "processor_p99_ms": round(1e3 * float(np.percentile(processors, 99)), 2),
    }


def read_times(store: HistoryStore) -> dict[str, float]:
    """How long reading a history of 512 items takes, each from another user than the one before."""
    names = np.random.default_rng(0).integers(0, LONG_USERS, READS)
    for name in range(LONG_USERS):  # statements are prepared, pages are where the system keeps them
        store.load_history(TENANT, f"long {name}")
    return milliseconds([spent_on(store.load_history, TENANT, f"long {name}", latest=LONG) for name in names])


def grow(store: HistoryStore, users: int) -> list[dict[str, Any]]:
    """Add users in bulk; tell the pace and the time of reading at every power of ten."""
    found: list[dict[str, Any]] = []
    made, spent = 0, list[Spent]()
    store.add_encoded(TENANT, batch([f"long {i}" for i in range(LONG_USERS)], LONG, seed=0))
    while made < users:
        until = min(made + BATCH, users, next(10**power for power in range(3, 10) if 10**power > made))
        items = batch([f"user {i}" for i in range(made, until)], ITEMS, seed=made)
        spent.append(spent_on(store.add_encoded, TENANT, items))
        made = until
        if made == users or made in (1_000, 10_000, 100_000, 1_000_000):
            walls, processors = zip(*spent, strict=True)
            pace = {
                "items_per_second": round(made * ITEMS / sum(walls)),
                "items_per_processor_second": round(made * ITEMS / sum(processors)),
            }
            found.append({"users": made} | pace | {"reading": read_times(store)})
            print(found[-1], flush=True)
    return found


def measure(where: str, users: int) -> dict[str, Any]:
    """All of it, printed as it comes."""
    store = HistoryStore.open(where, HashEncoder(WIDTH), secret=SECRET)
    grown = grow(store, users)
    one = [batch([f"user {i}"], 1, seed=users + i) for i in range(200)]
    singly = [spent_on(store.add_encoded, TENANT, items) for items in one]
    erased = [spent_on(store.erase_user, TENANT, f"user {i}") for i in range(20)]
    found = {
        "growth": grown,
        "adding_one_item": milliseconds(singly),
        "erasing_a_user": milliseconds(erased),
    }
    print({name: value for name, value in found.items() if name != "growth"})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--where", help="an empty place for a store; without it, SQLite in a temporary folder")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.where or f"{folder}/store.db", given.users)
    if given.json:
        write_json(given.json, found | {"versions": versions(), "machine": machine()})


if __name__ == "__main__":
    main()
