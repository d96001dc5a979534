"""Readers of conversations by the name of their format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from personaplug.data.conversations.aloe import Aloe
from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.openai_chat import OpenAIChat
from personaplug.data.conversations.openai_preference import OpenAIPreference
from personaplug.data.conversations.reader import MAX_SAMPLES_PER_USER, ConversationReader
from personaplug.data.conversations.sharegpt import ShareGPT
from personaplug.data.conversations.trl_preference import TRLPreference
from personaplug.data.record_reader import Limits
from personaplug.errors import ConfigError, nearest

__all__ = ["FORMATS", "MAX_SAMPLES_PER_USER", "ConversationFormat", "ConversationReader", "open_conversations"]

FORMATS: dict[str, ConversationFormat] = {
    "openai-chat": OpenAIChat(),
    "openai-preference": OpenAIPreference(),
    "trl-preference": TRLPreference(),
    "sharegpt": ShareGPT(),
    "aloe": Aloe(),
}


def open_conversations(
    sources: Sequence[object],
    *,
    format: str | None = None,
    max_samples_per_user: int = MAX_SAMPLES_PER_USER,
    **limits: Unpack[Limits],
) -> ConversationReader:
    """Open files of conversations, or iterables of mappings; lines with stated preferences may stand among them.

    Without the name of a format, each record tells its own.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"There is no format {format!r}; {nearest(format, FORMATS)}")
    formats = list(FORMATS.values()) if format is None else [FORMATS[format]]
    return ConversationReader(sources, formats, max_samples_per_user=max_samples_per_user, **limits)
