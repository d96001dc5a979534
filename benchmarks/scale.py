"""Measure a store of histories and its personas while the store grows from a thousand to a million users.

    python benchmarks/scale.py --where FOLDER|URL [--json FILE]

The first 100,000 users have 32 generated items each, later users have two. Only users with 32 items are read. All
users have the same vectors, which changes neither the sizes nor the times. At the end, the smallest size is measured
again in a new store: the difference is the drift of the machine.

A FOLDER gets two stores in SQLite. A postgresql:// URL needs the right to create databases. FILE keeps the results of
the other engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from personas import DEFAULT, ask, plug_of
from store import SECRET, TENANT, WIDTH, Spent, add, batch, milliseconds, spent_on

from personaplug.data.records import HistoryItem
from personaplug.encoders import HashEncoder
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.plug.personalizer import Personalizer
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.store.backup import back_up, verify
from personaplug.store.database import Connection, execute, sa
from personaplug.store.history_store import EncodedItems, HistoryStore, Retention
from personaplug.store.schema import Shard
from personaplug.store.tickets import chunks
from personaplug.store.user_list import list_users
from personaplug.store.writes import PackedItem, insert_items, lock_users, update_users

SIZES = (1_000, 10_000, 100_000, 1_000_000)
ITEMS, FEW_ITEMS = 32, 2
ITEMS_AT_ONCE = 30_000
COLD_READS, ADDITIONS, ERASURES = 200, 200, 10
THREADS = (1, 8)
CHECKED_USERS = {"sqlite": 10_000, "postgresql": 1_000}
"""Users of the largest store that is checked and backed up. Both read all rows, so their time is proportional."""


def fill(store: HistoryStore, users: range, items: Sequence[PackedItem]) -> None:
    """Write users with the store's functions, but with items that are packed once: about twice as fast as `add`."""
    users_by_shard: dict[Shard, list[str]] = defaultdict(list)
    for name in map(name_of, users):
        users_by_shard[store.shard_of(TENANT, name)].append(name)
    for shard, names in users_by_shard.items():
        for part in chunks(names, ITEMS_AT_ONCE // len(items)):
            with store.database.write_transaction() as connection:
                rows = list(lock_users(connection, shard, tenant=TENANT, names=set(part)).values())
                for row in rows:
                    row.increase_version()
                entries = [(row.next_key(), row.version, item) for row in rows for item in items]
                insert_items(connection, shard, entries)
                update_users(connection, shard, rows)
    if users:
        check_same(store, name_of(users[-1]), len(items))


def name_of(user: int) -> str:
    return f"user {user}"


def check_same(store: HistoryStore, user: str, each: int) -> None:
    """Check that a filled user equals one whom `add` has written, in what is read and in what a repeated `add` sees."""
    items, other = generated(user, each), f"added like {user}"
    add(store, replace(items, users=[other] * each))
    ours, theirs = (store.load_history(TENANT, name) for name in (user, other))
    for column in ("vectors", "label_ids", "style", "kind_ids"):
        np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
    listed = ([(i.id, i.date, i.label_id, i.kind) for i in store.list_items(TENANT, name)] for name in (user, other))
    assert next(listed) == next(listed)
    assert store.add_encoded(store.admit(TENANT, user), items) == (0, 0, each)


def generated(user: str, each: int) -> EncodedItems:
    """Return the first of the ITEMS items that every user has."""
    whole = batch([user], ITEMS, seed=0)
    names = ("users", "items", "vectors", "label_ids", "style")
    return replace(whole, **{name: getattr(whole, name)[:each] for name in names})


def bytes_of(store: HistoryStore) -> dict[str, float]:
    """Return the bytes of the database's files, and the indexes' share of a shard."""
    shard = Shard(0)
    tables = [shard.users, *shard.tables_of_items]
    with store.database.read_transaction() as connection:
        if store.database.file is None:
            files = execute(connection, "SELECT pg_database_size(current_database())").scalar_one()
            sql = (
                "SELECT sum(pg_indexes_size(t)) / sum(pg_total_relation_size(t)) FROM unnest(CAST(:tables AS text[])) t"
            )
            share = execute(connection, sql, {"tables": tables}).scalar_one()
        else:
            files, share = store.database.file.stat().st_size, _index_share_in_sqlite(connection, tables)
    return {"files": int(files), "share_of_indexes": round(float(share), 4)}


def _index_share_in_sqlite(connection: Connection, tables: Sequence[str]) -> float:
    sql = "SELECT name, type FROM sqlite_schema WHERE tbl_name IN :tables"
    rows = execute(connection, sql, {"tables": tables}, expand="tables").all()
    size = "SELECT sum(pgsize) FROM dbstat WHERE name = :name"
    sizes = [(row.type, execute(connection, size, {"name": row.name}).scalar_one()) for row in rows]
    indexes, whole = (sum(size for kind, size in sizes if kind in kinds) for kinds in (("index",), ("index", "table")))
    return float(indexes / whole)


def random_users(users: int, size: int, *, seed: int) -> list[str]:
    return [name_of(user) for user in np.random.default_rng(seed).integers(0, users, size)]


def in_threads(threads: int, work: Callable[[str], object], users: Sequence[str]) -> dict[str, float]:
    """Call `work` for each user in several threads; return the times of the calls and the calls per second."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(
            lambda part: [spent_on(work, user) for user in part], [users[i::threads] for i in range(threads)]
        )
        times = [spent for part in parts for spent in part]
    per_second = round(len(users) / (time.perf_counter() - started))
    # With several threads, the processor time of a call includes the work of the other threads.
    figures = milliseconds(times).items()
    return {name: value for name, value in figures if threads == 1 or "processor" not in name} | {
        "per_second": per_second
    }


def measure_reads(store: HistoryStore, users: int, calls: int) -> dict[str, Any]:
    """Measure histories and personas of random users."""
    new = PersonaCache(Personalizer(plug_of(DEFAULT)), store, cache_bytes=0)
    cached = PersonaCache(Personalizer(plug_of(DEFAULT)), store)
    in_cache, others = random_users(users, calls // 2, seed=1), random_users(users, calls, seed=2)
    for user in in_cache:
        ask(cached, user)
        ask(new, user)
    hits = [in_cache[index % len(in_cache)] for index in range(calls)]
    results: dict[str, Any] = {"cache_bytes_per_user": round(cached.cached_bytes / cached.cached_users)}
    for threads in THREADS:
        results[f"threads_{threads}"] = {
            "history": in_threads(threads, partial(store.load_history, TENANT), others),
            "cached_persona": in_threads(threads, partial(ask, cached), hits),
            "new_persona": in_threads(threads, partial(ask, new), others),
        }
    return results


def measure_cold_reads(file: Path, store: HistoryStore, users: int) -> dict[str, float]:
    """Measure histories in SQLite after the kernel has dropped the file from its page cache."""
    descriptor, times = os.open(file, os.O_RDONLY), list[Spent]()
    for user in random_users(users, COLD_READS, seed=3):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        times.append(spent_on(store.load_history, TENANT, user))
    os.close(descriptor)
    return milliseconds(times)


def measure_writes(store: HistoryStore, users: int, serial: Iterator[int]) -> dict[str, Any]:
    """Measure additions of one item, and erasures of users with ITEMS items."""
    additions = [
        replace(batch([user], 1, seed=number), items=[HistoryItem(f"new {number}", ())])
        for user, number in zip(random_users(users, ADDITIONS, seed=4), serial, strict=False)
    ]
    added = [spent_on(add, store, items) for items in additions]
    gone = [f"gone {number}" for _, number in zip(range(ERASURES), serial, strict=False)]
    for user in gone:
        add(store, batch([user], ITEMS, seed=0))
    erased = [spent_on(store.erase_user, TENANT, user) for user in gone]
    return {"adding_one_item": milliseconds(added), "erasing_a_user": milliseconds(erased)}


def measure_whole_store(store: HistoryStore, where: str, users: int) -> dict[str, float]:
    """Measure what an operator does, in seconds."""
    started = time.perf_counter()
    with closing(HistoryStore.open(where, secret=SECRET)) as opened:  # has not looked for expired items today
        seconds = {"open": time.perf_counter() - started}
        opened.retention = Retention(max_days=365)
        seconds["look_for_expired_items"] = spent_on(opened.remove_expired, seconds=600).wall
    seconds["list_100_users"] = spent_on(list_users, store, tenant=TENANT, limit=101).wall
    file = store.database.file
    is_checked = users <= CHECKED_USERS["sqlite" if file else "postgresql"]
    if is_checked:
        seconds["check_all_rows"] = spent_on(verify, store).wall
    if is_checked and file:
        target = file.with_name("backup")
        seconds["back_up"] = spent_on(back_up, store, target).wall
        target.unlink()
    return {name: round(value, 3) for name, value in seconds.items()}


def measure(where: str, sizes: Sequence[int], *, full_users: int, calls: int) -> Iterator[dict[str, Any]]:
    """Grow a new store, and measure it at each size."""
    settings, serial = store_settings(plug_of(DEFAULT)), count()
    with closing(HistoryStore.open(where, HashEncoder(WIDTH), settings=settings, secret=SECRET)) as store:
        items = store.pack(generated("any", ITEMS))
        for first, users in pairwise((0, *sizes)):
            full = min(users, full_users)
            fill(store, range(first, full), items)
            fill(store, range(max(first, full), users), items[:FEW_ITEMS])
            report: dict[str, Any] = {"users": users, "items": full * ITEMS + (users - full) * FEW_ITEMS}
            report["bytes"] = bytes_of(store)
            report |= measure_reads(store, full, calls)
            if file := store.database.file:
                report["cold_history"] = measure_cold_reads(file, store, full)
            report |= measure_writes(store, full, serial)
            report["seconds"] = measure_whole_store(store, where, users)
            print(json.dumps(report), flush=True)
            yield report


def new_stores(where: str) -> tuple[str, str, str]:
    """Return the engine, and the locations of two new stores."""
    names = ("scale", "scale_again")
    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
        first, second = (str(Path(where) / f"{name}.db") for name in names)
        return "sqlite", first, second
    engine = sa.create_engine(sa.make_url(where).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for name in names:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
    url = sa.make_url(where)
    first, second = (url.set(database=name).render_as_string(hide_password=False) for name in names)
    return "postgresql", first, second


def main() -> None:
    """Measure one engine, and print each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", required=True, help="a folder for SQLite, or a postgresql:// URL")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--full-users", type=int, default=100_000, help=f"users with {ITEMS} items")
    parser.add_argument("--calls", type=int, default=1_000, help="reads of each kind at each size")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # like a server in front of vLLM
    gc.freeze()  # like every server
    engine, first, second = new_stores(arguments.where)
    facts = {"versions": package_versions(), "machine": machine_info()}
    results: dict[str, Any] = {"growth": [], "again": [], **facts}
    others = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for kind, location, sizes in (("growth", first, arguments.sizes), ("again", second, arguments.sizes[:1])):
        for report in measure(location, sizes, full_users=arguments.full_users, calls=arguments.calls):
            results[kind].append(report)
            if arguments.json:
                write_json(arguments.json, others | {engine: results})


if __name__ == "__main__":
    main()
