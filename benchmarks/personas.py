"""Measure the cost of a live user's persona, without encoding the query, while the store grows.

    python benchmarks/personas.py [--users 1000000] [--where FILE|URL] [--json FILE]

Requests personas of a hundred users with 512 items each, in random order, while other users with three generated items
each are added. The row `made` has no cache: each persona is computed from the store. The row `kept` has a warm cache:
only the history's version is read from the store. One plug is the default. The other weighs all items equally, so its
soft tokens are cached. Both are untrained, which does not change the cost.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from store import LONG, LONG_USERS, SECRET, TENANT, add, batch, milliseconds, spent_on

from personaplug.config import PlugConfig
from personaplug.encoders import Encoder, HashEncoder
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.infra.model_hub import LLMIdentity
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.store.history_store import HistoryStore

WIDTH, OUT = 384, 576
ITEMS = 3
USERS_AT_ONCE = 10_000
REQUESTS = 2_000
QUERY = "what is asked"
DEFAULT = replace(
    PlugConfig(), answer_channel="style", label_prior="none", options="ignore", instruction_start="random"
)
PLUGS = {"default": DEFAULT, "all items alike": replace(DEFAULT, state_tokens=4)}


def plug_of(config: PlugConfig, *, encoder: Encoder | None = None, labels: tuple[str, ...] = ()) -> PersonaPlug:
    """Return an untrained plug for a model of SmolLM2-135M's width."""
    encoder = encoder or HashEncoder(WIDTH)
    spec = PlugSpec(LLMIdentity("none", None, "0" * 16, OUT), 0.1, encoder.identity, labels)
    return PersonaPlug(config, spec=spec, encoder=encoder).eval().compute_items_in("bfloat16")


def ask(cache: PersonaCache, user: str) -> None:
    cache.persona(cache.store.admit(TENANT, user), query=QUERY)


def times(cache: PersonaCache) -> dict[str, float]:
    """Measure personas of random users."""
    names = [f"long {name}" for name in np.random.default_rng(0).integers(0, LONG_USERS, REQUESTS)]
    for name in set(names):  # fill the caches, including the encoded query
        ask(cache, name)
    return milliseconds([spent_on(ask, cache, name) for name in names])


def measured(store: HistoryStore) -> dict[str, Any]:
    """Measure both rows for both plugs."""
    return {
        name: {
            row: times(PersonaCache(Personalizer(plug_of(config)), store, cache_bytes=size))
            for row, size in (("made", 0), ("kept", 256 * 2**20))
        }
        for name, config in PLUGS.items()
    }


def measure(where: str, users: int) -> list[dict[str, Any]]:
    """Add users, and measure and print at every power of ten."""
    plug = plug_of(DEFAULT)
    store = HistoryStore.open(where, HashEncoder(WIDTH), settings=store_settings(plug), secret=SECRET)
    add(store, batch([f"long {i}" for i in range(LONG_USERS)], LONG, seed=0))
    reports, count = list[dict[str, Any]](), 0
    while count < users:
        until = min(count + USERS_AT_ONCE, users, next(10**power for power in range(3, 10) if 10**power > count))
        add(store, batch([f"user {i}" for i in range(count, until)], ITEMS, seed=count))
        count = until
        if count == users or count in (1_000, 10_000, 100_000, 1_000_000):
            reports.append({"users": count, **measured(store)})
            print(reports[-1], flush=True)
    return reports


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--where", help="location of a new store; default: SQLite in a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # like a server in front of vLLM
    gc.freeze()  # like every server
    with tempfile.TemporaryDirectory() as folder:
        results = {"growth": measure(arguments.where or f"{folder}/store.db", arguments.users)}
    if arguments.json:
        write_json(arguments.json, results | {"versions": package_versions(), "machine": machine_info()})


if __name__ == "__main__":
    main()
