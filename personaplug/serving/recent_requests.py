"""Recent requests: what users asked, so that their feedback on the replies can become history.

Requests stay in memory, within bounds of time and size, and are written nowhere.
"""

from __future__ import annotations

import time

from cachetools import TTLCache

from personaplug.errors import RequestError
from personaplug.store.tickets import Ticket

_MAX_BYTES = 64 * 2**20
_TTL_S = 24 * 3600
_ENTRY_BYTES = 256  # of an entry, beside its query


def unknown_request() -> RequestError:
    return RequestError(
        "No request of this id is known for this user: requests are kept for a while, until the server restarts. "
        "Add an item with its text instead.",
        http_status=404,
        code="unknown_request",
    )


class RecentRequests:
    """The queries of recent requests, for one event loop. The oldest go first."""

    def __init__(self) -> None:
        # The query and the ticket of its request, by tenant, user and request id.
        self._entries: TTLCache[tuple[str, str, str], tuple[str, Ticket]] = TTLCache(
            _MAX_BYTES, _TTL_S, getsizeof=lambda entry: _ENTRY_BYTES + 4 * len(entry[0])
        )
        self._erased: TTLCache[tuple[str, str], float] = TTLCache(100_000, 3600)  # as `time.monotonic` gives it

    def add(self, ticket: Ticket, *, request_id: str, query: str) -> None:
        """Keep a query, unless it is too large or its user was forgotten after the request came.

        An empty query stands for a request outside the task, of which no item can be made.
        """
        tenant, user, entry = ticket.tenant, ticket.user, (query, ticket)
        is_erased = self._erased.get((tenant, user), -1.0) >= ticket.taken_at
        if not is_erased and self._entries.getsizeof(entry) <= self._entries.maxsize:
            self._entries[tenant, user, request_id] = entry

    def find(self, tenant: str, user: str, *, request_id: str) -> tuple[str, Ticket]:
        """Return the query of a user's request and the request's ticket; RequestError if it is not kept.

        The store refuses the ticket if any process has erased the user since.
        """
        entry = self._entries.get((tenant, user, request_id))
        if entry is None:
            raise unknown_request()
        return entry

    def forget(self, tenant: str, user: str) -> None:
        self._erased[tenant, user] = time.monotonic()
        for key in [key for key in self._entries if key[:2] == (tenant, user)]:
            self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)
