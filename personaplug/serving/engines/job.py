"""A request to the in-process engine while its tokens arrive: its text, and the text as OpenAI's events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from personaplug.errors import EngineFailure
from personaplug.llm.continuous_batching import Slot
from personaplug.serving.openai_protocol import DONE, ReplyFormatter, event

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Job:
    """A row of the batch and the text of its tokens, up to a stop text."""

    def __init__(self, row: Slot, *, decode: Callable[[Sequence[int]], str], stop_texts: tuple[str, ...]) -> None:
        self.row = row
        self.is_cancelled = False  # whether nobody waits for it any more
        self.finish_reason = "stop"  # valid once the text has ended
        self._decode, self._stop_texts = decode, stop_texts
        self._published = self._completion_tokens = 0
        self._updates: asyncio.Queue[int | str] = asyncio.Queue()  # tokens, and last why the row ended

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, soft tokens included."""
        return len(self.row.prompt.ids) + (self.row.soft.tokens if self.row.soft else 0)

    @property
    def max_size(self) -> int:
        """Tokens that the row may come to hold."""
        return self.prompt_tokens + self.row.config.max_new_tokens

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written, as OpenAI counts them."""
        read, written = self.prompt_tokens, self._completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def cancel(self) -> None:
        self.is_cancelled = True

    def publish(self) -> None:
        """Pass new tokens on, from the event loop."""
        updates: list[int | str] = [*self.row.ids[self._published :], *([self.row.ended] if self.row.ended else [])]
        self._published = len(self.row.ids)
        for update in updates:
            self._updates.put_nowait(update)

    async def text(self) -> AsyncGenerator[str]:
        """Yield the text as it comes; EngineFailure if the model fails on it."""
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

    async def events(self, formatter: ReplyFormatter, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """Yield the text as OpenAI's events."""
        if formatter.is_chat:
            yield event(formatter.chunk({"role": "assistant", "content": ""}))
        async with aclosing(self.text()) as pieces:
            async for piece in pieces:
                yield event(formatter.chunk({"content": piece}))
        yield event(formatter.chunk({}, reason=self.finish_reason))
        if include_usage:
            yield event(formatter.chunk({}) | {"choices": [], "usage": self.usage})
        yield DONE


def _safe_length(text: str, stop_texts: tuple[str, ...]) -> int:
    """Count the characters that may be sent: none that may be half a character or begin a stop text."""
    end = len(text.rstrip(_INCOMPLETE))
    for stop in stop_texts:
        beginnings = range(min(len(stop) - 1, len(text)), 0, -1)
        end = min(end, len(text) - next((n for n in beginnings if text.endswith(stop[:n])), 0))
    return end
