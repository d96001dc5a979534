"""MethodInfo: what trials, tables and tests know of a row, so that none of them parses its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

WRONG_USER: Final = "wrong-user"
SHUFFLED: Final = "shuffled"

HistorySource = Literal["none", "own", "wrong-user", "shuffled"]
Family = Literal["none", "plug", "prompt", "weights", "counts", "no-lm", "oracle"]


@dataclass(frozen=True)
class MethodInfo:
    """One row of a results table.

    The family is what personalizes: nothing (`none`), a `plug`, texts in the `prompt`, `weights` of the model, `counts`
    of the user's own words or labels; `no-lm` is a row without a language model; `oracle` the best score that simulated
    users allow.
    """

    name: str  # as written on the command line and in results
    family: Family = "none"
    history: HistorySource = "none"  # whose history the row sees
    control_of: str | None = None  # the row whose claim this row tests
    parents: tuple[str, ...] = ()  # the rows that this row adds something to
    is_seeded: bool = False  # whether the row is trained or drawn once for each seed

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MethodInfo:
        """Reverse `asdict`; raise TypeError if a field is unknown or the name missing."""
        return cls(**{**record, "parents": tuple(record.get("parents", ()))})

    @property
    def is_control(self) -> bool:
        """Whether the row tests a claim about another row."""
        return self.control_of is not None

    @property
    def has_language_model(self) -> bool:
        """Whether a language model makes the row's predictions."""
        return self.family not in ("no-lm", "oracle")

    @property
    def is_free_rival(self) -> bool:
        """Whether the row counts, copies or fits a regression, which costs next to nothing beside a trained persona."""
        return self.family in ("no-lm", "counts") and not self.is_control

    @property
    def gain_of(self) -> str | None:
        """The row whose personal gain is its distance from this row."""
        return self.control_of if self.history == WRONG_USER else None


def main_row(methods: Sequence[MethodInfo]) -> MethodInfo | None:
    """Return the row that a table is about: the first plug that adds to no other row, else the first with own history.

    Plugs come before other rows. Controls and rows that only count or copy are never the main row.
    """
    personal = [method for method in methods if method.history == "own" and not method.is_control]
    candidates = [method for method in personal if method.has_language_model and not method.is_free_rival]
    return min(candidates, key=lambda method: (method.family != "plug", bool(method.parents)), default=None)
