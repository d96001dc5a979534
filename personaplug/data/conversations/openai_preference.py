"""OpenAI's lines for preference fine-tuning: a prompt, the answer that was preferred, and one that was not."""

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
        asked = value_of(record, "input")
        if not isinstance(asked, Mapping):
            raise Flaw("its 'input' is not an object with 'messages'")
        preferred, other = (messages_of(record, key) for key in ("preferred_output", "non_preferred_output"))
        return paired(messages_of(asked, "messages"), preferred, other)
