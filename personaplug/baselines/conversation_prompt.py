"""Conversations with a user's history: exchanges as earlier turns, notes in the system message."""

from __future__ import annotations

from collections.abc import Sequence

from personaplug.baselines.history_prompt import (
    Draft,
    HistoryFormatter,
    HistoryPrompt,
    HistoryPromptFormatter,
    count_system_turns,
)
from personaplug.data.records import Chat, HistoryItem, Prompt, Turn, turns_of
from personaplug.data.task import Task
from personaplug.llm.base import LanguageModel


class ConversationFormatter(HistoryFormatter):
    """Shows items as earlier exchanges of the conversation, and notes in its system message."""

    def format(self, prompt: Prompt, items: Sequence[HistoryItem], *, soft_at: int = 0) -> HistoryPrompt:
        """Insert exchanges after the system messages, the best one last, next to the conversation's own messages.

        Exchanges that do not fit, or have no answer, are dropped.
        """
        bare_tokens, included = self._count_tokens((prompt, soft_at)), list[HistoryItem]()
        draft = prompt
        for item in items:
            longer = _with_exchanges(prompt, [item, *included])
            if item.answer and self._fits(self._count_tokens((longer, soft_at)), bare_tokens=bare_tokens):
                draft, included = longer, [item, *included]
        return HistoryPrompt(draft, soft_at, offered=len(items), included=len(included), shortened=0)

    def _fits(self, tokens: int, *, bare_tokens: int) -> bool:
        is_within_limit = not self.history_tokens or tokens - bare_tokens <= self.history_tokens
        return is_within_limit and tokens <= self.llm.max_text_tokens

    def with_note(self, prompt: Prompt, note: str, *, soft_at: int) -> Draft:
        return self.with_system_text(prompt, f"About this user: {note}.", soft_at=soft_at)


def open_formatter(task: Task, llm: LanguageModel, *, history_tokens: int = 0) -> HistoryFormatter:
    """Return the formatter that writes history texts into the prompts of a task."""
    kind = ConversationFormatter if task.kind == "chat" else HistoryPromptFormatter
    return kind(task, llm, history_tokens=history_tokens)


def _with_exchanges(prompt: Prompt, items: Sequence[HistoryItem]) -> Chat:
    """Return a conversation with items as exchanges before its own messages, in order."""
    turns = turns_of(prompt)
    start = count_system_turns(turns)
    return Chat((*turns[:start], *(turn for item in items for turn in _exchange(item)), *turns[start:]))


def _exchange(item: HistoryItem) -> tuple[Turn, Turn]:
    """Return the user's question and the kept answer, as turns."""
    question = "\n".join(value for name, value in item.fields if name != item.answer_name)
    return ("user", question), ("assistant", item.answer or "")
