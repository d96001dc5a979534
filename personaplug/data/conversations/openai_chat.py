"""OpenAI's format for fine-tuning a chat model, also used for chat logs. The user kept every reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import Message, kept, messages_of


class OpenAIChat(ConversationFormat):
    """`{"messages": [{"role", "content"}, …]}`; a reply with `"weight": 0` is only context."""

    form = '"messages"'

    def fits(self, record: Mapping[str, Any]) -> bool:
        return "messages" in record and "chosen" not in record

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        return kept(messages_of(record, "messages"))
