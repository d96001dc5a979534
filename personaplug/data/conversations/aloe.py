"""ALOE (arXiv 2410.03642): conversations with a preferred answer and rejected answers at every turn.

The repository ShujinWu-0814/ALOE draws at random which answer the user sees. The conversation continues from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import Message, Verdict, moment_of, present
from personaplug.data.parsing import Flaw, as_record, as_text, text_of, value_of

_ANSWERS = ("preferred", "rejected")


class Aloe(ConversationFormat):
    """`{"conversations": [{"user", "assistant": {"preferred", "rejected"}, "chosen": "preferred"}, …]}`.

    `rejected` is a text or a list of texts. `chosen` tells which answer the user saw: the preferred one or the first
    rejected one. The target of a turn is the preferred answer. A history item has the answer that the user saw. It is
    an exchange if that answer was the preferred one, else a rejection.

    The published conversations name no users, so the history of a turn consists of the earlier turns of its
    conversation. The first turn has no history.
    """

    form = '"conversations" of "user" and "assistant"'
    has_users = False

    def fits(self, record: Mapping[str, Any]) -> bool:
        return is_aloe(record)

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        messages = []
        for number, turn in enumerate(record["conversations"], 1):
            try:
                messages += _turn(present(as_record(turn)))
            except Flaw as flaw:
                raise Flaw(f"turn {number} of its 'conversations': {flaw}") from None
        return messages


def is_aloe(record: Mapping[str, Any]) -> bool:
    """Return whether the turns of a record's conversation have several answers."""
    turns = record.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "assistant" in turns[0]


def _turn(turn: Mapping[str, Any]) -> list[Message]:
    moment, answers = moment_of(turn), present(as_record(value_of(turn, "assistant")))
    preferred = text_of(answers, "preferred").strip()
    value = value_of(answers, "rejected")
    rejected = [as_text(text, "a rejected answer").strip() for text in (value if isinstance(value, list) else [value])]
    if (chosen := value_of(turn, "chosen")) not in _ANSWERS:
        raise Flaw("its 'chosen' is neither 'preferred' nor 'rejected'")
    if chosen == "rejected" and not rejected:
        raise Flaw("its 'chosen' is 'rejected', but there is no rejected answer")
    reply = preferred if chosen == "preferred" else rejected[0]
    verdict = Verdict(preferred, tuple(rejected), is_all_shown=False)
    question = Message("user", text_of(turn, "user").strip(), moment)
    return [question, Message("assistant", reply, moment, verdict=verdict)]
