"""Small conversation records with invented texts, and helpers to read and display them."""

from __future__ import annotations

from typing import Any

from personaplug.data.conversations import ConversationReader, open_conversations
from personaplug.data.records import HistoryItem, Sample

SECRET = "zanzibar"


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def chat(*texts: str, who: str = "ann", **more: Any) -> dict[str, Any]:
    """Return an OpenAI record with alternating messages of user and assistant."""
    roles = (user, assistant)
    return {"user": who, "messages": [roles[place % 2](text) for place, text in enumerate(texts)], **more}


def reader_of(*records: Any, **settings: Any) -> ConversationReader:
    return open_conversations([list(records)], **settings)


def read(*records: Any, **settings: Any) -> list[Sample]:
    return list(reader_of(*records, **settings))


def told(item: HistoryItem) -> tuple[str, ...]:
    """Return the kind and the texts of an item."""
    return (item.kind, *(text for _, text in item.fields))


def histories(samples: list[Sample]) -> dict[str, list[str]]:
    """Return the answers in the history of each sample, by the sample's target."""
    return {str(sample.target): [item.fields[-1][1] for item in sample.history] for sample in samples}
