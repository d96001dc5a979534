"""Recent requests: what users asked, so that their feedback on the replies can become history.

Requests stay in memory, within bounds of time and size, and are written nowhere.
"""

from __future__ import annotations

import time
from datetime import datetime

from cachetools import TTLCache

from personaplug.errors import RequestError

_MAX_BYTES = 64 * 2**20
_TTL_S = 24 * 3600
_MAX_CLOCK_SKEW_S = 60  # between this server and another one that erases users
_ENTRY_BYTES = 256  # of an entry, beside its query


class RecentRequests:
    """The queries of recent requests, for one event loop. The oldest go first."""

    def __init__(self) -> None:
        # The query and its time, as `time.time` gives it, by tenant, user and request id.
        self._entries: TTLCache[tuple[str, str, str], tuple[str, float]] = TTLCache(
            _MAX_BYTES, _TTL_S, getsizeof=lambda entry: _ENTRY_BYTES + 4 * len(entry[0])
        )
        self._erased: TTLCache[tuple[str, str], float] = TTLCache(100_000, 3600)  # as `time.monotonic` gives it

    def add(self, tenant: str, user: str, *, request_id: str, query: str, since: float) -> None:
        """Keep a query, unless it is too large or its user was forgotten `since` it arrived, by `time.monotonic`.

        An empty query stands for a request outside the task, of which no item can be made.
        """
        entry = query, time.time() - (time.monotonic() - since)
        is_erased = self._erased.get((tenant, user), -1.0) >= since
        if not is_erased and self._entries.getsizeof(entry) <= self._entries.maxsize:
            self._entries[tenant, user, request_id] = entry

    def query(self, tenant: str, user: str, *, request_id: str, erased_at: datetime | None) -> str:
        """Return the query of a user's request; RequestError if it is not kept.

        `erased_at` is when any process last erased a user of this id; earlier requests are gone.
        """
        query, asked_at = self._entries.get((tenant, user, request_id), ("", -1.0))
        if asked_at < 0 or (erased_at is not None and erased_at.timestamp() + _MAX_CLOCK_SKEW_S >= asked_at):
            raise RequestError(
                "No request of this id is known for this user: requests are kept for a while, until the server "
                "restarts. Add an item with its text instead.",
                http_status=404,
                code="unknown_request",
            )
        return query

    def forget(self, tenant: str, user: str) -> None:
        self._erased[tenant, user] = time.monotonic()
        for key in [key for key in self._entries if key[:2] == (tenant, user)]:
            self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)
