"""Tickets: data from before a user's erasure is not stored after the erasure, in any thread, process or server.

A ticket contains the number of the user's last erasure. The database counts erasures, so no clocks are compared. The
writing transaction reads the number again, and refuses to write if it has increased.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from personaplug.errors import UserErased, UserError
from personaplug.store.database import Connection, execute

T = TypeVar("T")

TICKET_LIFE_S = 25 * 3600
"""A ticket expires after this time, so that records of erased users without data can be deleted."""

_USERS_PER_QUERY = 5_000


@dataclass(frozen=True, repr=False, eq=False)
class Ticket:
    """The permission of a request to store items of users of a tenant; taken when the request arrives.

    Attributes:
        hashed_users: the hash of each user, as in the list of erasures.
        last_erasures: number of the last erasure, by hashed user; users who were never erased are missing.
    """

    tenant: str
    hashed_users: Mapping[str, str]
    last_erasures: Mapping[str, int]
    taken_at: float = field(default_factory=time.monotonic)

    @property
    def user(self) -> str:
        if len(self.hashed_users) != 1:
            raise UserError(f"The call needs a ticket of one user; found {len(self.hashed_users)} users.")
        return next(iter(self.hashed_users))

    def check(self, connection: Connection, users: Iterable[str]) -> None:
        """Raise UserErased if one of the users was erased after the ticket was taken, or the ticket is too old."""
        names = set(users)
        if not self.hashed_users.keys() >= names:
            raise UserError("The ticket does not include all users of the items. Call `admit` with all of them.")
        current = last_erasures(connection, [self.hashed_users[user] for user in names])
        is_late = time.monotonic() > self.taken_at + TICKET_LIFE_S
        if is_late or any(number > self.last_erasures.get(hashed, 0) for hashed, number in current.items()):
            raise UserErased


def last_erasures(connection: Connection, hashed_users: Sequence[str]) -> dict[str, int]:
    """Return the number of the last erasure by hashed user, for users who were erased."""
    select = "SELECT hashed_user, max(number) AS number FROM history_erasures"
    sql = f"{select} WHERE hashed_user IN :users GROUP BY hashed_user"
    return {
        row.hashed_user: row.number
        for chunk in chunks(hashed_users, _USERS_PER_QUERY)
        for row in execute(connection, sql, {"users": chunk}, expand="users")
    }


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))
