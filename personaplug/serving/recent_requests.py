"""Requests, remembered for a while: what was asked, so that what a user made of the answer can become history.

In memory alone, within bounds of time and size; nothing of it is written anywhere.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import NamedTuple

from cachetools import TTLCache

from personaplug.errors import RequestError

_CLOCKS_DIFFER_S = 60  # at most, between this server and another that erases users


class _Request(NamedTuple):
    tenant: str
    user: str
    id: str


class _Asked(NamedTuple):
    query: str
    at: float


class RecentRequests:
    """What users asked lately; for several threads.

    Args:
        bytes: most that the texts take; the oldest go first.
        seconds: how long a request is remembered.
    """

    def __init__(self, *, bytes: int = 64 * 2**20, seconds: float = 24 * 3600) -> None:
        self._asked: TTLCache[_Request, _Asked] = TTLCache(
            bytes, seconds, getsizeof=lambda asked: 256 + 4 * len(asked.query)
        )
        self._forgotten: TTLCache[tuple[str, str], float] = TTLCache(100_000, 3600)  # when each user was
        self._lock = threading.Lock()

    def add(self, tenant: str, user: str, *, request: str, query: str, since: float) -> None:
        """Remember what was asked; a text that is longer than everything may be is not.

        Args:
            since: when it was asked, by `time.monotonic`: a user who was forgotten meanwhile stays so.
        """
        asked = _Asked(query, time.time() - (time.monotonic() - since))
        with self._lock:
            gone = self._forgotten.get((tenant, user), -1.0) >= since
            if not gone and self._asked.getsizeof(asked) <= self._asked.maxsize:
                self._asked[_Request(tenant, user, request)] = asked

    def query(self, tenant: str, user: str, *, request: str, erased: datetime | None = None) -> str:
        """What a user asked in a request.

        Args:
            erased: when a user of this id was last erased, perhaps by another process: what was asked before is gone.
        Raises:
            RequestError: if nothing is known of such a request of this user.
        """
        with self._lock:
            asked = self._asked.get(_Request(tenant, user, request))
        if asked is None or (erased is not None and erased.timestamp() + _CLOCKS_DIFFER_S >= asked.at):
            raise RequestError(
                "No request of this id is remembered of this user: requests are kept for a while, until the server "
                "restarts. Add an item with its text instead.",
                status=404,
                code="unknown_request",
            )
        return asked.query

    def forget(self, tenant: str, user: str) -> None:
        """Forget everything that a user asked."""
        with self._lock:
            self._forgotten[tenant, user] = time.monotonic()
            for key in [key for key in self._asked if (key.tenant, key.user) == (tenant, user)]:
                self._asked.pop(key, None)

    def __len__(self) -> int:
        """Requests remembered."""
        return len(self._asked)
