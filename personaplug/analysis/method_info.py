"""MethodInfo: the facts about a row that trials, tables and tests need, so that no code parses the row's name."""

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

    Families: `none` does not personalize; `plug` adds soft tokens; `prompt` adds texts to the prompt; `weights` changes
    the model's weights; `counts` counts the user's words or labels; `no-lm` has no language model; `oracle` knows
    the right answers, or the best ones of simulated users.
    """

    name: str  # on the command line and in results
    family: Family = "none"
    history: HistorySource = "none"  # whose history the row sees
    control_of: str | None = None  # the row that this row is a control of
    parents: tuple[str, ...] = ()  # the rows that this row extends
    is_seeded: bool = False  # whether the row is trained or drawn once for each seed

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MethodInfo:
        """Reverse `asdict`; raise TypeError if a field is unknown or the name is missing."""
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
        """Whether the row only counts, copies or fits a regression, at almost no cost compared with a plug."""
        return self.family in ("no-lm", "counts") and not self.is_control

    @property
    def gain_of(self) -> str | None:
        """The row whose personal gain is its advantage over this row."""
        return self.control_of if self.history == WRONG_USER else None


def main_row(methods: Sequence[MethodInfo]) -> MethodInfo | None:
    """Return the row that a table is about.

    That is the first row with the user's own history. Plugs come before other rows, and rows without parents before
    rows with parents. Controls and free rivals are never the main row.
    """
    personal = [method for method in methods if method.history == "own" and not method.is_control]
    candidates = [method for method in personal if method.has_language_model and not method.is_free_rival]
    return min(candidates, key=lambda method: (method.family != "plug", bool(method.parents)), default=None)
