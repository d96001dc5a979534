"""Tickets: nothing that came before a user's erasure is stored after it, by whatever thread, process or server.

A ticket remembers the number of the user's last erasure, which the database counts, so that no clocks are compared.
The transaction that writes looks the number up again, and refuses to write if it has grown.
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
"""A ticket is refused after this time, so that an erasure of a user who was not stored need not be known for ever."""

_USERS_PER_QUERY = 5_000


@dataclass(frozen=True, repr=False, eq=False)
class Ticket:
    """What a request needs to store something for users of a tenant; taken when the request arrives.

    Attributes:
        hashed_users: the users, each with the hash that stands for it in the list of erasures.
        last_erasures: number of the last erasure, by hashed user; those who were never erased are missing.
    """

    tenant: str
    hashed_users: Mapping[str, str]
    last_erasures: Mapping[str, int]
    taken_at: float = field(default_factory=time.monotonic)

    @property
    def user(self) -> str:
        if len(self.hashed_users) != 1:
            raise UserError(f"The call needs a ticket of one user; found {len(self.hashed_users)}.")
        return next(iter(self.hashed_users))

    def check(self, connection: Connection, users: Iterable[str]) -> None:
        """Raise UserErased if one of the users was erased after the ticket was taken, or the ticket is too old."""
        if not self.hashed_users.keys() >= (wanted := set(users)):
            raise UserError("The ticket is of other users: admit all whose items are added.")
        now = last_erasures(connection, [self.hashed_users[user] for user in wanted])
        is_late = time.monotonic() > self.taken_at + TICKET_LIFE_S
        if is_late or any(number > self.last_erasures.get(hashed, 0) for hashed, number in now.items()):
            raise UserErased


def last_erasures(connection: Connection, hashed_users: Sequence[str]) -> dict[str, int]:
    """Return the number of the last erasure of each user who was ever erased."""
    select = "SELECT hashed_user, max(number) AS number FROM history_erasures"
    sql = f"{select} WHERE hashed_user IN :users GROUP BY hashed_user"
    return {
        row.hashed_user: row.number
        for chunk in chunks(hashed_users, _USERS_PER_QUERY)
        for row in execute(connection, sql, {"users": chunk}, expand="users")
    }


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))
