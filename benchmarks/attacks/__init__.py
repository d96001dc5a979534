"""Attacks on a server and on files of its own: each is a case that counts what was tried and lists what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.lab import Lab

Attack = Callable[["Lab", "Verdict"], None]

CASES: dict[str, Case] = {}
"""All cases by name, in the order of the table."""


@dataclass
class Verdict:
    """What a case tried and what went wrong."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def expect(self, is_right: bool, fault: str) -> None:
        """Count a try; note the fault if it is not right."""
        self.tried += 1
        if not is_right:
            self.wrong.append(fault)

    def note(self, text: str) -> None:
        """Add a figure to the table's last column."""
        self.notes.append(text)


@dataclass(frozen=True)
class Case:
    name: str
    attack: Attack


def case(name: str) -> Callable[[Attack], Attack]:
    """Register an attack under the name that the table shows."""

    def register(attack: Attack) -> Attack:
        CASES[name] = Case(name, attack)
        return attack

    return register
