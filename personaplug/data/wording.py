"""The wording of a task's prompts, learned from the prompts that a plug was trained on.

A marker such as "review: " also occurs in prompts that ask for something else. The text around the query shows whether
a prompt belongs to the task that the plug was trained for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.data.records import Options, last_message

_MAX_WORDINGS = 16  # different texts before the query in one data set
_MIN_PROMPTS = 5  # that must share a text before it counts as wording and not as a user's text
_MIN_QUERIES = 20  # different ones that must share a beginning or an end before it counts as wording


@dataclass(frozen=True)
class Wording:
    """The text around the query of a prompt: `opening`, any text, `lead`, query, `closing`.

    Attributes:
        opening: the beginning of every prompt.
        lead: the text right before the query.
        closing: the end of every prompt; it is part of the query that the encoder reads.
        is_fixed: True if `opening` is the whole text before the query.
    """

    opening: str = ""
    lead: str = ""
    closing: str = ""
    is_fixed: bool = False

    def opens(self, prompt: str) -> bool:
        """True if a prompt begins as this wording does, after any white space."""
        return prompt.lstrip().startswith(self.opening.lstrip())

    def matches(self, prompt: str, *, before: str) -> bool:
        """True if a prompt with the text `before` its query has this wording."""
        if self.is_fixed and before.lstrip() != self.opening.lstrip():
            return False
        ends = before.endswith(self.lead) and prompt.rstrip().endswith(self.closing.rstrip())
        return ends and self.opens(prompt)

    def without_closing(self, query: str) -> str:
        """Return the query without the closing, for a history item."""
        closing = self.closing.rstrip()
        return query.rstrip().removesuffix(closing) if closing else query

    @property
    def template(self) -> str:
        """The wording for people: `{query}` stands for the query, `{…}` for a text that varies."""
        before = self.opening if self.is_fixed or not self.lead else f"{self.opening}{{…}}{self.lead}"
        return f"{before}{{query}}{self.closing}"


def text_before(prompt: str, *, query: str, options: Options | None) -> str:
    """Return the text of a prompt before its query, or the question before its first option."""
    if options is not None:
        return options.question
    return prompt[: max(prompt.rfind(query), 0)]  # a query of several groups is not one substring


def learn_wordings(samples: Iterable[Any]) -> tuple[Wording, ...]:
    """Learn the wordings of training samples with a `prompt`, a `query` and `options`.

    If there are few different texts before the queries, each text is a wording. If the texts vary, the wording is their
    common beginning and end. Without samples, there is no wording.
    """
    prompts, counts = set[str](), Counter[str]()
    for sample in samples:
        prompt = last_message(sample.prompt)
        prompts.add(prompt)
        counts[text_before(prompt, query=sample.query, options=sample.options)] += 1
    if not counts:
        return ()
    is_common = min(counts.values()) >= _MIN_PROMPTS and len(counts) <= _MAX_WORDINGS
    if set(counts) == {""}:
        opening, closing = _affixes(prompts)
        return (Wording(opening, "", closing),)
    _, closing = _affixes(prompts)
    if len(counts) == 1 or is_common:
        return tuple(Wording(before, before, closing, is_fixed=True) for before in sorted(counts))
    if len(counts) < _MIN_QUERIES:
        return (Wording("", "", closing),)
    texts = list(counts)
    return (Wording(_whole_words(_common_beginning(texts)), _from_blank(_common_end(texts)), closing),)


def _affixes(prompts: set[str]) -> tuple[str, str]:
    """Return the common beginning and end of prompts in whole words; "" for few prompts, which agree by chance."""
    if len(prompts) < _MIN_QUERIES:
        return "", ""
    texts = list(prompts)
    return _whole_words(_common_beginning(texts)), _from_blank(_common_end(texts)).rstrip()


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all texts between them share this beginning
    return first[: next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _common_end(texts: Sequence[str]) -> str:
    return _common_beginning([text[::-1] for text in texts])[::-1]


def _from_blank(end: str) -> str:
    """Return an end from its first white space; the text before may be a part of a word."""
    return end[next((index for index, character in enumerate(end) if character.isspace()), len(end)) :]


def _whole_words(beginning: str) -> str:
    """Return a beginning up to its last white space or quotation mark; the text after may be a part of a word."""
    return beginning[: max((index + 1 for index, c in enumerate(beginning) if c.isspace() or c in "\"“'"), default=0)]
