"""TRL's conversational preference records (https://huggingface.co/docs/trl/dataset_formats)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import Message, messages_of, paired


class TRLPreference(ConversationFormat):
    """`{"prompt": […], "chosen": […], "rejected": […]}`, each a list of messages.

    If `chosen` does not begin with a reply, `chosen` and `rejected` contain the whole conversation. The prompt is then
    their common beginning.
    """

    form = '"prompt", "chosen" and "rejected"'

    def fits(self, record: Mapping[str, Any]) -> bool:
        return "chosen" in record and "rejected" in record

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        chosen, rejected = messages_of(record, "chosen"), messages_of(record, "rejected")
        if chosen and chosen[0].role != "assistant":
            shared = min(_shared(chosen, rejected), max(len(chosen) - 1, 0))
            return paired(chosen[:shared], chosen[shared:], rejected[shared:])
        return paired(messages_of(record, "prompt"), chosen, rejected)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Count the equal messages at the start."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    differing = (number for number, (one, other) in pairs if (one.role, one.text) != (other.role, other.text))
    return next(differing, min(len(chosen), len(rejected)))
