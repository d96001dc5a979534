"""OpenAI's wire format: validated requests, replies and stream events.

Undeclared fields stay in `model_extra`. Each engine lists the fields that it supports.
"""

from __future__ import annotations

import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from personaplug.config import MAX_PERSONA_SCALE
from personaplug.data.ids import as_id
from personaplug.data.task import TaskKind
from personaplug.errors import RequestError
from personaplug.serving.logprobs import Position, to_chat, to_completion

T = TypeVar("T")
Kind = Literal["chat", "completion"]

USER_HEADER = "X-Personaplug-User"

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""

HARMLESS = frozenset((
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "prediction",
))  # fmt: skip
"""Fields that do not affect the answer. They are accepted, but not passed to the engine."""

MAX_DEPTH = 100
"""Maximum nesting depth of lists and objects in a body."""

_IMAGE = "image_url"  # the type of a part with a picture
_MAX_MESSAGES = 2048
_MAX_FIELDS = 128  # undeclared fields of one object
_SURROGATE = re.compile("[\ud800-\udfff]")  # matches lone surrogates, because Python joins pairs


def json_leaves(value: object) -> Iterator[object]:
    """Iterate over the keys and scalars of a JSON value; RequestError if it is nested too deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        yield from (item for item in level if not isinstance(item, dict | list))
        lists = [
            [*item, *item.values()] if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        ]
        level = list(chain.from_iterable(lists))
        if not level:
            return
    raise RequestError(f"The request is nested more than {MAX_DEPTH} levels deep.", code="invalid_value")


def check_json(value: T) -> T:
    """Return a parsed JSON value; RequestError if it cannot be serialized again."""
    for leaf in json_leaves(value):
        if _SURROGATE.search(leaf) if isinstance(leaf, str) else isinstance(leaf, float) and not math.isfinite(leaf):
            message = "The request contains NaN, Infinity or a lone surrogate, which JSON cannot represent."
            raise RequestError(message, code="invalid_value")
    return value


def check_name(text: str) -> str:
    """Return a valid id; refuse dot segments, because DELETE of the item `..` would erase the user."""
    if text in (".", ".."):
        raise ValueError("an id must not be `.` or `..`, because ids are part of paths")
    return as_id(text, "an id")


def _check_unicode(text: str) -> str:
    if _SURROGATE.search(text):
        raise ValueError("not valid Unicode")
    return text


def _only_prompt(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


Text = Annotated[str, AfterValidator(_check_unicode)]
Name = Annotated[Text, AfterValidator(check_name), Field(min_length=1, max_length=255)]
"""An id of a user, an item or a request."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]
_OnePrompt = str | Annotated[list[str], Field(min_length=1, max_length=1)]


class PersonaOptions(BaseModel):
    """Options of personaplug. They are not passed to the engine."""

    model_config = ConfigDict(extra="forbid", strict=True)

    persona_scale: float | None = Field(
        default=None,
        ge=0,
        le=MAX_PERSONA_SCALE,
        description="Strength of the persona: 1 = the user's persona, 0 = plain model.",
    )
    free: bool = Field(default=False, description="Generate free text even if the task has labels.")
    user: Name | None = Field(default=None, description="The user whose persona to apply, like `user`.")
    probabilities: bool = Field(
        default=False,
        description="Return the probability of each label; for ratings also the median and the mean.",
    )


class _OpenModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="after")
    def _check_extra(self) -> Self:
        if len(self.model_extra or {}) > _MAX_FIELDS:
            message = f"An object may have at most {_MAX_FIELDS} additional fields."
            raise RequestError(message, code="invalid_value")
        check_json(self.model_extra)
        return self


class Message(_OpenModel):
    role: Text
    content: Text | list[_JsonObject] | None = None

    @property
    def text(self) -> str:
        """The text of the content. Text parts are joined by line breaks."""
        if not isinstance(self.content, list):
            return self.content or ""
        texts = [part.get("text") for part in self.content if part.get("type") == "text"]
        return "\n".join(text for text in texts if isinstance(text, str))

    @property
    def picture_urls(self) -> list[object]:
        """The URLs of the parts of type `image_url`, not yet checked; None for a part in another form."""
        images = [part.get("image_url") for part in self._parts if part.get("type") == _IMAGE]
        return [image.get("url") if isinstance(image, dict) else None for image in images]

    def with_text_before(self, text: str, *, keeps_pictures: bool) -> Message:
        """Return the message with a text before its own."""
        if not isinstance(self.content, list):
            return self.model_copy(update={"content": text + (self.content or "")})
        parts = [part for part in self._parts if keeps_pictures or part.get("type") != _IMAGE]
        return self.model_copy(update={"content": [{"type": "text", "text": text}, *parts] if text else parts})

    @property
    def _parts(self) -> list[dict[str, Any]]:
        return self.content if isinstance(self.content, list) else []


Messages = Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES)]


class _GenerationRequest(_OpenModel, ABC):
    kind: ClassVar[Kind]

    model: Annotated[Text, Field(min_length=1, max_length=255)] | None = Field(
        None, description="A name that GET /v1/models lists; by default the first."
    )
    user: Name | None = Field(None, description="The user whose persona to apply.")
    safety_identifier: Name | None = Field(None, description="The user whose persona to apply, like `user`.")
    metadata: _JsonObject | None = Field(None, description="`user_id` is the user whose persona to apply, like `user`.")
    stream: bool | None = False
    personaplug: PersonaOptions = Field(default_factory=PersonaOptions)

    @property
    @abstractmethod
    def prompt_text(self) -> str:
        """The text that is matched against the task's wordings."""

    @property
    @abstractmethod
    def characters(self) -> int:
        """Number of characters of all texts that the model reads."""

    @abstractmethod
    def can_ask(self, kind: TaskKind) -> bool:
        """True if `prompt_text` may be a prompt of a task of this kind."""

    @property
    def picture_urls(self) -> Sequence[object]:
        """The URLs of the pictures in the user's last turn, not yet checked."""
        return ()

    @abstractmethod
    def with_text_before(self, text: str, *, keeps_pictures: bool) -> Self:
        """Return the request with a text before `prompt_text`, and with or without the pictures of that turn."""

    def to_openai(self) -> dict[str, Any]:
        """Return the fields that the caller set, without `personaplug` and the harmless fields."""
        return self.model_dump(exclude_unset=True, exclude={"personaplug", *HARMLESS})

    def named_user(self, header: str | None, *, key_user: str | None = None) -> str | None:
        """Return the user that the key, the header or the body names; RequestError if they name different users."""
        names = {
            "the API key": key_user,
            USER_HEADER: None if header is None else _check_user(_decode_header(header), USER_HEADER),
            "personaplug.user": self.personaplug.user,
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "metadata.user_id": _user_of_metadata(self.metadata),
        }
        user_by_source = {source: name for source, name in names.items() if name is not None}
        if len(set(user_by_source.values())) > 1:
            sources = " and ".join(user_by_source)
            raise RequestError(f"The request names different users in {sources}. Name one user.", code="user")
        return next(iter(user_by_source.values()), None)


class ChatRequest(_GenerationRequest):
    kind = "chat"

    messages: Messages

    @property
    def prompt_text(self) -> str:
        """The text of the user's last turn."""
        return self.messages[self._last_turn].text

    @property
    def picture_urls(self) -> Sequence[object]:
        return self.messages[self._last_turn].picture_urls

    def with_text_before(self, text: str, *, keeps_pictures: bool) -> Self:
        messages, place = list(self.messages), self._last_turn
        messages[place] = messages[place].with_text_before(text, keeps_pictures=keeps_pictures)
        return self.model_copy(update={"messages": messages})

    @property
    def _last_turn(self) -> int:
        """The place of the user's last message; without one, of the last message."""
        users = [place for place, message in enumerate(self.messages) if message.role == "user"]
        return users[-1] if users else len(self.messages) - 1

    @property
    def characters(self) -> int:
        return sum(len(message.text) for message in self.messages)

    def can_ask(self, kind: TaskKind) -> bool:
        """True if the last message is a user's and, in a chat task, the request offers no tools."""
        return self.messages[-1].role == "user" and not (kind == "chat" and self._offers_tools)

    @property
    def _offers_tools(self) -> bool:
        fields = self.model_extra or {}
        return bool(fields.get("tools") or fields.get("functions")) and fields.get("tool_choice") != "none"


class CompletionRequest(_GenerationRequest):
    kind = "completion"

    prompt: Annotated[Text, BeforeValidator(_only_prompt, json_schema_input_type=_OnePrompt)]

    @property
    def prompt_text(self) -> str:
        return self.prompt

    def with_text_before(self, text: str, *, keeps_pictures: bool) -> Self:
        return self.model_copy(update={"prompt": text + self.prompt})

    def can_ask(self, kind: TaskKind) -> bool:
        """False for chat tasks, because the model continues a text here and does not answer a message."""
        return kind != "chat"

    @property
    def characters(self) -> int:
        return len(self.prompt)


def _decode_header(value: str) -> str:
    """Decode a header as UTF-8, with or without percent-encoding."""
    try:
        return unquote(value.encode("latin-1").decode("utf-8"), errors="strict")
    except UnicodeError:
        raise RequestError(f"The header {USER_HEADER} is not UTF-8.", http_status=422, code="invalid_value") from None


def _user_of_metadata(metadata: Mapping[str, Any] | None) -> str | None:
    user = (metadata or {}).get("user_id")
    is_number = isinstance(user, int) and not isinstance(user, bool)
    return None if user is None else _check_user(str(user) if is_number else user, "metadata.user_id")


def _check_user(value: object, source: str) -> str:
    try:
        return _NAME.validate_python(value)
    except ValidationError as error:
        message = f"{source}: {error.errors()[0]['msg']}"
        raise RequestError(message, http_status=422, code="invalid_value") from None


class ErrorBody(BaseModel):
    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorReply(BaseModel):
    """The body of every error response."""

    error: ErrorBody


def error_reply(message: str, *, code: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


def first_error(errors: Sequence[Any]) -> str:
    """Format pydantic's first error as field and reason, without the value and without names that may be texts."""
    parts = [str(part) for part in errors[0]["loc"]]
    return f"{'.'.join(part if len(part) <= 40 else '…' for part in parts)}: {errors[0]['msg']}"


def to_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def json_object(body: bytes) -> dict[str, Any] | None:
    """Parse a reply as a JSON object; return None if it is anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"


@dataclass(frozen=True, repr=False)
class Choice:
    """One of the complete answers to a request."""

    text: str
    finish_reason: str
    logprobs: Sequence[Position] | None = None  # None = not requested


def token_usage(*, prompt: int, completion: int) -> dict[str, int]:
    """Return token counts in OpenAI's form."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class ReplyFormatter:
    """Formats the reply to one request, whole or as chunks of a stream."""

    def __init__(self, kind: Kind, *, model: str, request_id: str) -> None:
        self.is_chat = kind == "chat"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self._base = {"id": f"{prefix}-{request_id}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], *, usage: dict[str, int]) -> dict[str, Any]:
        fields = [
            self._choice(
                {"message": {"role": "assistant", "content": choice.text}} if self.is_chat else {"text": choice.text},
                index=index,
                reason=choice.finish_reason,
                logprobs=choice.logprobs,
            )
            for index, choice in enumerate(choices)
        ]
        return self._body(fields, "chat.completion") | {"usage": usage}

    def chunk(
        self,
        delta: dict[str, str],
        *,
        index: int = 0,
        reason: str | None = None,
        logprobs: Sequence[Position] | None = None,
    ) -> dict[str, Any]:
        """Build a chunk of the answer `index`.

        `delta` has new `content`, and in a chat's first chunk `role`; the last one is empty.
        """
        content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = self._choice(content, index=index, reason=reason, logprobs=logprobs)
        return self._body([choice], "chat.completion.chunk")

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Build the last chunk of a stream that reports its token counts."""
        return self._body([], "chat.completion.chunk") | {"usage": usage}

    def _choice(
        self, content: dict[str, Any], *, index: int, reason: str | None, logprobs: Sequence[Position] | None
    ) -> dict[str, Any]:
        form = to_chat if self.is_chat else to_completion
        fields = None if logprobs is None else form(logprobs)
        return {"index": index, **content, "finish_reason": reason, "logprobs": fields}

    def _body(self, choices: list[dict[str, Any]], chat_object: str) -> dict[str, Any]:
        return {**self._base, "object": chat_object if self.is_chat else "text_completion", "choices": choices}
