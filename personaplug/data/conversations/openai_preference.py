"""OpenAI's format for preference fine-tuning: a prompt, a preferred answer, and a non-preferred answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import Message, messages_of, paired
from personaplug.data.parsing import Flaw, value_of


class OpenAIPreference(ConversationFormat):
    """`{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}`."""

    form = '"input", "preferred_output" and "non_preferred_output"'

    def fits(self, record: Mapping[str, Any]) -> bool:
        return "preferred_output" in record or "non_preferred_output" in record

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        prompt = value_of(record, "input")
        if not isinstance(prompt, Mapping):
            raise Flaw("its 'input' is not an object with 'messages'")
        preferred, rejected = (messages_of(record, key) for key in ("preferred_output", "non_preferred_output"))
        return paired(messages_of(prompt, "messages"), preferred, rejected)
