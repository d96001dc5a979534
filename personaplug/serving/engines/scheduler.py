"""ModelScheduler: batches requests to one model continuously.

All work on the model runs in one thread, token by token. Between two tokens, the event loop admits new rows, drops
cancelled rows and passes new tokens to the readers. Other work on the model also runs between two tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from personaplug.errors import EngineFailure
from personaplug.llm.continuous_batching import Slot
from personaplug.serving.engines.job import Job

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NOT_RUNNING = "The model is not running."
_PREFILL_TOKENS = 2048  # prompt tokens to prefill between two decoding steps


class SlotBatch(Protocol):
    """Slots that decode together. Only the model's thread calls its methods."""

    def add(self, slots: Sequence[Slot]) -> None:
        """Run the prompts of slots and choose their first tokens; an error leaves the batch unchanged."""

    def step(self) -> None:
        """Choose the next token of each active slot."""


class ModelScheduler:
    """Runs rows of a model concurrently. It belongs to the event loop that starts it.

    Args:
        new_batch: returns an empty batch; called when no row runs, and after an error.
        max_rows: maximum number of concurrent rows.
        max_held: maximum tokens of all running rows, with padding. A single row may exceed it.
    """

    def __init__(self, new_batch: Callable[[], SlotBatch], *, max_rows: int, max_held: int) -> None:
        self.max_rows, self.max_held = max_rows, max_held
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._tenants: set[str] = set()  # that have submitted a job
        self._new_batch, self._batch = new_batch, new_batch()
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="personaplug-model")
        self._turn = threading.Lock()  # of the threads that wait for the model
        self._wake_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done() and not self._is_closed

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run_rows())

    async def close(self) -> None:
        """Finish the submitted rows, then stop."""
        self._is_closed = True
        self._wake_up.set()
        if self._task is not None:
            await self._task
        self._model_thread.shutdown(wait=False)

    def submit(self, jobs: Sequence[Job]) -> None:
        self._check_alive()
        self._tenants.update(job.tenant for job in jobs)
        self._waiting += jobs
        self._wake_up.set()

    async def run(self, work: Callable[[], T]) -> T:
        """Call a function that uses the model between two tokens, and return its result."""
        self._check_alive()
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, work)

    def run_and_wait(self, work: Callable[[], T]) -> T:
        """Call a function like `run` and wait for its result; only for threads without an event loop.

        These threads take turns, so running rows wait for one function at a time.
        """
        with self._turn:
            self._check_alive()
            try:
                future = self._model_thread.submit(work)
            except RuntimeError:  # closed meanwhile
                raise EngineFailure(_NOT_RUNNING) from None
            return future.result()

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineFailure(_NOT_RUNNING)

    async def _run_rows(self) -> None:
        loop = asyncio.get_running_loop()
        while self._running or self._waiting or not self._is_closed:
            self._wake_up.clear()
            self._waiting = [job for job in self._waiting if not job.is_cancelled]
            for job in self._running:
                if job.is_cancelled:
                    job.row.ended = "stop"
            admitted = self._next_jobs()
            self._waiting = [job for job in self._waiting if job not in admitted]
            self._running += admitted
            if not self._running:
                self._batch = self._new_batch()  # frees the cache of the last rows
                await self._wake_up.wait()
                continue
            await loop.run_in_executor(self._model_thread, self._advance, admitted)
            for job in self._running:
                job.publish()
            self._running = [job for job in self._running if job.row.ended is None]

    def _next_jobs(self) -> list[Job]:
        """Choose the waiting rows that can start now. Limit their prompts, so that running rows are not delayed.

        The tenant with the fewest rows goes next, with its oldest request. If there are several tenants, each leaves
        a row to the others.
        """
        rows_by_tenant = Counter(job.tenant for job in self._running)
        max_rows_per_tenant = max(1, self.max_rows - (len(self._tenants) > 1))
        waiting, next_jobs, prompt_tokens = list(self._waiting), list[Job](), 0
        prompts = set[int]()  # answers to one request share the object and the pass over it
        longest = max((job.max_size for job in self._running), default=0)
        while allowed := [job for job in waiting if rows_by_tenant[job.tenant] < max_rows_per_tenant]:
            job = min(allowed, key=lambda job: rows_by_tenant[job.tenant])
            rows, longest = len(self._running) + len(next_jobs) + 1, max(longest, job.max_size)
            prompt_tokens += len(job.row.prompt.ids) if id(job.row.prompt) not in prompts else 0
            fits = rows <= self.max_rows and (longest * rows <= self.max_held or rows == 1)
            if not fits or (prompt_tokens > _PREFILL_TOKENS and next_jobs):
                break
            waiting.remove(job)
            next_jobs.append(job)
            prompts.add(id(job.row.prompt))
            rows_by_tenant[job.tenant] += 1
        return next_jobs

    def _advance(self, admitted: Sequence[Job]) -> None:
        """Prefill the new rows, then decode the next token of every row. Runs in the model's thread."""
        try:
            if admitted:
                self._batch.add([job.row for job in admitted])
        except Exception as error:  # from the model or the hardware
            _fail(admitted, error)
        try:
            self._batch.step()
        except Exception as error:  # report it to the callers, and serve later requests
            _fail(self._running, error)
            self._batch = self._new_batch()


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    # Log only the type, because the message may quote the request.
    logger.error("the model failed on %d requests: %s", len(jobs), type(error).__name__)
    for job in jobs:
        job.row.ended = "failed"
