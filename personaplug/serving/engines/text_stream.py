"""Text and events of a request to the in-process engine, while its tokens arrive."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from personaplug.serving.engines.scheduler import Job
from personaplug.serving.openai_protocol import DONE, ReplyFormatter, event

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a job's tokens, up to a stop text; `reason` tells why it ended, once it has."""

    def __init__(self, job: Job, *, decode: Callable[[Sequence[int]], str], stop_texts: tuple[str, ...]) -> None:
        self.job, self.reason = job, "stop"
        self._decode, self._stop_texts, self._completion_tokens = decode, stop_texts, 0

    async def pieces(self) -> AsyncGenerator[str]:
        """Yield the text as it comes; EngineFailure if the model fails on it."""
        ids: list[int] = []
        text, sent, stop = "", 0, None
        async with aclosing(self.job.tokens()) as tokens:
            async for token in tokens:
                ids.append(token)
                text, self._completion_tokens = self._decode(ids), len(ids)
                stop = min((index for index in map(text.find, self._stop_texts) if index >= 0), default=None)
                if stop is not None:
                    break
                safe = _safe_length(text, self._stop_texts)
                if safe > sent:
                    yield text[sent:safe]
                    sent = safe
        if rest := text[sent:stop]:
            yield rest
        self.reason = "stop" if stop is not None else self.job.finish_reason

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written, as OpenAI counts them; soft tokens are part of the prompt."""
        read, written = self.job.prompt_tokens, self._completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def text_events(text: TextStream, formatter: ReplyFormatter, *, include_usage: bool) -> AsyncGenerator[bytes]:
    """Yield a text as OpenAI's events."""
    if formatter.is_chat:
        yield event(formatter.chunk({"role": "assistant", "content": ""}))
    async with aclosing(text.pieces()) as pieces:
        async for piece in pieces:
            yield event(formatter.chunk({"content": piece}))
    yield event(formatter.chunk({}, reason=text.reason))
    if include_usage:
        yield event(formatter.chunk({}) | {"choices": [], "usage": text.usage})
    yield DONE


def _safe_length(text: str, stop_texts: tuple[str, ...]) -> int:
    """Count the characters that may be sent: none that may be half a character or begin a stop text."""
    end = len(text.rstrip(_INCOMPLETE))
    for stop in stop_texts:
        beginnings = range(min(len(stop) - 1, len(text)), 0, -1)
        end = min(end, len(text) - next((n for n in beginnings if text.endswith(stop[:n])), 0))
    return end
