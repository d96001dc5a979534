"""Load several servers behind one PostgreSQL, kill one, and change the plug of another. Nothing may be wrong or lost.

    python benchmarks/fleet.py [--rate 200] [--seconds 60] [--store postgresql://…] [--json FILE]

Three `personaplug serve` processes with a toy language model share a store. Clients of two tenants read histories, ask
for answers, add items and erase users. After a third of the time one process is killed (SIGKILL) and started again.
After another third a second one is taken out of rotation, stopped (SIGTERM), and started with a second plug, `v2`,
beside the first (`--run-for`). Half of the questions of the last third ask for `v2`. The load goes on during the
starts, which take additional time.

Each reply is checked when it arrives. Afterwards each answer's probabilities are compared with a reference, and the
store with what the servers acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from fleet_check.clients import Clients
from fleet_check.final_check import References, check_answers, check_store, count_interchangeable
from fleet_check.servers import Fleet, FleetServer
from free_ports import free_port

from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.run import Run

SERVERS = 3
SAMPLE = 200  # answers that are compared with the reference of another user
TENANTS = ("shop", "bank")
_TOY = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false")
_TESTS = Path(__file__).resolve().parents[1] / "tests"
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Settings:
    """How much to ask of the servers.

    Attributes:
        rate: requests a second of all clients.
        workers: largest number of concurrent requests.
    """

    rate: float = 200
    seconds: float = 60
    users: int = 100
    workers: int = 24


def command(*words: object) -> str:
    """Run a command of personaplug and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "personaplug", *map(str, words)], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def train(folder: Path) -> dict[str, Run]:
    """Train two plugs on the same data."""
    command("simulate", "--out", folder / "data", "--users", "16")
    for name, seed in (("v1", 0), ("v2", 1)):
        command("train", "--data", folder / "data", "--out", folder / name, *_TOY, f"seeds={seed}")
    return {name: Run.open(folder / name) for name in ("v1", "v2")}


async def run_load(
    fleet: Fleet, keys: dict[str, str], settings: Settings, *, new_run: Path
) -> tuple[Clients, float, int]:
    """Send the load, with a kill and a rolling change; return the clients, the seconds and the stop's exit code."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=_TIMEOUT_S)
    key = next(iter(keys.values()))
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(server.start(session, key=key) for server in fleet.servers))
        clients = Clients(fleet, session, keys, users=settings.users, new_model="v2")

        async def events() -> int:
            killed, changed, third = fleet.servers[0], fleet.servers[1], settings.seconds / 3
            await asyncio.sleep(third)
            print("kills a server", file=sys.stderr, flush=True)
            killed.kill()
            await killed.start(session, key=key)
            await asyncio.sleep(third)
            print("changes the plug of a server", file=sys.stderr, flush=True)
            code = await changed.stop()
            changed.options = [*changed.options, "--run-for", f"v2={new_run}"]
            await changed.start(session, key=key)
            await asyncio.sleep(third)
            return code

        stop, start = asyncio.Event(), time.perf_counter()
        load = asyncio.create_task(clients.send_until(stop, rate=settings.rate, workers=settings.workers))
        try:
            code = await events()
        finally:
            stop.set()
            await load
        return clients, time.perf_counter() - start, code


@contextlib.contextmanager
def a_database(url: str) -> Iterator[str]:
    """Yield the URL of a database: the given one or, if it is empty, one of a server that runs for the block."""
    if url:
        yield url
        return
    sys.path.insert(0, str(_TESTS))
    from postgres_server import postgres_server

    with postgres_server() as server:
        yield server.url()


def check_fleet(folder: Path, *, store: str, settings: Settings) -> dict[str, Any]:
    """Run the whole check in a folder; return counts, times and faults."""
    print("trains two plugs", file=sys.stderr, flush=True)
    runs, keys_file, secret = train(folder), folder / "keys.json", folder / "secret"
    keys = {tenant: command("create-key", tenant, "--keys", keys_file) for tenant in TENANTS}
    options = ["--run", runs["v1"].folder, "--model", "v1", "--store", store, "--secret", secret, "--keys", keys_file]
    words = [*map(str, options), "--keep-text"]
    servers = [FleetServer(number, words, folder / f"log-{number}", free_port()) for number in range(SERVERS)]
    fleet = Fleet(servers)
    try:
        clients, seconds, code = asyncio.run(run_load(fleet, keys, settings, new_run=runs["v2"].folder))
    finally:
        fleet.kill_all()
    log, references = clients.log, References(runs)
    print(f"checks {len(log.answers)} answers", file=sys.stderr, flush=True)
    faults = [*log.faults, *check_answers(log.answers, references), *check_store(clients, url=store, secret=secret)]
    texts = [server.log.read_text(encoding="utf-8") for server in servers]
    faults += [f"server {n}: a traceback or a user in the log" for n, text in enumerate(texts) if _tells(text)]
    requests = {kind: len(times) for kind, times in sorted(log.seconds.items())}
    return {
        "requests": requests,
        "seconds": round(seconds, 1),
        "requests_per_second": round(sum(requests.values()) / seconds, 1),
        "milliseconds": {kind: _percentiles(times) for kind, times in sorted(log.seconds.items())},
        "answers_checked": len(log.answers),
        "answers_of_the_new_plug": sum(given.model == "v2" for given in log.answers),
        "answers_that_fit_another_user_too": count_interchangeable(log.answers[:SAMPLE], references),
        "receipts_checked": len(log.receipts),
        "broken_connections": dict(sorted(log.lost.items())),
        "changes_on_broken_connections": dict(sorted(log.unsure.items())),
        "exit_code_of_the_stopped_server": code,
        "faults": faults,
    }


def _tells(log: str) -> bool:
    return "Traceback" in log or "user-" in log


def _percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{share}": round(1e3 * float(np.percentile(times, share)), 1) for share in (50, 99)}


def main() -> None:
    """Check, print, and exit with 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="", help="an empty database; by default, a server of the tests is started")
    parser.add_argument("--json", type=Path)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in vars(Settings())})
    with tempfile.TemporaryDirectory() as folder, a_database(arguments.store) as store:
        results = check_fleet(Path(folder), store=store, settings=settings)
    print(json.dumps(results, indent=1))
    if arguments.json:
        facts = {"settings": vars(settings), "versions": package_versions(), "machine": machine_info()}
        write_json(arguments.json, results | facts)
    raise SystemExit(1 if results["faults"] else 0)


if __name__ == "__main__":
    main()
