"""A running answer of the in-process engine: collects its tokens and yields its text with the log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from personaplug.analysis.point_estimates import label_distribution
from personaplug.errors import EngineFailure
from personaplug.llm.continuous_batching import Slot
from personaplug.serving.engines.response_format import too_complex
from personaplug.serving.logprobs import Position, ScoredToken

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ClosedSet:
    """The labels of an answer, and which probabilities the reply reports."""

    labels: Sequence[str]
    top_logprobs: int | None = None  # None = no log-probabilities
    with_distribution: bool = False

    @property
    def needs_scores(self) -> bool:
        return self.top_logprobs is not None or self.with_distribution

    def positions(self, answer: str, scores: Sequence[float]) -> list[Position] | None:
        if self.top_logprobs is None:
            return None
        values = np.asarray(scores, dtype=np.float64)
        normalized = values - values.max() - np.log(np.exp(values - values.max()).sum())
        score_by_label = dict(zip(self.labels, normalized.tolist(), strict=True))
        return [Position.of_label(answer, score_by_label, top=self.top_logprobs)]

    def extra(self, scores: Sequence[float]) -> dict[str, Any]:
        """Return the fields of a reply that are not OpenAI's."""
        if not self.with_distribution:
            return {}
        return {"personaplug": label_distribution(self.labels, scores).to_json()}


@dataclass(frozen=True, repr=False)
class Piece:
    """A piece of an answer's text, and the positions of its tokens; None if log-probabilities were not requested."""

    text: str
    positions: list[Position] | None = None


class Job:
    """A row of the batch and its text: a label of the closed set, or free text up to a stop text.

    Args:
        token_bytes: returns the bytes of a token.
    """

    def __init__(
        self,
        row: Slot,
        *,
        decode: Callable[[Sequence[int]], str],
        token_bytes: Callable[[int], bytes],
        stop_texts: tuple[str, ...],
        closed_set: ClosedSet | None,
        tenant: str,
    ) -> None:
        self.row, self.closed_set, self.tenant = row, closed_set, tenant
        self.is_cancelled = False  # True once nobody waits for the reply
        self.finish_reason = "stop"  # valid once the text has ended
        self.completion_tokens = 0
        self._decode, self._token_bytes, self._stop_texts = decode, token_bytes, stop_texts
        self._published = self._reported = 0
        self._updates: asyncio.Queue[int | str] = asyncio.Queue()  # token ids, and at the end the finish reason

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, including soft tokens."""
        return len(self.row.prompt.ids) + (self.row.soft.tokens if self.row.soft else 0)

    @property
    def max_size(self) -> int:
        """Maximum tokens of the row."""
        return self.prompt_tokens + self.row.config.max_new_tokens

    @property
    def extra(self) -> dict[str, Any]:
        """The fields of a reply that are not OpenAI's."""
        return self.closed_set.extra(self.row.scores) if self.closed_set else {}

    def cancel(self) -> None:
        self.is_cancelled = True

    def publish(self) -> None:
        """Pass new tokens to the reader. Call it in the event loop."""
        updates: list[int | str] = [*self.row.ids[self._published :], *([self.row.ended] if self.row.ended else [])]
        self._published = len(self.row.ids)
        for update in updates:
            self._updates.put_nowait(update)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yield the text piece by piece, or a label in one piece.

        EngineFailure if the model fails; RequestError if the schema of the answer proves too complex.
        """
        if self.closed_set is not None:
            label = await self._label(self.closed_set)
            yield Piece(label, self.closed_set.positions(label, self.row.scores))
            return
        ids, offsets = list[int](), list[int]()  # offsets: characters before each token
        text, sent, stop = "", 0, None
        while stop is None and isinstance(update := await self._updates.get(), int):
            ids.append(update)
            offsets.append(len(text.rstrip(_INCOMPLETE)))
            text, self.completion_tokens = self._decode(ids), len(ids)
            stop = min((index for index in map(text.find, self._stop_texts) if index >= 0), default=None)
            safe = _safe_length(text, self._stop_texts)
            if stop is None and safe > sent:
                yield Piece(text[sent:safe], self._positions(offsets, end=safe))
                sent = safe
        self.finish_reason = "stop" if stop is not None else str(update)
        if self.finish_reason == "failed":
            raise EngineFailure("The model failed on this request.")
        if self.finish_reason == "grammar":
            raise too_complex()
        rest, positions = text[sent:stop], self._positions(offsets, end=len(text) + 1 if stop is None else stop)
        if rest or positions or (positions is not None and not ids):
            yield Piece(rest, positions)

    def _positions(self, offsets: Sequence[int], *, end: int) -> list[Position] | None:
        """Return the positions that were not returned before, of tokens that begin before `end`."""
        if self.row.top_logprobs is None:
            return None
        first = self._reported
        while self._reported < len(offsets) and offsets[self._reported] < end:
            self._reported += 1
        return [self._position(index, offsets[index]) for index in range(first, self._reported)]

    def _position(self, index: int, offset: int) -> Position:
        found = self.row.logprobs[index]
        top = [ScoredToken(self._token_bytes(token), logprob) for token, logprob in found.top]
        return Position(ScoredToken(self._token_bytes(found.token), found.logprob), top, offset)

    async def _label(self, closed_set: ClosedSet) -> str:
        ids: list[int] = []
        while isinstance(update := await self._updates.get(), int):
            ids.append(update)
        self.completion_tokens = len(ids)
        if tuple(ids) not in self.row.choices:
            raise EngineFailure("The model failed on this request.")
        return closed_set.labels[list(self.row.choices).index(tuple(ids))]


def _safe_length(text: str, stop_texts: tuple[str, ...]) -> int:
    """Return how much of the text can be sent: hold back incomplete characters and possible starts of stop texts."""
    end = len(text.rstrip(_INCOMPLETE))
    for stop in stop_texts:
        beginnings = range(min(len(stop) - 1, len(text)), 0, -1)
        end = min(end, len(text) - next((n for n in beginnings if text.endswith(stop[:n])), 0))
    return end
