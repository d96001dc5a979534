"""Attacks on the store behind a server: erasures, retention, and a database that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attacks import Verdict, case
from attacks.lab import Lab
from attacks.resources import at_once, timed

_TESTS = Path(__file__).parents[2] / "tests"


@case("adds on their way when their user is erased")
def adds_before_erasure(lab: Lab, verdict: Verdict) -> None:
    with lab.serve("--keep-text") as server, ThreadPoolExecutor(8) as pool:
        for user in ("known", "unknown"):
            if user == "known":
                server.add(lab.items(3, prefix="old"), user=user).raise_for_status()
            adds = [
                pool.submit(timed, lambda n=n, u=user: server.add(lab.items(300, words=80, prefix=f"{n}-"), user=u))  # type: ignore[misc]
                for n in range(2)
            ]
            time.sleep(0.5)
            receipt = server.call("DELETE", f"/v1/users/{user}")
            statuses = [add.result()[0] for add in adds]
            if receipt.status_code == 200:
                verdict.expect(server.count(user) == 0, f"{server.count(user)} items of {user} after the receipt")
                verdict.expect(all(status == 409 for status in statuses), f"the adds of {user}: {statuses}")
            else:
                verdict.expect(receipt.status_code == 404, f"the erasure of {user}: {receipt.status_code}")
            server.add(lab.items(2, prefix="new"), user=user).raise_for_status()


@case("questions asked before an erasure at another server")
def feedback_after_erasure(lab: Lab, verdict: Verdict) -> None:
    question = lab.question()["input"]
    store = lab.scratch("shared") / "histories.db"
    with lab.serve("--keep-text", store=store) as server:
        for user in ("ann", "nobody-yet"):
            if user == "ann":
                server.add(lab.items(3)).raise_for_status()
            asked = server.chat(question, user=user)
            request = asked.headers["x-request-id"]
            lab.command("erase-user", "--store", store, "--tenant", "a", "--user", user, expect_success=False)
            body = {"request_id": request, "answer": "4"}
            status = server.call("POST", f"/v1/users/{user}/history", json=body).status_code
            verdict.expect(status in (404, 409) and server.count(user) == 0, f"feedback of {user}: {status}")


@case("items older than the retention")
def retention(lab: Lab, verdict: Verdict) -> None:
    store = lab.scratch("old") / "histories.db"
    old = (datetime.now(UTC) - timedelta(days=30)).strftime("%Y-%m-%d")
    with lab.serve("--keep-text", store=store) as server:
        server.add([{**item, "date": old} for item in lab.items(3)]).raise_for_status()
    with lab.serve("--keep-text", "--max-days", 7, store=store) as server:
        verdict.expect(server.count() == 0, "old items are listed")
        answer = server.chat(lab.question()["input"])
        verdict.expect(answer.headers.get("x-personaplug-items") == "0", "old items make the persona")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and _stored_items(store):
            time.sleep(0.5)
        verdict.expect(_stored_items(store) == 0, f"{_stored_items(store)} old items stay in the file")


def _stored_items(store: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sum(
            connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in tables
            if name.startswith("items")
        )


@case("a PostgreSQL that hangs")
def hanging_database(lab: Lab, verdict: Verdict) -> None:
    sys.path.insert(0, str(_TESTS))
    from postgres_server import NoServer, postgres_server

    question = lab.question()["input"]
    secret = lab.scratch("secret") / "secret"
    try:
        database = postgres_server()
        postgres = database.__enter__()
    except NoServer as error:
        verdict.note(f"not tried: {error}"[:80])
        return
    with contextlib.ExitStack() as stack:
        stack.push(database)
        server = stack.enter_context(lab.serve("--secret", secret, store=postgres.url()))
        server.add(lab.items(3)).raise_for_status()
        pids = _processes_of(postgres.folder)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            status, seconds = timed(lambda: server.chat(question))
            verdict.expect(status == 503 and seconds < 60, f"with a user: {status} after {seconds:.0f} s")
            waits = at_once([lambda: server.chat(question, timeout=150)] * 40)
            verdict.expect(set(waits) <= {503, 429}, f"40 with a user: {sorted(set(waits))}")
            status, seconds = timed(lambda: server.chat("hello", user=None))
            verdict.expect(status == 200 and seconds < 10, f"without a user: {status} after {seconds:.0f} s")
            status, seconds = timed(lambda: server.call("GET", "/ready"))
            verdict.expect(status == 503 and seconds < 30, f"/ready: {status} after {seconds:.0f} s")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.chat(question).status_code != 200:
            time.sleep(0.5)
        verdict.expect(server.chat(question).status_code == 200, "no answers after the database is back")
        verdict.expect(server.count() == 3, "items are lost")


def _processes_of(folder: Path) -> list[int]:
    """Return the database's processes, the main one first."""
    import psutil

    main = int((folder / "postmaster.pid").read_text().split()[0])
    return [main, *(child.pid for child in psutil.Process(main).children(recursive=True))]
