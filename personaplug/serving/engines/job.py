"""A running request of the in-process engine: collects its tokens and yields text or OpenAI events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from personaplug.analysis.point_estimates import label_distribution
from personaplug.errors import EngineFailure
from personaplug.llm.continuous_batching import Slot
from personaplug.serving.openai_protocol import DONE, Logprobs, ReplyFormatter, event

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

    def logprobs(self, answer: str, scores: Sequence[float]) -> Logprobs | None:
        if self.top_logprobs is None:
            return None
        values = np.asarray(scores, dtype=np.float64)
        normalized = values - values.max() - np.log(np.exp(values - values.max()).sum())
        return Logprobs(answer, dict(zip(self.labels, normalized.tolist(), strict=True)), self.top_logprobs)

    def extra(self, scores: Sequence[float]) -> dict[str, Any]:
        """Return the fields of a reply that are not OpenAI's."""
        if not self.with_distribution:
            return {}
        return {"personaplug": label_distribution(self.labels, scores).to_json()}


class Job:
    """A row of the batch and its text: a label of the closed set, or free text up to a stop text."""

    def __init__(
        self,
        row: Slot,
        *,
        decode: Callable[[Sequence[int]], str],
        stop_texts: tuple[str, ...],
        closed_set: ClosedSet | None,
        tenant: str,
    ) -> None:
        self.row, self.closed_set, self.tenant = row, closed_set, tenant
        self.is_cancelled = False  # True once nobody waits for the reply
        self.finish_reason = "stop"  # valid once the text has ended
        self._decode, self._stop_texts = decode, stop_texts
        self._published = self._completion_tokens = 0
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
    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's format."""
        prompt, completion = self.prompt_tokens, self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def cancel(self) -> None:
        self.is_cancelled = True

    def publish(self) -> None:
        """Pass new tokens to the reader. Call it in the event loop."""
        updates: list[int | str] = [*self.row.ids[self._published :], *([self.row.ended] if self.row.ended else [])]
        self._published = len(self.row.ids)
        for update in updates:
            self._updates.put_nowait(update)

    async def text(self) -> AsyncGenerator[str]:
        """Yield the text piece by piece, or a label in one piece; EngineFailure if the model fails."""
        if self.closed_set is not None:
            yield await self._label(self.closed_set)
            return
        ids: list[int] = []
        text, sent, stop = "", 0, None
        while stop is None and isinstance(update := await self._updates.get(), int):
            ids.append(update)
            text, self._completion_tokens = self._decode(ids), len(ids)
            stop = min((index for index in map(text.find, self._stop_texts) if index >= 0), default=None)
            safe = _safe_length(text, self._stop_texts)
            if stop is None and safe > sent:
                yield text[sent:safe]
                sent = safe
        self.finish_reason = "stop" if stop is not None else str(update)
        if self.finish_reason == "failed":
            raise EngineFailure("The model failed on this request.")
        if rest := text[sent:stop]:
            yield rest

    async def whole(self, formatter: ReplyFormatter) -> dict[str, Any]:
        """Return the complete reply."""
        text = "".join([piece async for piece in self.text()])
        logprobs = self._logprobs(text)
        return formatter.whole(text, reason=self.finish_reason, usage=self.usage, logprobs=logprobs) | self._extra()

    async def events(self, formatter: ReplyFormatter, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """Yield the text as OpenAI's events."""
        if formatter.is_chat:
            yield event(formatter.chunk({"role": "assistant", "content": ""}))
        async with aclosing(self.text()) as pieces:
            async for piece in pieces:
                yield event(formatter.chunk({"content": piece}, logprobs=self._logprobs(piece)) | self._extra())
        yield event(formatter.chunk({}, reason=self.finish_reason))
        if include_usage:
            yield event(formatter.chunk({}) | {"choices": [], "usage": self.usage})
        yield DONE

    async def _label(self, closed_set: ClosedSet) -> str:
        ids: list[int] = []
        while isinstance(update := await self._updates.get(), int):
            ids.append(update)
        self._completion_tokens = len(ids)
        if tuple(ids) not in self.row.choices:
            raise EngineFailure("The model failed on this request.")
        return closed_set.labels[list(self.row.choices).index(tuple(ids))]

    def _logprobs(self, text: str) -> Logprobs | None:
        return self.closed_set.logprobs(text, self.row.scores) if self.closed_set else None

    def _extra(self) -> dict[str, Any]:
        return self.closed_set.extra(self.row.scores) if self.closed_set else {}


def _safe_length(text: str, stop_texts: tuple[str, ...]) -> int:
    """Return how much of the text can be sent: hold back incomplete characters and possible starts of stop texts."""
    end = len(text.rstrip(_INCOMPLETE))
    for stop in stop_texts:
        beginnings = range(min(len(stop) - 1, len(text)), 0, -1)
        end = min(end, len(text) - next((n for n in beginnings if text.endswith(stop[:n])), 0))
    return end
