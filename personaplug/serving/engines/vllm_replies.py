"""Replies of a vLLM server: read them within limits of size and time, and check them before a caller gets them.

Status 200 is not enough: a proxy may send a web page, and a failing server an error object or nothing.
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

_MAX_REPLY_BYTES = 64 * 2**20  # mostly log-probabilities of a long answer
_MAX_EVENT_BYTES = 4 * 2**20
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_END_S = 1  # between [DONE] and the end of a stream


async def read_bounded(response: aiohttp.ClientResponse, *, max_bytes: int = _MAX_REPLY_BYTES) -> bytes:
    """Return the whole body; EngineFailure if it is longer than `max_bytes`."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise EngineFailure(f"The vLLM server's reply has more than {max_bytes:,} bytes.")
    return bytes(body)


def check_reply(body: bytes, *, is_chat: bool) -> None:
    """Check a reply with status 200; EngineFailure if it is not an answer."""
    reply = json_object(body)
    if reply is None or not _has_answers(reply, is_chat=is_chat):
        raise EngineFailure(f"The vLLM server sent status 200 with {_describe(body)}. Check that it is a vLLM server.")


def check_refusal(body: bytes, status: int) -> None:
    """Check that a refusal is JSON; RequestError if it is something else, such as a proxy's page."""
    if json_object(body) is None:
        message = f"The vLLM server refused the request (status {status}) without a reason."
        raise RequestError(message, http_status=status, code="refused")


def check_is_stream(response: aiohttp.ClientResponse) -> None:
    """Check that a reply to a streaming request is a stream of events."""
    if response.content_type != "text/event-stream":
        raise EngineFailure(f"The vLLM server sent {response.content_type[:40]!r} instead of a stream of events.")


async def checked_events(
    response: aiohttp.ClientResponse, *, is_chat: bool, silence_s: float, total_s: float
) -> AsyncGenerator[bytes]:
    """Yield checked, complete events; EngineFailure if an event is not valid, or if the stream ends without [DONE].

    An incomplete event is held back, because a client could not parse the error event after it.
    """
    try:
        async for block in _blocks(response, silence_s=silence_s, total_s=total_s):
            data = b"\n".join(line[5:].strip() for line in block.splitlines() if line.startswith(b"data:"))
            if data and data != b"[DONE]":
                _check_event(data, is_chat=is_chat)
            if data:  # a block without data is a keep-alive comment
                yield b"data: " + data + b"\n\n"
            if data == b"[DONE]":
                await _read_to_end(response)
                return
    except CONNECTION_ERRORS as error:
        raise EngineFailure(f"The vLLM server's stream was interrupted ({type(error).__name__}).") from None
    raise EngineFailure("The vLLM server's stream ended early.")


async def _blocks(response: aiohttp.ClientResponse, *, silence_s: float, total_s: float) -> AsyncGenerator[bytes]:
    """Yield the blocks between blank lines, within limits of their size and of the time between blank lines."""
    now = asyncio.get_running_loop().time
    end, unfinished = now() + total_s, bytearray()
    due = min(now() + silence_s, end)
    while True:
        async with asyncio.timeout_at(due):
            chunk = await response.content.readany()
        if not chunk:  # the end
            break
        start = max(0, len(unfinished) - 3)  # search only where a new blank line may begin
        unfinished += chunk
        while match := _BLANK_LINE.search(unfinished, start):
            yield bytes(unfinished[: match.start()])
            del unfinished[: match.end()]
            start, due = 0, min(now() + silence_s, end)
        if len(unfinished) > _MAX_EVENT_BYTES:
            raise EngineFailure(f"The vLLM server sent an event of more than {_MAX_EVENT_BYTES:,} bytes.")
    if unfinished.strip():
        raise EngineFailure("The vLLM server's stream ended within an event.")


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    """Read the end of a stream, so that the connection can be reused."""
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
        return  # the caller gets vLLM's message
    field, kind = ("delta", dict) if is_chat else ("text", str)
    choices = None if value is None else value.get("choices")
    if not isinstance(choices, list) or not all(
        isinstance(choice, dict) and isinstance(choice.get(field), kind) for choice in choices
    ):
        raise EngineFailure("The vLLM server sent an event that is not part of an answer.")


def _describe(body: bytes) -> str:
    """Describe a reply that is not an answer, without its text."""
    if not body.strip():
        return "nothing"
    reply = json_object(body)
    if reply is None:
        return f"{len(body):,} bytes that are not a JSON object"
    is_error = reply.get("object") == "error" or "error" in reply
    return "an error" if is_error else "JSON without choices"
