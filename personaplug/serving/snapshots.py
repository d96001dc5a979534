"""A user's items and their vectors from one version of the history."""

from __future__ import annotations

from personaplug.errors import RequestError
from personaplug.store.history_store import HistoryStore, StoredHistory, StoredItem


def snapshot(
    store: HistoryStore, tenant: str, user: str, *, latest: int | None
) -> tuple[list[StoredItem], StoredHistory]:
    """Return a user's items and their vectors, row by row; both are empty if there is no such user.

    RequestError (409) if the history changes at every attempt.
    """
    for _ in range(3):
        version = store.version(tenant, user)
        items = store.list_items(tenant, user, latest=latest)
        history = store.load_history(tenant, user, latest=latest)
        if history.version == version:  # versions only increase, so the items are of this version too
            return items, history
    message = "The user's history changed during the request. Try again."
    raise RequestError(message, http_status=409, code="busy")
