"""The turns of a conversation: a message of the user, the messages before it, and the reply that the user kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from personaplug.data.conversations.messages import Message
from personaplug.data.event_copies import Event, comparable, event_of
from personaplug.data.records import Turn

EMPTY = "turns with an empty message"
UNANSWERED = "messages without a reply"
UNASKED = "replies without a preceding message of the user"
PARTLY_JUDGED = "replies that were only partly judged"
NO_ALTERNATIVE = "rejected answers without text"
EQUAL = "rejected answers that equal the kept answer"

_JOINT = "\n\n"  # joins consecutive messages of one role, which many chat templates reject


@dataclass(frozen=True, slots=True, repr=False)
class Exchange:
    """A turn with a reply that the user kept.

    Attributes:
        messages: the texts of the conversation, which all its exchanges share; the first `place` texts precede the
            question.
        shown: the reply in the conversation.
        is_all_shown: True if the user saw the kept reply and the rejected answers, not only `shown`.
        asked_at: the time of the question.
        kept_at: the time of the reply.
        path: a hash of all messages up to the reply; equal for the same turn of the same conversation.
    """

    messages: Sequence[Turn]
    place: int
    question: str
    kept: str
    rejected: tuple[str, ...]
    shown: str
    is_all_shown: bool
    asked_at: datetime | None
    kept_at: datetime | None
    path: int

    @property
    def context(self) -> tuple[Turn, ...]:
        """The messages before the question."""
        return tuple(self.messages[: self.place])

    @property
    def event(self) -> Event:
        return event_of([self.question], self.kept, self.kept_at)


@dataclass(slots=True, repr=False)
class _Turn:
    """Consecutive messages of the user, and the other messages up to the next message of the user."""

    asked: list[Message] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)

    @property
    def question(self) -> str:
        return _joined(message.text for message in self.asked)

    @property
    def reply(self) -> str:
        return _joined(message.text for message in self.replies if message.role == "assistant")

    @property
    def judged(self) -> list[Message]:
        return [message for message in self.replies if message.verdict]

    def defect(self) -> str:
        """Return the reason why the turn cannot be a sample, or ""."""
        defect = next((message.defect for message in (*self.asked, *self.replies) if message.defect), "")
        if defect or not self.asked:
            return defect or UNASKED
        if not self.replies:
            return UNANSWERED
        if any(message.verdict is None for message in self.replies):
            return PARTLY_JUDGED
        return "" if self.question and self._kept and self.reply else EMPTY

    @property
    def is_context(self) -> bool:
        """True if there are replies, but no verdict on any reply."""
        return bool(self.replies) and not self.judged

    @property
    def _kept(self) -> str:
        return _joined(message.verdict.kept for message in self.replies if message.verdict)

    def texts(self) -> list[Turn]:
        """Return the context for later turns: question and reply, or a reply before any question, else nothing."""
        texts = [("user", self.question), ("assistant", self.reply)]
        return texts if self.question and self.reply else texts[1:] if self.reply and not self.asked else []

    def exchange(self, messages: Sequence[Turn], path: int, left_out: Counter[str]) -> Exchange:
        """Return the exchange; `messages` contains the texts before the turn, and grows afterwards."""
        kept, verdicts = self._kept, [message.verdict for message in self.replies if message.verdict]
        return Exchange(
            messages=messages,
            place=len(messages),
            question=self.question,
            kept=kept,
            rejected=_differing([text for verdict in verdicts for text in verdict.rejected], kept, left_out),
            shown=self.reply,
            is_all_shown=all(verdict.is_all_shown for verdict in verdicts),
            asked_at=self.asked[-1].moment,
            kept_at=self.replies[-1].moment,
            path=path,
        )


@dataclass(frozen=True, slots=True, repr=False)
class Conversation:
    """The exchanges of a record.

    Attributes:
        start: a hash of the first question and its reply; None without them.
        left_out: counts of turns that are not exchanges, by reason.
    """

    exchanges: tuple[Exchange, ...]
    start: int | None
    left_out: Counter[str]


def conversation_of(messages: Sequence[Message], *, moment: datetime | None) -> Conversation:
    """Split messages into turns. A message without a time has the time of the message before it or of the record."""
    exchanges: list[Exchange] = []
    texts: list[Turn] = []
    left_out: Counter[str] = Counter()
    start, path = None, 0
    for part in _parts(messages, moment):
        if isinstance(part, Message):
            texts += [("system", part.text)] if part.text else []
            continue
        for role, text in part.texts():
            path = hash((path, role, comparable(text)))
        start = path if start is None and part.texts() and part.asked else start
        if not part.is_context and (defect := part.defect()):
            left_out[defect] += 1
        elif not part.is_context:
            exchanges.append(part.exchange(texts, path, left_out))
        texts += part.texts()
    return Conversation(tuple(exchanges), start, +left_out)


def _parts(messages: Sequence[Message], moment: datetime | None) -> Iterator[Message | _Turn]:
    """Yield system messages and turns in order. A system message between question and reply precedes the turn."""
    turn = _Turn()
    for message in messages:
        moment = message.moment or moment
        if message.role in ("system", "user") and turn.replies:
            yield turn
            turn = _Turn()
        if message.role == "system":
            yield message
            continue
        timed = Message(message.role, message.text, moment, message.defect, message.verdict)
        (turn.asked if message.role == "user" else turn.replies).append(timed)
    if turn.asked or turn.replies:
        yield turn


def _differing(answers: Sequence[str], kept: str, left_out: Counter[str]) -> tuple[str, ...]:
    """Return the rejected answers that differ from the kept answer and from each other."""
    left_out[NO_ALTERNATIVE] += sum(not answer for answer in answers)
    left_out[EQUAL] += sum(answer == kept for answer in answers)
    return tuple(dict.fromkeys(answer for answer in answers if answer and answer != kept))


def _joined(texts: Iterator[str]) -> str:
    return _JOINT.join(text for text in texts if text)
