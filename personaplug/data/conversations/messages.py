"""Messages, to which all conversation formats are converted: role, text, time, and the verdict on a reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

from personaplug.data.parsing import Flaw, as_datetime, as_record, as_text, name_of, value_of

Role = Literal["system", "user", "assistant", "tool"]

TOOL_CALLS = "turns with tool calls"
NO_TEXT = "turns with images or other parts that are not text"
WEIGHT_ZERO = "replies with weight 0"
TIME_KEYS = ("time", "timestamp", "created_at", "date")

_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """The user's verdict on a reply.

    Attributes:
        rejected: answers that the user rejected; "" for an answer without text.
        is_all_shown: False if the user saw only the reply in the conversation.
    """

    kept: str
    rejected: tuple[str, ...] = ()
    is_all_shown: bool = True


@dataclass(frozen=True, slots=True, repr=False)
class Message:
    """One message of a conversation.

    Attributes:
        text: without leading and trailing blanks; "" if there is no text.
        defect: the reason why the turn of the message cannot be a sample; "" without a defect.
        verdict: None for a reply without a verdict, such as a reply in the prompt of a pair.
    """

    role: Role
    text: str
    moment: datetime | None = None
    defect: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class MessageKeys:
    """The keys of a message in a format, and the roles by their names in this format."""

    role: str
    text: str
    roles: Mapping[str, Role]


CHAT_KEYS = MessageKeys(
    "role",
    "content",
    MappingProxyType({
        "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
        "function": "tool",
    }),
)  # fmt: skip
"""The keys of OpenAI's messages, which TRL also uses."""


def present(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out null values, because a record in Parquet has all keys."""
    return {key: value for key, value in values.items() if value is not None}


def moment_of(values: Mapping[str, Any]) -> datetime | None:
    """Return the time of a record or message; None without a time."""
    for key in TIME_KEYS:
        if key in values:
            return as_datetime(value_of(values, key), f"its {key!r}")
    return None


def messages_of(record: Mapping[str, Any], key: str, *, keys: MessageKeys = CHAT_KEYS) -> list[Message]:
    """Convert a record's list of messages."""
    value = value_of(record, key)
    if not isinstance(value, list):
        raise Flaw(f"its {key!r} is not a list of messages")
    messages = []
    for number, raw in enumerate(value, 1):
        try:
            messages.append(_message_of(present(as_record(raw)), keys))
        except Flaw as flaw:
            raise Flaw(f"message {number} of its {key!r}: {flaw}") from None
    return messages


def kept(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the verdict that the user kept all replies."""
    return [replace(one, verdict=Verdict(one.text)) if one.role == "assistant" else one for one in messages]


def paired(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Return a conversation that ends with the chosen answer; its verdict contains the rejected answer.

    Replies in the prompt have no verdict, so they are only context.
    """
    answer, other = _first_answer(chosen), _first_answer(rejected)
    if [(one.role, one.text) for one in chosen[:answer]] != [(one.role, one.text) for one in rejected[:other]]:
        raise Flaw("its two answers reply to different messages")
    answers = kept(chosen)
    answers[answer] = replace(answers[answer], verdict=Verdict(chosen[answer].text, (rejected[other].text,)))
    return [*prompt, *answers]


def _first_answer(messages: Sequence[Message]) -> int:
    answer = next((number for number, message in enumerate(messages) if message.role == "assistant"), None)
    if answer is None:
        raise Flaw("one of its two answers has no message of the assistant")
    return answer


def _message_of(values: Mapping[str, Any], keys: MessageKeys) -> Message:
    role = keys.roles.get(name_of(values, keys.role).strip().lower())
    if role is None:
        raise Flaw(f"its {keys.role!r} is not one of {', '.join(keys.roles)}")
    text, defect = _text_of(values, keys.text)
    if role == "tool" or values.get("tool_calls") or values.get("function_call"):
        defect = TOOL_CALLS
    elif role == "assistant" and values.get("weight") == 0:
        defect = defect or WEIGHT_ZERO
    return Message(role, text.strip(), moment_of(values), defect)


def _text_of(values: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return the text of a message and its defect: NO_TEXT if some parts are not text, else ""."""
    content = values.get(key, "")
    if not isinstance(content, list):
        return as_text(content, f"its {key!r}"), ""
    parts = [present(as_record(part)) for part in content]
    texts = [as_text(part.get("text", ""), "a part") for part in parts if part.get("type") in _TEXT_PARTS]
    return "\n".join(texts), NO_TEXT if len(texts) < len(parts) else ""
