"""FairExecutor shares threads between tenants and users."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from personaplug.serving.fair_executor import FairExecutor


class Record:
    """Records the order in which jobs start. Each job waits for a permit to end."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.permits = threading.Semaphore(0)

    def job(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.started.append(name)
            assert self.permits.acquire(timeout=20)
            return name

        return work


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def _order(jobs: Sequence[tuple[str, str, float]], *, threads: int = 1) -> list[str]:
    """Return the order in which jobs start that are submitted at the same time."""

    async def run() -> list[str]:
        executor, record = FairExecutor(threads, name="test"), Record()
        waiting = [
            asyncio.create_task(executor.run_weighted(tenant, user, record.job(f"{tenant}/{user}"), cost=cost))
            for tenant, user, cost in jobs
        ]
        while len(record.started) < len(jobs):
            count = len(record.started)
            if count:
                record.permits.release()
            await _until(partial(lambda count: len(record.started) > count, count))
        record.permits.release()
        await asyncio.gather(*waiting)
        executor.shutdown()
        return record.started

    return asyncio.run(run())


def test_tenants_take_turns() -> None:
    order = _order([("shop", "a", 1)] * 6 + [("bank", "b", 1)] * 3)
    assert order[:6] == ["shop/a", "bank/b", "shop/a", "bank/b", "shop/a", "bank/b"]


def test_tenant_with_high_usage_waits_for_one_with_low_usage() -> None:
    order = _order([("shop", "a", 10)] * 2 + [("bank", "b", 1)] * 5)
    assert order == ["shop/a", *["bank/b"] * 5, "shop/a"]


def test_small_job_of_another_user_runs_before_large_jobs() -> None:
    order = _order([("shop", f"{number}", 1000) for number in range(12)] + [("shop", "small", 1)])
    assert order[1] == "shop/small"


def test_large_job_does_not_starve() -> None:
    order = _order([("shop", "first", 1), ("shop", "large", 5)] + [("shop", f"{number}", 1) for number in range(20)])
    assert "shop/large" in order

    async def run() -> None:
        executor, started = FairExecutor(1, name="test"), list[str]()
        large = asyncio.create_task(executor.run_weighted("shop", "large", lambda: started.append("large"), cost=5))
        while not large.done():
            await executor.run_weighted("shop", f"{len(started)}", lambda: started.append("small"), cost=1)
            assert len(started) < 20
        executor.shutdown()

    asyncio.run(run())


def test_one_tenant_or_user_cannot_occupy_all_threads() -> None:
    async def run() -> None:
        executor, record = FairExecutor(3, name="test"), Record()
        jobs = [("shop", "a")] * 4 + [("shop", "b")] * 2
        waiting = [asyncio.create_task(executor.run(*owner, record.job("/".join(owner)))) for owner in jobs]
        await _until(lambda: len(record.started) == 2)
        await asyncio.sleep(0.02)
        assert sorted(record.started) == ["shop/a", "shop/b"]
        waiting.append(asyncio.create_task(executor.run("bank", "c", record.job("bank/c"))))
        await _until(lambda: record.started[2:] == ["bank/c"])
        record.permits.release(20)
        await asyncio.gather(*waiting)
        executor.shutdown()

    asyncio.run(run())


def test_cancelled_job_does_not_run_and_errors_reach_the_caller() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def run() -> None:
        executor, record = FairExecutor(1, name="test"), Record()
        first, second = (asyncio.create_task(executor.run("shop", "a", record.job(name))) for name in ("1", "2"))
        await _until(lambda: record.started == ["1"])
        second.cancel()
        await asyncio.sleep(0)
        record.permits.release()
        assert await first == "1"
        with pytest.raises(ValueError, match="no"):
            await executor.run("shop", "a", fail)
        assert record.started == ["1"]
        assert executor._tenants == {}  # tenants without jobs are dropped
        executor.shutdown()

    asyncio.run(run())
