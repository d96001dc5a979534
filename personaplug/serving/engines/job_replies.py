"""The reply to a request of the in-process engine: its answers, whole or as OpenAI's events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from personaplug.serving.engines.job import Job
from personaplug.serving.openai_protocol import DONE, Choice, ReplyFormatter, event, to_json, token_usage


class JobReply:
    """The answers to one request, which run as rows of one batch."""

    def __init__(self, jobs: Sequence[Job], formatter: ReplyFormatter) -> None:
        self.jobs, self.formatter = jobs, formatter

    def cancel(self) -> None:
        """Free the rows; no effect on rows that have ended."""
        for job in self.jobs:
            job.cancel()

    async def whole(self) -> bytes:
        """Return the complete reply as JSON."""
        choices = [await _choice(job) for job in self.jobs]  # the later ones collect their tokens meanwhile
        write = partial(self._write, choices)
        # Log-probabilities are long, so they are written outside the event loop.
        return write() if choices[0].logprobs is None else await asyncio.to_thread(write)

    def _write(self, choices: Sequence[Choice]) -> bytes:
        return to_json(self.formatter.whole(choices, usage=self._usage) | self.jobs[0].extra)

    async def events(self, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """Yield the answers as OpenAI's events, in the order in which their tokens come."""
        if len(self.jobs) == 1:
            answers = self._events_of(0)
        else:
            answers = _merged([self._events_of(index) for index in range(len(self.jobs))])
        async with aclosing(answers):
            async for answer in answers:
                yield answer
        if include_usage:
            yield event(self.formatter.usage_chunk(self._usage))
        yield DONE

    async def _events_of(self, index: int) -> AsyncGenerator[bytes]:
        job, chunk = self.jobs[index], partial(self.formatter.chunk, index=index)
        if self.formatter.is_chat:
            yield event(chunk({"role": "assistant", "content": ""}))
        async with aclosing(job.pieces()) as pieces:
            async for piece in pieces:
                yield event(chunk({"content": piece.text}, logprobs=piece.positions) | job.extra)
        yield event(chunk({}, reason=job.finish_reason))

    @property
    def _usage(self) -> dict[str, int]:
        """Token counts: the prompt once, and the tokens of all answers."""
        completion = sum(job.completion_tokens for job in self.jobs)
        return token_usage(prompt=self.jobs[0].prompt_tokens, completion=completion)


async def _choice(job: Job) -> Choice:
    pieces = [piece async for piece in job.pieces()]
    positions = [position for piece in pieces for position in piece.positions or []]
    has_logprobs = any(piece.positions is not None for piece in pieces)
    return Choice("".join(piece.text for piece in pieces), job.finish_reason, positions if has_logprobs else None)


async def _merged(streams: Sequence[AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """Yield the items of streams as they come; an error in one stream ends all."""
    items: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    async def read(stream: AsyncGenerator[bytes]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait(item)
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
