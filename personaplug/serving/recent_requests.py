"""Recent requests and their answers, so that feedback on them can become history.

Requests stay in memory, within limits of time and size, and are never written to disk.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

from cachetools import TTLCache

from personaplug.data.task import Task
from personaplug.errors import RequestError
from personaplug.store.tickets import Ticket

_MAX_BYTES = 64 * 2**20
_TTL_S = 24 * 3600
_ENTRY_BYTES = 512  # size of an entry without its texts


def unknown_request() -> RequestError:
    return RequestError(
        "This user has no recent request with this id. The server keeps requests for a limited time, and not across "
        "restarts. Add the item with its fields instead.",
        http_status=404,
        code="unknown_request",
    )


@dataclass(frozen=True, slots=True, repr=False)
class RecentRequest:
    """A request that feedback may refer to.

    Attributes:
        query: empty for a request that matches no task and so cannot become an item.
        ticket: the request's ticket; the store refuses it if any process has erased the user since.
        task: the task of the plug that answered the request.
        answer: the model's text; None while it streams, and if it was cut off, too long, or one of several.
    """

    query: str
    ticket: Ticket
    task: Task
    answer: str | None = None

    @property
    def bytes(self) -> int:
        return _ENTRY_BYTES + sys.getsizeof(self.query) + sys.getsizeof(self.answer)


class RecentRequests:
    """Recent requests with the texts of their answers, for one event loop. Evicts the oldest first."""

    def __init__(self) -> None:
        self._entries: TTLCache[tuple[str, str, str], RecentRequest] = TTLCache(
            _MAX_BYTES, _TTL_S, getsizeof=lambda request: request.bytes
        )  # by tenant, user and request id
        self._erased: TTLCache[tuple[str, str], float] = TTLCache(100_000, 3600)  # `time.monotonic()` of the erasure

    def add(self, ticket: Ticket, *, request_id: str, query: str, task: Task, answer: str | None = None) -> None:
        """Store a request, unless it is too large or its user was forgotten after the request arrived."""
        if self._erased.get((ticket.tenant, ticket.user), -1.0) < ticket.taken_at:
            self._set((ticket.tenant, ticket.user, request_id), RecentRequest(query, ticket, task, answer))

    def set_answer(self, ticket: Ticket, *, request_id: str, answer: str) -> None:
        """Store the answer to a request, if the request is still stored."""
        key = (ticket.tenant, ticket.user, request_id)
        if request := self._entries.get(key):
            self._set(key, replace(request, answer=answer))

    def find(self, tenant: str, user: str, *, request_id: str) -> RecentRequest:
        """Return a user's request; RequestError if it is not stored."""
        request = self._entries.get((tenant, user, request_id))
        if request is None:
            raise unknown_request()
        return request

    def forget(self, tenant: str, user: str) -> None:
        self._erased[tenant, user] = time.monotonic()
        for key in [key for key in self._entries if key[:2] == (tenant, user)]:
            self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)

    def _set(self, key: tuple[str, str, str], request: RecentRequest) -> None:
        if request.bytes <= self._entries.maxsize:
            self._entries[key] = request
