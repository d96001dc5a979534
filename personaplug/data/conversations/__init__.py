"""Open conversations by the name of their format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Unpack

from personaplug.data.conversations.aloe import Aloe
from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import present
from personaplug.data.conversations.openai_chat import OpenAIChat
from personaplug.data.conversations.openai_preference import OpenAIPreference
from personaplug.data.conversations.reader import MAX_SAMPLES_PER_USER, ConversationReader
from personaplug.data.conversations.sharegpt import ShareGPT
from personaplug.data.conversations.trl_preference import TRLPreference
from personaplug.data.record_files import DELIMITED_KINDS, kind_of, record_source
from personaplug.data.record_reader import Limits
from personaplug.data.records import PREFERENCE
from personaplug.errors import ConfigError, nearest

__all__ = ["FORMATS", "MAX_SAMPLES_PER_USER", "ConversationFormat", "ConversationReader"]
__all__ += ["holds_conversations", "open_conversations"]

_FIRST_RECORDS = 50

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
    """Open files or iterables of mappings with conversations. They may also contain stated preferences.

    Without `format`, the format of each record is detected.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"There is no format {format!r}; {nearest(format, FORMATS)}")
    formats = list(FORMATS.values()) if format is None else [FORMATS[format]]
    return ConversationReader(sources, formats, max_samples_per_user=max_samples_per_user, **limits)


def holds_conversations(path: Path) -> bool:
    """Return whether one of a file's first records is a conversation or a stated preference; other files are logs."""
    if kind_of(path) in DELIMITED_KINDS:
        return False
    records = (record for _, _, record in islice(record_source(path).read(()), _FIRST_RECORDS))
    return any(_is_conversation(present(record)) for record in records if isinstance(record, Mapping))


def _is_conversation(record: Mapping[str, object]) -> bool:
    has_format = any(format_.fits(record) for format_ in FORMATS.values())
    return has_format or (PREFERENCE in record and len(record) <= 4)  # others: at most a user, a time and an id
