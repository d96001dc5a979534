"""What a live user's persona costs beyond encoding the query, while the store grows.

    python benchmarks/personas.py [--users 1000000] [--where FILE|URL] [--json FILE]

A hundred users with 512 items each are asked for again and again, at random, while others (three generated items each)
are added between them. Rows: nothing kept in memory, so that each persona is read from the store and made; and kept
from before, so that the store is asked for the version alone. The plug is the default one, and one that weighs all
items alike, whose tokens are kept; both are untrained, which costs the same.
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
DEFAULT = replace(PlugConfig(), answer_channel="style", options="ignore", instruction_start="random")
PLUGS = {"default": DEFAULT, "all items alike": replace(DEFAULT, state_tokens=4)}


def plug_of(config: PlugConfig, *, encoder: Encoder | None = None, labels: tuple[str, ...] = ()) -> PersonaPlug:
    """An untrained plug for a model of SmolLM2-135M's width."""
    encoder = encoder or HashEncoder(WIDTH)
    spec = PlugSpec(LLMIdentity("none", None, "0" * 16, OUT), 0.1, encoder.identity, labels)
    return PersonaPlug(config, spec=spec, encoder=encoder).eval().compute_items_in("bfloat16")


def ask(live: PersonaCache, user: str) -> None:
    live.persona(live.store.admit(TENANT, user), query=QUERY)


def times(live: PersonaCache) -> dict[str, float]:
    """How long a persona takes, each of another user than the one before."""
    names = [f"long {name}" for name in np.random.default_rng(0).integers(0, LONG_USERS, REQUESTS)]
    for name in set(names):  # what is kept is kept from here on; the query is encoded
        ask(live, name)
    return milliseconds([spent_on(ask, live, name) for name in names])


def measured(store: HistoryStore) -> dict[str, Any]:
    """Both rows for both plugs."""
    return {
        name: {
            row: times(PersonaCache(Personalizer(plug_of(config)), store, cache_bytes=size))
            for row, size in (("made", 0), ("kept", 256 * 2**20))
        }
        for name, config in PLUGS.items()
    }


def measure(where: str, users: int) -> list[dict[str, Any]]:
    """Add users and measure at every power of ten, printed as it comes."""
    plug = plug_of(DEFAULT)
    store = HistoryStore.open(where, HashEncoder(WIDTH), settings=store_settings(plug), secret=SECRET)
    add(store, batch([f"long {i}" for i in range(LONG_USERS)], LONG, seed=0))
    found, made = list[dict[str, Any]](), 0
    while made < users:
        until = min(made + USERS_AT_ONCE, users, next(10**power for power in range(3, 10) if 10**power > made))
        add(store, batch([f"user {i}" for i in range(made, until)], ITEMS, seed=made))
        made = until
        if made == users or made in (1_000, 10_000, 100_000, 1_000_000):
            found.append({"users": made, **measured(store)})
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--where", help="an empty place for a store; without it, SQLite in a temporary folder")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as a server in front of vLLM does
    gc.freeze()  # as every server does
    with tempfile.TemporaryDirectory() as folder:
        found = {"growth": measure(given.where or f"{folder}/store.db", given.users)}
    if given.json:
        write_json(given.json, found | {"versions": package_versions(), "machine": machine_info()})


if __name__ == "__main__":
    main()
