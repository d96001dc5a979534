"""Extract the text of a reply from its JSON or its stream of events, so that feedback can refer to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from personaplug.serving.engines.base import EventStream
from personaplug.serving.openai_protocol import DONE, json_object

_MAX_BODY_BYTES = 2**20  # longer bodies are mostly log-probabilities, and parsing them would block the event loop
_MAX_CHARACTERS = 100_000


def text_of_reply(body: bytes) -> str | None:
    """Return the text of a complete reply; None if it has no text or several choices, or is too long."""
    reply = json_object(body) if len(body) <= _MAX_BODY_BYTES else None
    texts = _texts(reply, "message") if reply else None
    return _bounded(texts[0]) if texts and len(texts) == 1 else None


def text_of_event(event: bytes) -> str:
    """Return the text that an event adds to an answer; empty if it adds none."""
    chunk = json_object(event.removeprefix(b"data: "))
    return "".join(_texts(chunk, "delta") or ()) if chunk else ""


class WatchedStream(EventStream):
    """Forwards events, and calls `on_text` with their text if they end as a complete answer with one choice."""

    def __init__(self, stream: EventStream, *, on_text: Callable[[str], None]) -> None:
        self._stream, self._on_text = stream, on_text
        self._text: str | None = ""  # None = the text is not collected any more

    async def __anext__(self) -> bytes:
        event = await anext(self._stream)
        if event != DONE:
            self._text = self._text_with(event)
        elif self._text and self._text.strip():
            self._on_text(self._text.strip())
        return event

    async def aclose(self) -> None:
        self._text = None
        await self._stream.aclose()

    def _text_with(self, event: bytes) -> str | None:
        chunk = json_object(event.removeprefix(b"data: ")) if self._text is not None else None
        texts = _texts(chunk, "delta") if chunk else None
        if self._text is None or texts is None or len(texts) > 1:
            return None
        text = self._text + "".join(texts)
        return text if len(text) <= _MAX_CHARACTERS else None


def _texts(body: Mapping[str, Any], field: str) -> list[str] | None:
    """Return the text of each choice; None if there is no list of choices, or a choice with another index than 0."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return None
    if any(choice.get("index", 0) != 0 for choice in choices):
        return None
    messages = [choice.get(field) for choice in choices]
    texts = [
        message.get("content") if isinstance(message, dict) else choice.get("text")
        for message, choice in zip(messages, choices, strict=True)
    ]
    return [text if isinstance(text, str) else "" for text in texts]


def _bounded(text: str) -> str | None:
    return text.strip() or None if len(text) <= _MAX_CHARACTERS else None
