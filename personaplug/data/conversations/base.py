"""The base class of all formats of conversations. A format knows its records and turns them into messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from personaplug.data.conversations.messages import Message


class ConversationFormat(ABC):
    """A form of records that hold a conversation each.

    Attributes:
        form: the keys of a record, for people.
        has_users: False if records name no users as a rule. A record without a user then counts as a user of its
            own, and the history of a turn is the earlier turns of its own conversation.
    """

    form: ClassVar[str]
    has_users: ClassVar[bool] = True

    @abstractmethod
    def fits(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has this form. No record fits two formats."""

    @abstractmethod
    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """Return the messages of a record that fits; raise Flaw for one that is broken."""
