"""Readiness: whether the engine and the store would answer now."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from personaplug.errors import EngineFailure, PersonaPlugError, StorageError
from personaplug.serving.service import Service

logger = logging.getLogger(__name__)

_TIMEOUT_S = 3
_MAX_AGE_S = 1.0  # of a good outcome that is given again


class Readiness:
    """Asks the engine and the store, once for all who want to know at the same time.

    It has a thread of its own, because a database that hangs may hold all others.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="personaplug-ready")
        self._question: asyncio.Task[PersonaPlugError | None] | None = None
        self._was_ready_at = float("-inf")

    async def check(self) -> None:
        """Return if the server would answer; EngineFailure or StorageError if not."""
        if time.monotonic() - self._was_ready_at <= _MAX_AGE_S:
            return
        question = self._question = self._question or asyncio.create_task(self._ask())
        await asyncio.wait({question}, timeout=_TIMEOUT_S)
        if not question.done():
            raise StorageError("The store does not answer.")
        self._question = None
        if failure := question.result():
            raise failure
        self._was_ready_at = time.monotonic()

    async def _ask(self) -> PersonaPlugError | None:
        try:
            if not await self._service.engine.is_ready():
                return EngineFailure("The language model is not ready.")
            await asyncio.get_running_loop().run_in_executor(self._thread, self._service.store.ping)
        except PersonaPlugError as error:
            return error
        except Exception as error:
            logger.error("readiness: %s", type(error).__name__)
            return StorageError("The store does not answer.")
        return None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
