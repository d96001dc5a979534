"""OpenAI's wire format: what a request may hold, and what answers look like. It knows no model and no user.

Fields that are not named here pass through to the engine untouched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from personaplug.config import MAX_PERSONA_SCALE
from personaplug.errors import RequestError

Kind = Literal["chat", "completion"]

DONE = b"data: [DONE]\n\n"
"""What ends a stream."""


def _written(text: str) -> str:
    """A text that can be written down: no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode") from None
    return text


def check_name(text: str) -> str:
    """A name that databases, headers and paths can hold.

    Raises:
        ValueError: if it is none. Clients resolve the dots of a path: to delete an item `..` would erase its user.
    """
    if any(character < " " for character in text):
        raise ValueError("control characters are no part of an id")
    if "/" in text or text in (".", ".."):
        raise ValueError("an id stands in paths: it holds no slash and is not . or ..")
    return text


Text = Annotated[str, AfterValidator(_written)]
Name = Annotated[Text, AfterValidator(check_name), Field(min_length=1, max_length=255)]
"""An id of a user, an item or a request."""

ModelName = Annotated[Text, Field(min_length=1, max_length=255)]


class Extras(BaseModel):
    """What a request may say to personaplug alone; removed before it is passed on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    persona_scale: float | None = Field(
        default=None,
        ge=0,
        le=MAX_PERSONA_SCALE,
        description="How far to go from what is common to all users to the user's own; 0 = plain model.",
    )
    free: bool = Field(default=False, description="Write freely even where the task has a closed set of answers.")


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Text
    content: Text | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """Its text; of several parts, those that are text, line by line."""
        if isinstance(self.content, list):
            texts = [part.get("text") for part in self.content if part.get("type") == "text"]
            return "\n".join(text for text in texts if isinstance(text, str))
        return self.content or ""


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: ModelName | None = Field(default=None, description="One of /v1/models; the only one may be left out.")
    user: Name | None = Field(default=None, description="Whose persona to use.")
    stream: bool | None = False
    personaplug: Extras = Field(default_factory=Extras)

    @property
    def passed_on(self) -> dict[str, Any]:
        """What the engine gets."""
        return self.model_dump(exclude_unset=True, exclude={"personaplug"})


class ChatRequest(_Request):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)

    @property
    def asked(self) -> str:
        """The text of the user's last turn."""
        turns = [message.text for message in self.messages if message.role == "user"]
        return turns[-1] if turns else self.messages[-1].text


class CompletionRequest(_Request):
    """`/v1/completions`, one prompt at a time."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]

    @property
    def asked(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def passed_on(self) -> dict[str, Any]:
        """What the engine gets: a list of one prompt as that prompt."""
        return super().passed_on | {"prompt": self.asked}


class ErrorBody(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorReply(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorBody


def first_flaw(errors: Sequence[Any]) -> str:
    """What pydantic found first, without the value itself."""
    place = ".".join(str(part) for part in errors[0]["loc"])
    return f"{place}: {errors[0]['msg']}"


def as_json(body: Mapping[str, Any]) -> bytes:
    """A request as JSON.

    Raises:
        RequestError: if it holds, wherever that stands, what came in as JSON of a kind and is none.
    """
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):  # an encoding error is a value error
        raise RequestError(
            "The request holds what JSON cannot say: NaN, Infinity, half of a surrogate pair, or lists too deep.",
            code="invalid_value",
        ) from None


def error_reply(message: str, *, code: str, status: int) -> dict[str, Any]:
    """An answer that says what went wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorReply(error=ErrorBody(message=message, type=kind, code=code)).model_dump()


def event(value: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and of its answer."""

    prompt: int
    written: int

    def to_dict(self) -> dict[str, int]:
        """As OpenAI says it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
        }


class Writer:
    """Writes the answer to one request, whole or in pieces.

    Args:
        kind: which of the two routes it is for.
        model: what it says it was answered by.
        request: its id.
    """

    def __init__(self, kind: Kind, *, model: str, request: str) -> None:
        self.kind = kind
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._base = {"id": f"{prefix}-{request}", "created": int(time.time()), "model": model}

    def whole(self, text: str, *, reason: str, usage: Usage) -> dict[str, Any]:
        """An answer in one piece."""
        if self.kind == "chat":
            choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
            name = "chat.completion"
        else:
            choice, name = {"index": 0, "text": text}, "text_completion"
        choice |= {"finish_reason": reason, "logprobs": None}
        return {**self._base, "object": name, "choices": [choice], "usage": usage.to_dict()}

    def first(self) -> dict[str, Any] | None:
        """What opens a stream of pieces, if anything does."""
        return self._chunk({"role": "assistant", "content": ""}) if self.kind == "chat" else None

    def piece(self, text: str) -> dict[str, Any]:
        """Some more of the answer."""
        return self._chunk({"content": text} if self.kind == "chat" else text)

    def last(self, reason: str) -> dict[str, Any]:
        """The end of the answer."""
        return self._chunk({} if self.kind == "chat" else "", reason=reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """What follows the end for those who asked for it."""
        return self._chunk(None) | {"usage": usage.to_dict()}

    def _chunk(self, delta: dict[str, str] | str | None, *, reason: str | None = None) -> dict[str, Any]:
        named = {"delta": delta} if self.kind == "chat" else {"text": delta}
        choices: Sequence[dict[str, Any]] = [
            {"index": 0, **named, "finish_reason": reason, "logprobs": None} for _ in range(delta is not None)
        ]
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._base, "object": name, "choices": choices}
