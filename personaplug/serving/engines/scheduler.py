"""ModelScheduler: one thread owns the model and batches requests continuously.

Between any two tokens the thread admits new rows, drops cancelled ones and runs other work on the model. Only this
thread changes a row; callers on an event loop set `Job.is_cancelled`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import TypeVar

from personaplug.errors import EngineFailure
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Row

logger = logging.getLogger(__name__)
T = TypeVar("T")

_PREFILL_TOKENS = 2048  # prompt tokens that are read between two tokens of the running rows


class Job:
    """A row on its way through the thread; to be created on the event loop that waits for it."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.is_cancelled = False  # whether nobody waits for it any more
        self.finish_reason = "stop"  # valid once all tokens are read
        self._published = 0
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[list[int], str | None]] = asyncio.Queue()

    async def tokens(self) -> AsyncGenerator[int]:
        """Yield each new token; EngineFailure if the model fails on the row."""
        ended: str | None = None
        while ended is None:
            ids, ended = await self._updates.get()
            for token in ids:
                yield token
        if ended == "failed":
            raise EngineFailure("The model failed on this request.")
        self.finish_reason = ended

    def cancel(self) -> None:
        self.is_cancelled = True

    def publish(self) -> None:
        """Send new tokens to the event loop; called by the thread."""
        ids, ended = self.row.ids[self._published :], self.row.ended
        if not ids and not ended:
            return
        self._published += len(ids)
        try:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (ids, ended))
        except RuntimeError:
            logger.debug("the event loop of a request ended before its reply")


class ModelScheduler:
    """Runs rows of a model side by side.

    Args:
        max_rows: rows that run at once.
        max_held: tokens, padding included, that the running rows may come to hold; a single row may hold more.
    """

    def __init__(self, llm: CausalLM, *, max_rows: int, max_held: int) -> None:
        self.llm, self.max_rows, self.max_held = llm, max_rows, max_held
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._inbox_lock = threading.Lock()  # nothing is put behind the final None
        self._is_closed = False
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._batch = ContinuousBatch(llm)
        self._thread = threading.Thread(target=self._loop, name="personaplug-model", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    async def close(self) -> None:
        """Finish the rows that were submitted, then stop."""
        with self._inbox_lock:
            self._is_closed = True
            self._inbox.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def submit(self, work: Job | Callable[[], None]) -> None:
        """Queue a row, or a call that uses the model."""
        with self._inbox_lock:
            if not self.is_alive:
                raise EngineFailure("The model is no longer running.")
            self._inbox.put(work)

    async def run(self, work: Callable[[], T]) -> T:
        """Call a function on the thread, between two tokens, and return its result."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.submit(call)
        return await asyncio.wrap_future(future)

    def _loop(self) -> None:
        is_open = True
        while is_open or self._running or self._waiting:
            is_open = self._receive(is_open)
            self._drop_cancelled()
            self._admit()
            self._step()
            for job in self._running:
                job.publish()
            self._running = [job for job in self._running if job.row.ended is None]
            if not self._running:
                self._batch = ContinuousBatch(self.llm)  # frees the states of the last rows

    def _receive(self, is_open: bool) -> bool:
        """Take what was submitted; wait for it if there is nothing else to do. Return whether more may come."""
        while is_open and (not self._inbox.empty() or not (self._running or self._waiting)):
            work = self._inbox.get()
            if work is None:
                return False
            if isinstance(work, Job):
                self._waiting.append(work)
            else:
                work()
        return is_open

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.is_cancelled]
        for job in self._running:
            if job.is_cancelled:
                job.row.ended = "stop"

    def _admit(self) -> None:
        """Read the prompts of waiting rows, as many as fit and do not delay the running rows for long."""
        count = self._admissible()
        if not count:
            return
        jobs, self._waiting = self._waiting[:count], self._waiting[count:]
        self._running += jobs
        try:
            self._batch.admit([job.row for job in jobs])
        except Exception as error:  # of the model or the machine
            _fail(jobs, error)

    def _admissible(self) -> int:
        """Count the waiting rows that may start now, in their order."""
        prompt_tokens, longest = 0, max((_max_size(job.row) for job in self._running), default=0)
        for index, job in enumerate(self._waiting):
            rows = len(self._running) + index + 1
            longest = max(longest, _max_size(job.row))
            prompt_tokens += len(job.row.prompt.ids)
            fits = rows <= self.max_rows and (longest * rows <= self.max_held or rows == 1)
            if not fits or (prompt_tokens > _PREFILL_TOKENS and index > 0):
                return index
        return len(self._waiting)

    def _step(self) -> None:
        try:
            self._batch.step()
        except Exception as error:  # the callers must hear of it, and later requests be served
            _fail(self._running, error)
            self._batch = ContinuousBatch(self.llm)


def _max_size(row: Row) -> int:
    """Count the tokens that a row may come to hold."""
    soft = row.soft.vectors.shape[1] if row.soft else 0
    return len(row.prompt.ids) + soft + row.config.max_new_tokens


def _fail(jobs: list[Job], error: Exception) -> None:
    # The error's message may quote the request.
    logger.error("the model failed on %d requests: %s", len(jobs), type(error).__name__)
    for job in jobs:
        job.row.ended = "failed"
