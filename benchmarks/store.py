"""Measure the store of histories: adding, reading and erasing.

    python benchmarks/store.py [--users 100000] [--where FILE|URL] [--json FILE]

Adds users with ten generated items each in bulk. A hundred further users have 512 items each. Their histories are read
repeatedly while the number of users grows. Then some users are erased.
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
from personaplug.infra.environment import machine_info, package_versions
from personaplug.store.history_store import EncodedItems, HistoryStore

WIDTH = 384
ITEMS = 10
LONG = 512
LONG_USERS = 100
BATCH = 5_000  # users that are added in one transaction
READS = 2_000
TENANT = "benchmark"
SECRET = b"the secret of the benchmark"
"""Public, because the store has only generated data."""


def batch(names: list[str], each: int, *, seed: int) -> EncodedItems:
    """Return `each` items per user, with random vectors."""
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


def add(store: HistoryStore, items: EncodedItems) -> None:
    """Add items as a new request would."""
    store.add_encoded(store.admit(TENANT, *set(items.users)), items)


class Spent(NamedTuple):
    """Wall-clock and processor seconds. On a busy machine, only the latter describe the store."""

    wall: float
    processor: float


def spent_on(work: Callable[..., object], *args: object, **kwargs: object) -> Spent:
    """Measure the duration of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work(*args, **kwargs)
    return Spent(time.perf_counter() - wall, time.process_time() - processor)


def milliseconds(times: Sequence[Spent]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum of durations."""
    walls, processors = zip(*times, strict=True)
    return {
        "p50_ms": round(1e3 * float(np.percentile(walls, 50)), 2),
        "p99_ms": round(1e3 * float(np.percentile(walls, 99)), 2),
        "longest_ms": round(1e3 * max(walls), 2),
        "processor_p50_ms": round(1e3 * float(np.percentile(processors, 50)), 2),
        "processor_p99_ms": round(1e3 * float(np.percentile(processors, 99)), 2),
    }


def read_times(store: HistoryStore) -> dict[str, float]:
    """Measure loading histories of 512 items of random users."""
    numbers = np.random.default_rng(0).integers(0, LONG_USERS, READS)
    for number in range(LONG_USERS):  # warm up statements and the page cache
        store.load_history(TENANT, f"long {number}")
    return milliseconds([spent_on(store.load_history, TENANT, f"long {number}", latest=LONG) for number in numbers])


def grow(store: HistoryStore, users: int) -> list[dict[str, Any]]:
    """Add users in bulk; report the pace and the time of reading at every power of ten."""
    reports: list[dict[str, Any]] = []
    count, spent = 0, list[Spent]()
    add(store, batch([f"long {i}" for i in range(LONG_USERS)], LONG, seed=0))
    while count < users:
        until = min(count + BATCH, users, next(10**power for power in range(3, 10) if 10**power > count))
        items = batch([f"user {i}" for i in range(count, until)], ITEMS, seed=count)
        spent.append(spent_on(add, store, items))
        count = until
        if count == users or count in (1_000, 10_000, 100_000, 1_000_000):
            walls, processors = zip(*spent, strict=True)
            pace = {
                "items_per_second": round(count * ITEMS / sum(walls)),
                "items_per_processor_second": round(count * ITEMS / sum(processors)),
            }
            reports.append({"users": count} | pace | {"reading": read_times(store)})
            print(reports[-1], flush=True)
    return reports


def measure(where: str, users: int) -> dict[str, Any]:
    """Measure everything and print it as it comes."""
    store = HistoryStore.open(where, HashEncoder(WIDTH), secret=SECRET)
    growth = grow(store, users)
    batches = [batch([f"user {i}"], 1, seed=users + i) for i in range(200)]
    additions = [spent_on(add, store, items) for items in batches]
    erasures = [spent_on(store.erase_user, TENANT, f"user {i}") for i in range(20)]
    rest = {"adding_one_item": milliseconds(additions), "erasing_a_user": milliseconds(erasures)}
    print(rest)
    return {"growth": growth} | rest


def main() -> None:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--where", help="location of a new store; default: SQLite in a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments.where or f"{folder}/store.db", arguments.users)
    if arguments.json:
        write_json(arguments.json, results | {"versions": package_versions(), "machine": machine_info()})


if __name__ == "__main__":
    main()
