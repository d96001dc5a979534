"""ModelScheduler: one thread owns a model. Between any two tokens it lets requests in and out, and does other work.

Only it writes how a row ends; those who wait on the event loop say that they gave up, and it takes note.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from personaplug.errors import EngineFailure
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Slot

logger = logging.getLogger(__name__)
T = TypeVar("T")

_READ_AT_ONCE = 2048  # tokens of prompts that are read between two tokens of those that are running


class Job:
    """A row on its way through the thread.

    Attributes:
        row: what is written; nobody but the thread changes it.
        gave_up: whether whoever waited for it has gone.
    """

    def __init__(self, row: Slot) -> None:
        self.row, self.gave_up, self._told = row, False, 0
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[list[int], str | None]] = asyncio.Queue()

    async def tokens(self) -> AsyncGenerator[tuple[int | None, str | None]]:
        """Each new token with None, and at the end None with the reason.

        Raises:
            EngineFailure: if the model failed on it.
        """
        ended: str | None = None
        while ended is None:
            ids, ended = await self._news.get()
            for token in ids:
                yield token, None
        if ended == "failed":
            raise EngineFailure("The model failed on this request.")
        yield None, ended

    def tell(self) -> None:
        """Pass on what is new; called by the thread."""
        ids, ended = self.row.ids[self._told :], self.row.ended
        if ids or ended:
            self._told += len(ids)
            _call(self._loop, lambda: self._news.put_nowait((ids, ended)))


class ModelScheduler:
    """Runs rows of a model side by side.

    Args:
        backend: the model.
        max_rows: at most so many.
        max_held: tokens that they hold states of together, padding included; a row by itself may have more.
    """

    def __init__(self, llm: CausalLM, *, max_rows: int, max_held: int) -> None:
        self.llm, self.max_rows, self.max_held = llm, max_rows, max_held
        self._coming: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()  # nothing is put behind the last thing
        self._closed = False
        self._waiting: list[Job] = []
        self._jobs: list[Job] = []
        self._running = ContinuousBatch(llm)
        self._thread = threading.Thread(target=self._work, name="personaplug-model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closed

    def start(self) -> None:
        """Start it; once, however often it is asked."""
        if self._thread.ident is None:
            self._thread.start()

    async def close(self) -> None:
        """Finish what was begun, then stop."""
        with self._closing:
            self._closed = True
            self._coming.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def put(self, job: Job) -> None:
        """Let a row in as soon as there is room.

        Raises:
            EngineFailure: if the thread is no longer there.
        """
        self._put(job)

    async def do(self, work: Callable[[], T]) -> T:
        """Do something with the model between two tokens.

        Raises:
            EngineFailure: if the thread is no longer there.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            try:
                result = work()
            except Exception as error:
                failed = error
                _call(loop, lambda: settle(None, failed))
            else:
                _call(loop, lambda: settle(result, None))

        self._put(job)
        return await done

    def _put(self, coming: Job | Callable[[], None]) -> None:
        with self._closing:
            if not self.alive:
                raise EngineFailure("The model is no longer running.")
            self._coming.put(coming)

    def _work(self) -> None:
        """Until told to stop, and then until all is answered."""
        open_ = True
        while open_ or self._jobs or self._waiting:
            open_ = self._take_in(open_)
            self._drop_those_given_up()
            self._admit_some()
            self._step()
            for job in self._jobs:
                job.tell()
            self._jobs = [job for job in self._jobs if job.row.ended is None]
            if not self._jobs:
                self._running = ContinuousBatch(self.llm)  # lets go of the last ones' states

    def _take_in(self, open_: bool) -> bool:
        """Take what has come; wait for it if there is nothing else to do. Whether more may come."""
        while open_ and (not self._coming.empty() or not (self._jobs or self._waiting)):
            coming = self._coming.get()
            if coming is None:
                return False
            if isinstance(coming, Job):
                self._waiting.append(coming)
            else:
                coming()
        return open_

    def _drop_those_given_up(self) -> None:
        self._waiting = [job for job in self._waiting if not job.gave_up]
        for job in self._jobs:
            if job.gave_up:
                job.row.ended = "stop"

    def _admit_some(self) -> None:
        """Read the prompts of as many as there is room for, and as do not keep the others waiting for long."""
        chosen: list[Job] = []
        read, longest = 0, max((_size(job.row) for job in self._jobs), default=0)
        for job in self._waiting:
            size, rows = _size(job.row), len(self._jobs) + len(chosen) + 1
            longest, read = max(longest, size), read + len(job.row.prompt.ids)
            alone = not (self._jobs or chosen)
            room = rows <= self.max_rows and (longest * rows <= self.max_held or alone)
            if not (room and (read <= _READ_AT_ONCE or not chosen)):
                break
            chosen.append(job)
        if not chosen:
            return
        self._waiting = self._waiting[len(chosen) :]
        self._jobs += chosen
        try:
            self._running.add([job.row for job in chosen])
        except Exception as error:  # of the model or the machine
            _fail(chosen, error)

    def _step(self) -> None:
        try:
            self._running.step()
        except Exception as error:  # whoever waits must hear of it, and later ones be served
            _fail(self._jobs, error)
            self._running = ContinuousBatch(self.llm)


def _size(row: Slot) -> int:
    """How many tokens a row may come to hold."""
    soft = row.soft.vectors.shape[1] if row.soft else 0
    return len(row.prompt.ids) + soft + row.config.max_new_tokens


def _fail(jobs: list[Job], error: Exception) -> None:
    # Not the error's own sentence, which may hold what it failed on.
    logger.error("the model failed on %d requests: %s", len(jobs), type(error).__name__)
    for job in jobs:
        job.row.ended = "failed"


def _call(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Do something on an event loop, unless it has gone."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        logger.debug("an answer came after its event loop had ended")
