"""Replies of a vLLM server, read within bounds of size and time, and checked before a caller gets them.

Status 200 alone proves nothing: a proxy answers with a page, a failing server with an error object or with nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import aiohttp

from personaplug.errors import EngineFailure, RequestError
from personaplug.serving.openai_protocol import json_object

CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError)

_MAX_REPLY_BYTES = 64 * 2**20  # log-probabilities of a long answer take most
_MAX_EVENT_BYTES = 4 * 2**20
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_END_S = 1  # between [DONE] and the end of a stream


async def read_bounded(response: aiohttp.ClientResponse, *, max_bytes: int = _MAX_REPLY_BYTES) -> bytes:
    """Return a whole body; EngineFailure if it is longer than `max_bytes`."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise EngineFailure(f"The vLLM server's reply has more than {max_bytes:,} bytes.")
    return bytes(body)


def check_reply(body: bytes, *, is_chat: bool) -> None:
    """Check the reply to a request that was accepted; EngineFailure if it is no answer."""
    reply = json_object(body)
    if reply is None or not _has_answers(reply, is_chat=is_chat):
        raise EngineFailure(f"The vLLM server answered with status 200 and {_found(body)}. Is it a vLLM server?")


def check_refusal(body: bytes, status: int) -> None:
    """Check that a refusal is JSON; RequestError in our words if it is, say, a proxy's page."""
    if json_object(body) is None:
        message = f"The vLLM server refused the request (status {status}) and does not say why."
        raise RequestError(message, http_status=status, code="refused")


def check_is_stream(response: aiohttp.ClientResponse) -> None:
    """Check that a reply to a streaming request is a stream of events."""
    if response.content_type != "text/event-stream":
        raise EngineFailure(f"The vLLM server sent {response.content_type[:40]!r} in place of a stream of events.")


async def checked_events(
    response: aiohttp.ClientResponse, *, is_chat: bool, silence_s: float, total_s: float
) -> AsyncGenerator[bytes]:
    """Yield whole events, each checked; EngineFailure if one is none, or if the stream ends without [DONE].

    Half an event is held back: a client could not parse what follows it, even if that is an error.
    """
    try:
        async for block in _blocks(response, silence_s=silence_s, total_s=total_s):
            data = b"\n".join(line[5:].strip() for line in block.splitlines() if line.startswith(b"data:"))
            if data and data != b"[DONE]":
                _check_event(data, is_chat=is_chat)
            if data:  # without it: a comment, which keeps the connection open
                yield b"data: " + data + b"\n\n"
            if data == b"[DONE]":
                await _read_to_end(response)
                return
    except CONNECTION_ERRORS as error:
        raise EngineFailure(f"The vLLM server broke off ({type(error).__name__}).") from None
    raise EngineFailure("The vLLM server broke off before the end of its stream.")


async def _blocks(response: aiohttp.ClientResponse, *, silence_s: float, total_s: float) -> AsyncGenerator[bytes]:
    """Yield what stands between blank lines, within bounds of size and of the time from one blank line to the next."""
    now = asyncio.get_running_loop().time
    end, unfinished = now() + total_s, bytearray()
    due = min(now() + silence_s, end)
    while True:
        async with asyncio.timeout_at(due):
            chunk = await response.content.readany()
        if not chunk:  # the end
            break
        start = max(0, len(unfinished) - 3)  # of what may hold a blank line that was not seen before
        unfinished += chunk
        while match := _BLANK_LINE.search(unfinished, start):
            yield bytes(unfinished[: match.start()])
            del unfinished[: match.end()]
            start, due = 0, min(now() + silence_s, end)
        if len(unfinished) > _MAX_EVENT_BYTES:
            raise EngineFailure(f"The vLLM server sent {_MAX_EVENT_BYTES:,} bytes without the end of an event.")
    if unfinished.strip():
        raise EngineFailure("The vLLM server broke off amid an event.")


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    """Read the end of a stream, so that the connection can be used again."""
    with suppress(*CONNECTION_ERRORS):
        async with asyncio.timeout(_END_S):
            await response.content.readany()


def _has_answers(reply: dict[str, Any], *, is_chat: bool) -> bool:
    choices = reply.get("choices")
    return isinstance(choices, list) and bool(choices) and all(_is_answer(choice, is_chat) for choice in choices)


def _is_answer(choice: object, is_chat: bool) -> bool:
    if not isinstance(choice, dict):
        return False
    message = choice.get("message")
    if is_chat:
        return isinstance(message, dict) and isinstance(message.get("content"), str | None)
    return isinstance(choice.get("text"), str)


def _check_event(data: bytes, *, is_chat: bool) -> None:
    value = json_object(data)
    if value is not None and isinstance(value.get("error"), dict):
        return  # in vLLM's words, for the caller
    field, kind = ("delta", dict) if is_chat else ("text", str)
    choices = None if value is None else value.get("choices")
    if not isinstance(choices, list) or not all(
        isinstance(choice, dict) and isinstance(choice.get(field), kind) for choice in choices
    ):
        raise EngineFailure("The vLLM server sent an event that is no part of an answer.")


def _found(body: bytes) -> str:
    """What a reply is instead of an answer, without its text."""
    if not body.strip():
        return "nothing"
    reply = json_object(body)
    if reply is None:
        return f"{len(body):,} bytes that are no JSON object"
    is_error = reply.get("object") == "error" or "error" in reply
    return "an error" if is_error else "JSON without the choices of an answer"
