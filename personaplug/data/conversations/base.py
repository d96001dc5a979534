"""The base class of conversation formats. A format recognizes its records and converts them to messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from personaplug.data.conversations.messages import Message


class ConversationFormat(ABC):
    """A format of records with one conversation each.

    Attributes:
        form: the keys of a record, for error messages.
        has_users: False if records usually name no users. Each record without a user then counts as a separate user,
            and the history of a turn consists of the earlier turns of its conversation.
    """

    form: ClassVar[str]
    has_users: ClassVar[bool] = True

    @abstractmethod
    def fits(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has this format. No record fits two formats."""

    @abstractmethod
    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """Return the messages of a record that fits; raise Flaw if it is broken."""
