"""Readiness: check that the engine and the store answer."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from personaplug.errors import EngineFailure, PersonaPlugError, StorageError
from personaplug.serving.service import Service

logger = logging.getLogger(__name__)

_TIMEOUT_S = 3
_MAX_AGE_S = 1.0  # of a successful check that is reused


class Readiness:
    """Checks the engine and the store. Concurrent calls share one check.

    It uses a separate thread, because a database that hangs may block all other threads.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="personaplug-ready")
        self._running_check: asyncio.Task[PersonaPlugError | None] | None = None
        self._was_ready_at = float("-inf")

    async def check(self) -> None:
        """Check that the server can answer; EngineFailure or StorageError if it cannot."""
        if time.monotonic() - self._was_ready_at <= _MAX_AGE_S:
            return
        check = self._running_check = self._running_check or asyncio.create_task(self._find_failure())
        await asyncio.wait({check}, timeout=_TIMEOUT_S)
        if not check.done():
            raise StorageError("The store does not answer.")
        self._running_check = None
        if failure := check.result():
            raise failure
        self._was_ready_at = time.monotonic()

    async def _find_failure(self) -> PersonaPlugError | None:
        try:
            if not await self._service.engine.is_ready():
                return EngineFailure("The language model is not ready.")
            await asyncio.get_running_loop().run_in_executor(self._thread, self._service.store.ping)
        except PersonaPlugError as error:
            return error
        except Exception as error:
            logger.error("readiness check failed: %s", type(error).__name__)
            return StorageError("The store does not answer.")
        return None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
