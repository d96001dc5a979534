"""Requests, remembered for a while: what was asked, so that what a user made of the answer can become history.

In memory alone, within bounds of time and size; nothing of it is written anywhere.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from cachetools import TTLCache

from personaplug.errors import RequestError


class _Request(NamedTuple):
    tenant: str
    user: str
    id: str


class RememberedRequests:
    """What users asked lately; for several threads.

    Args:
        bytes: most that the texts take; the oldest go first.
        seconds: how long a request is remembered.
    """

    def __init__(self, *, bytes: int = 64 * 2**20, seconds: float = 24 * 3600) -> None:
        self._asked: TTLCache[_Request, str] = TTLCache(bytes, seconds, getsizeof=lambda text: 256 + 4 * len(text))
        self._forgotten: TTLCache[tuple[str, str], float] = TTLCache(100_000, 3600)  # when each user was
        self._lock = threading.Lock()

    def add(self, tenant: str, user: str, *, request: str, query: str, since: float) -> None:
        """Remember what was asked; a text that is longer than everything may be is not.

        Args:
            since: when it was asked, by `time.monotonic`: a user who was forgotten meanwhile stays so.
        """
        with self._lock:
            gone = self._forgotten.get((tenant, user), -1.0) >= since
            if not gone and self._asked.getsizeof(query) <= self._asked.maxsize:
                self._asked[_Request(tenant, user, request)] = query

    def query(self, tenant: str, user: str, *, request: str) -> str:
        """What a user asked in a request.

        Raises:
            RequestError: if nothing is known of such a request of this user.
        """
        with self._lock:
            query = self._asked.get(_Request(tenant, user, request))
        if query is None:
            raise RequestError(
                "No request of this id is remembered of this user: requests are kept for a while, until the server "
                "restarts. Add an item with its text instead.",
                status=404,
                code="unknown_request",
            )
        return query

    def forget(self, tenant: str, user: str) -> None:
        """Forget everything that a user asked."""
        with self._lock:
            self._forgotten[tenant, user] = time.monotonic()
            for key in [key for key in self._asked if (key.tenant, key.user) == (tenant, user)]:
                self._asked.pop(key, None)

    def __len__(self) -> int:
        """Requests remembered."""
        return len(self._asked)
