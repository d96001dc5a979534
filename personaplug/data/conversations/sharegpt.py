"""ShareGPT's format, which FastChat, Axolotl and LLaMA-Factory also read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from personaplug.data.conversations.aloe import is_aloe
from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import NO_TEXT, Message, MessageKeys, kept, messages_of
from personaplug.data.parsing import text_of

_KEYS = MessageKeys(
    "from",
    "value",
    MappingProxyType({
        "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
        "chatgpt": "assistant", "function_call": "tool", "observation": "tool", "tool": "tool",
    }),
)  # fmt: skip
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")


class ShareGPT(ConversationFormat):
    """`{"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, …]}`, optionally with a `"system"`."""

    form = '"conversations" of "from" and "value"'

    def fits(self, record: Mapping[str, Any]) -> bool:
        return "conversations" in record and not (("chosen" in record and "rejected" in record) or is_aloe(record))

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        system = text_of(record, "system").strip() if "system" in record else ""
        messages = kept([_marked(message) for message in messages_of(record, "conversations", keys=_KEYS)])
        return [Message("system", system), *messages] if system else messages


def _marked(message: Message) -> Message:
    return (
        replace(message, defect=NO_TEXT)
        if any(placeholder in message.text for placeholder in _PLACEHOLDERS)
        else message
    )
