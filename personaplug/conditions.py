"""Every row of a results table by name: which plug answers, and whose history it is given.

The controls are rows like any other. `instruction-only` is trained; `wrong-user` and `shuffled` are switches at test
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from personaplug.errors import BadConfig
from personaplug.samples import EncodedSample


@dataclass(frozen=True)
class Condition:
    """One row.

    Attributes:
        name: as written on the command line and in results.
        plug: which trained plug makes the soft tokens; None = the bare language model.
        history: whose items it sees.
        guards: the claim that this row tests.
    """

    name: str
    plug: Literal["plug", "instruction-only"] | None
    history: Literal["none", "own", "wrong-user", "shuffled"]
    guards: str


CONDITIONS: dict[str, Condition] = {
    condition.name: condition
    for condition in (
        Condition("plain", None, "none", "what the frozen model does untouched"),
        Condition(
            "instruction-only",
            "instruction-only",
            "none",
            "how much any trained tokens gain: same data, steps and number of tokens, no history",
        ),
        Condition(
            "wrong-user",
            "plug",
            "wrong-user",
            "how much of the plug's gain a stranger's history gives too; the distance to it is the personal gain",
        ),
        Condition("shuffled", "plug", "shuffled", "whether the order of the user's own items matters"),
        Condition("plug", "plug", "own", "the method"),
    )
}


def parse_conditions(text: str) -> list[Condition]:
    """Conditions from a comma-separated list.

    Raises:
        BadConfig: for an unknown, repeated or missing name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown or not names or len(set(names)) < len(names):
        raise BadConfig(f"--conditions takes different names out of {', '.join(CONDITIONS)}; found {text!r}.")
    return [CONDITIONS[name] for name in names]


def with_history(condition: Condition, samples: Sequence[EncodedSample], *, seed: int) -> list[EncodedSample]:
    """The samples as this condition shows them to the plug.

    Raises:
        BadConfig: if a wrong user is asked for and there is only one user.
    """
    if condition.history == "wrong-user":
        return [_lent(sample, other) for sample, other in zip(samples, _strangers(samples, seed=seed), strict=True)]
    if condition.history == "shuffled":
        return [_shuffled(sample, rng) for sample, rng in zip(samples, _generators(seed, len(samples)), strict=True)]
    if condition.history == "none":
        return [_lent(sample, None) for sample in samples]
    return list(samples)


def _strangers(samples: Sequence[EncodedSample], *, seed: int) -> Iterable[EncodedSample]:
    """For each sample one of another user, drawn by seed: every other user is equally likely, then each of theirs."""
    by_owner: dict[str, list[EncodedSample]] = {}
    for sample in samples:
        by_owner.setdefault(sample.owner, []).append(sample)
    owners = sorted(by_owner)
    if len(owners) < 2:
        raise BadConfig(f"wrong-user needs samples of 2 or more users; found {len(owners)}.")
    place = {owner: index for index, owner in enumerate(owners)}
    rng = np.random.default_rng([seed, 4])
    for sample in samples:
        other = owners[(place[sample.owner] + int(rng.integers(1, len(owners)))) % len(owners)]
        yield by_owner[other][int(rng.integers(len(by_owner[other])))]


def _lent(sample: EncodedSample, other: EncodedSample | None) -> EncodedSample:
    rows = np.empty(0, np.int64) if other is None else other.rows
    answers = np.empty(0, np.int16) if other is None else other.answers
    return replace(sample, rows=rows, answers=answers)


def _shuffled(sample: EncodedSample, rng: np.random.Generator) -> EncodedSample:
    order = rng.permutation(len(sample.rows))
    return replace(sample, rows=sample.rows[order], answers=sample.answers[order])


def _generators(seed: int, count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, 5, index]) for index in range(count)]
