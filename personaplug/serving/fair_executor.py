"""FairExecutor: a thread pool that tenants share fairly, and within a tenant its users."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_MAX_TAGS = 1000  # users of a tenant with a stored tag; fewer users have waiting jobs


@dataclass(eq=False)
class _Job:
    tenant: str
    user: str
    cost: float
    tag: float  # virtual finish time on the tenant's clock; the smallest tag goes first
    work: Callable[[], Any]
    result: asyncio.Future[Any]


@dataclass(eq=False)
class _Tenant:
    """Usage of a tenant with waiting or running jobs, in units of cost."""

    used: float
    clock: float = 0.0  # virtual time: usage of a user who has had jobs since the tenant's first job
    last_tags: dict[str, float] = field(default_factory=dict)  # by user
    running: list[str] = field(default_factory=list)  # the users of running jobs
    waiting: list[_Job] = field(default_factory=list)

    def note_tag(self, user: str, tag: float) -> None:
        if len(self.last_tags) > _MAX_TAGS:  # tags before the clock have no effect
            self.last_tags = {name: last for name, last in self.last_tags.items() if last > self.clock}
        self.last_tags[user] = tag


class FairExecutor:
    """Runs functions in threads: the tenant with the least usage goes next, with its job that has the smallest tag.

    One tenant leaves a thread to others, and one user two, so that a small job never waits for many large ones. An
    executor belongs to one event loop. It does not run a job that is cancelled while it waits.
    """

    def __init__(self, threads: int, *, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._max_per_tenant, self._max_per_user = max(1, threads - 1), max(1, threads - 2)
        self._idle_threads = threads
        self._clock = 0.0  # usage of the tenant whose job started last
        self._tenants: dict[str, _Tenant] = {}

    async def run(self, tenant: str, user: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of cost 1."""
        return await self.run_weighted(tenant, user, partial(work, *args, **kwargs), cost=1)

    async def run_weighted(self, tenant: str, user: str, work: Callable[[], T], *, cost: float) -> T:
        """Run a function; `cost` is its expected duration relative to other functions."""
        share = self._tenants.setdefault(tenant, _Tenant(self._clock))
        tag = max(share.clock, share.last_tags.get(user, 0.0)) + cost
        share.note_tag(user, tag)
        work = partial(contextvars.copy_context().run, work)  # so that its spans belong to the request
        job = _Job(tenant, user, cost, tag, work, asyncio.get_running_loop().create_future())
        share.waiting.append(job)
        self._start_jobs()
        try:
            result: T = await job.result
        finally:
            if job in share.waiting:  # cancelled
                share.waiting.remove(job)
                self._drop_if_idle(tenant)
        return result

    def shutdown(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start_jobs(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle_threads and (job := self._next_job()):
            share = self._tenants[job.tenant]
            share.waiting.remove(job)
            share.running.append(job.user)
            self._clock = share.used
            share.used += job.cost
            share.clock += job.cost / len({*share.running, *(other.user for other in share.waiting)})
            self._idle_threads -= 1
            loop.run_in_executor(self._pool, job.work).add_done_callback(partial(self._finish, job))

    def _next_job(self) -> _Job | None:
        shares = [share for share in self._tenants.values() if len(share.running) < self._max_per_tenant]
        for share in sorted(shares, key=lambda share: share.used):
            jobs = [job for job in share.waiting if share.running.count(job.user) < self._max_per_user]
            if jobs:
                return min(jobs, key=lambda job: job.tag)
        return None

    def _finish(self, job: _Job, outcome: asyncio.Future[Any]) -> None:
        self._idle_threads += 1
        self._tenants[job.tenant].running.remove(job.user)
        self._drop_if_idle(job.tenant)
        if outcome.cancelled():  # by a shutdown
            job.result.cancel()
        elif not job.result.done():
            error = outcome.exception()
            job.result.set_exception(error) if error else job.result.set_result(outcome.result())
        else:
            outcome.exception()  # marks the error as retrieved, so that asyncio does not log it
        self._start_jobs()

    def _drop_if_idle(self, tenant: str) -> None:
        share = self._tenants[tenant]
        if not share.waiting and not share.running:
            del self._tenants[tenant]
