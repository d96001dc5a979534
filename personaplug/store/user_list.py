"""List the users of a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from typing import Any

from personaplug.encoders.encoded_sample import PREFERENCE_KIND
from personaplug.store.database import execute
from personaplug.store.history_store import HistoryStore
from personaplug.store.schema import Shard
from personaplug.store.writes import USER_COLUMNS, UserRow


@dataclass(frozen=True)
class StoredUser:
    """A user of a store, and facts about the user's items; expired items do not count.

    Attributes:
        items: number of items, stated preferences included.
        last: the latest date of an item; an item without a date has the day of its arrival.
    """

    tenant: str
    user: str
    items: int
    preferences: int
    last: date | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"last": self.last.isoformat() if self.last else None}


def list_users(store: HistoryStore, *, tenant: str | None = None, limit: int | None = None) -> list[StoredUser]:
    """Return the users of a tenant, or of all tenants, sorted by tenant and id.

    Args:
        limit: maximum number of users; if the store has more, which ones are returned is arbitrary but stable.
    """
    shards = map(Shard, range(store.settings.shards))
    users = (user for shard in shards for user in _users_of(store, shard, tenant=tenant, limit=limit))
    return sorted(islice(users, limit), key=lambda user: (user.tenant, user.user))


def _users_of(store: HistoryStore, shard: Shard, *, tenant: str | None, limit: int | None) -> Iterator[StoredUser]:
    of_tenant = "" if tenant is None else " WHERE tenant = :tenant"
    at_most = "" if limit is None else " ORDER BY user_id LIMIT :limit"
    # Three subqueries, because each reads only an index. A join would read the items, vectors included.
    items = f"FROM {shard.items} WHERE user_no = u.no AND day >= :first_day"
    sql = (
        f"SELECT {USER_COLUMNS}, (SELECT count(*) {items}) AS present, "
        f"(SELECT count(*) {items} AND kind_id = {PREFERENCE_KIND}) AS preferences, "
        f"(SELECT day {items} ORDER BY day DESC LIMIT 1) AS last_day FROM {shard.users} u{of_tenant}{at_most}"
    )
    given = {"first_day": store.retention.first_day(), "tenant": tenant, "limit": limit}
    parameters = {name: value for name, value in given.items() if value is not None}
    with store.database.read_transaction() as connection:
        rows = execute(connection, sql, parameters).all()
    for row in rows:
        UserRow.of(row, tenant=row.tenant, user=row.user_id)  # checks the row
        last = None if row.last_day is None else date.fromordinal(row.last_day)
        yield StoredUser(row.tenant, row.user_id, int(row.present), int(row.preferences), last)
