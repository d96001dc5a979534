"""Log-probabilities in OpenAI's two forms, for the tokens of a text and for labels, which count as one token each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class ScoredToken:
    """A token's bytes and its log-probability."""

    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The token as text. A part of a character is written as escaped bytes, as by OpenAI."""
        return self.bytes.decode(errors="backslashreplace")

    @property
    def finite(self) -> float:
        """The log-probability. OpenAI's lowest one replaces −inf, which JSON cannot represent."""
        return max(self.logprob, -9999.0)

    def to_chat(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": self.finite, "bytes": list(self.bytes)}


@dataclass(frozen=True, repr=False)
class Position:
    """A token of an answer, the likeliest tokens in its place, and the characters of the answer before it."""

    token: ScoredToken
    top: Sequence[ScoredToken]
    offset: int = 0

    @classmethod
    def of_label(cls, answer: str, scores: Mapping[str, float], *, top: int) -> Position:
        """Return the position of a label, given the log-probability of each label."""
        likeliest = sorted(scores.items(), key=lambda entry: -entry[1])[:top]
        token = ScoredToken(answer.encode(), scores[answer])
        return cls(token, [ScoredToken(label.encode(), score) for label, score in likeliest])


def to_chat(positions: Sequence[Position]) -> dict[str, Any]:
    content = [
        position.token.to_chat() | {"top_logprobs": [token.to_chat() for token in position.top]}
        for position in positions
    ]
    return {"content": content, "refusal": None}


def to_completion(positions: Sequence[Position]) -> dict[str, Any]:
    """Return the older form, in which the token itself is always among the likeliest ones."""
    tops = [{token.text: token.finite for token in [*position.top, position.token]} for position in positions]
    return {
        "tokens": [position.token.text for position in positions],
        "token_logprobs": [position.token.finite for position in positions],
        "top_logprobs": tops,
        "text_offset": [position.offset for position in positions],
    }
