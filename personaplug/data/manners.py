"""Manners of an answer. Rules write them, and rules read them from any text, such as a model's output.

A manner is one dimension of style: length, layout, emoji, greeting, sign-off, contractions, casing, or the question at
the end. The content of the text does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from personaplug.data.contractions import contract, read_contractions

NONE, OTHER = "none", "other"
"""Values of a manner: the text has no such part; the text has a part that no simulated user has."""

ONE, SEVERAL = "one", "several"
PROSE, LIST = "prose", "list"
FULL, SHORT = "full", "short"
NORMAL, LOWER = "normal", "lower"

EMOJI = ("😀", "🎉", "🌻", "🚀", "👍")
GREETINGS = ("Hi there!", "Hello friend!", "Good day!", "Hola!", "Bonjour!")
SIGN_OFFS = ("Cheers!", "Take care!", "All the best!", "Happy to help!")
QUESTIONS = ("Does that help?", "Would you like more details?", "Shall I go on?")

SEVERAL_SENTENCES = 3
"""The number of sentences of an answer whose length is "several"."""


@dataclass(frozen=True)
class Manners:
    """The style of a user. The dimensions are independent, but one sentence is always prose.

    Attributes:
        length: "one" sentence, or "several" (three).
        layout: "prose", or a "list" with a line for each sentence.
        emoji: the emoji after the last sentence, or "none".
        greeting: the words of the greeting, or "none".
        sign_off: the words of the sign-off, or "none".
        contractions: "full" ("do not") or "short" ("don't").
        casing: "normal" or "lower".
        question: the question to the user at the end, or "none".
    """

    length: str = SEVERAL
    layout: str = PROSE
    emoji: str = NONE
    greeting: str = NONE
    sign_off: str = NONE
    contractions: str = FULL
    casing: str = NORMAL
    question: str = NONE

    def apply(self, sentences: Sequence[str]) -> str:
        """Write an answer from three neutral sentences; the first one must be a complete answer."""
        body = list(sentences[: 1 if self.length == ONE else SEVERAL_SENTENCES])
        if self.emoji != NONE:
            body[-1] += f" {self.emoji}"
        is_list = self.layout == LIST and len(body) > 1
        lines = [f"- {sentence}" for sentence in body] if is_list else body
        parts = [part for part in (self.greeting, *lines, self.question, self.sign_off) if part != NONE]
        text = ("\n" if is_list else " ").join(parts)
        text = contract(text) if self.contractions == SHORT else text
        return text.lower() if self.casing == LOWER else text


VALUES: Mapping[str, tuple[str, ...]] = {
    "length": (ONE, SEVERAL),
    "layout": (PROSE, LIST),
    "emoji": (NONE, *EMOJI),
    "greeting": (NONE, *GREETINGS),
    "sign_off": (NONE, *SIGN_OFFS),
    "contractions": (FULL, SHORT),
    "casing": (NORMAL, LOWER),
    "question": (NONE, *QUESTIONS),
}
"""The values of each dimension for simulated users."""

DIMENSIONS = tuple(field.name for field in fields(Manners))

_MARK = re.compile(r"\s*(?:[-*+•◦▪‣·–—]|\(?\d{1,2}[.):])\s+")
_SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<=[.!?…])[\"”')*_]*\s+", re.IGNORECASE)
_EMOJI = re.compile("[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55]")
_EMOJI_JOINTS = re.compile("[\ufe0e\ufe0f\u200d\U0001f3fb-\U0001f3ff]")
_WORD = re.compile(r"[^\W\d_]+")
_OTHER_GREETING = re.compile(
    r"(?:hi|hello|hey|dear|greetings|welcome|howdy|salut|ciao|hallo|good (?:morning|afternoon|evening))\b"
)
_OTHER_SIGN_OFF = re.compile(
    r"(?:(?:best|kind|warm) (?:regards|wishes)|regards|sincerely|yours|thanks|thank you|good luck|goodbye|bye|see you"
    r"|enjoy|have (?:a|an) (?:great|nice|good|lovely|wonderful))\b"
)
_MAX_ADDED_WORDS = 2  # after a greeting or a sign-off, such as a name


def read_manners(text: str) -> dict[str, str | None]:
    """Return the value of each dimension in a text; None if the text does not show the dimension.

    A list has at least two lines with a bullet or a number. Greeting, sign-off and the question at the end do not count
    as sentences of the answer. If there are several emoji, the first one counts.
    """
    if not _WORD.search(text):
        return dict.fromkeys(DIMENSIONS)
    lines = [line for line in _EMOJI.sub(" ", _EMOJI_JOINTS.sub("", text)).splitlines() if line.strip()]
    is_list = sum(_MARK.match(line) is not None for line in lines) > 1
    sentences = [sentence for line in lines for sentence in _sentences(line)]
    greeting = _take_greeting(sentences)
    sign_off, question = _take_closing(sentences)
    return {
        "length": None if not sentences else ONE if len(sentences) == 1 else SEVERAL,
        "layout": LIST if is_list else PROSE if len(sentences) > 1 else None,
        "emoji": _emoji_of(text),
        "greeting": greeting,
        "sign_off": sign_off,
        "contractions": read_contractions(text),
        "casing": _casing_of(text),
        "question": question,
    }


def manners_met(text: str, reference: str) -> dict[str, bool]:
    """Return whether the text has the same value as the reference, for each dimension that the reference shows."""
    values = read_manners(text)
    return {name: values[name] == value for name, value in read_manners(reference).items() if value is not None}


def share_met(text: str, reference: str) -> float:
    """Return the share of the reference's manners that the text also has; 1 if the reference shows none."""
    met = manners_met(text, reference)
    return sum(met.values()) / len(met) if met else 1.0


def _sentences(line: str) -> list[str]:
    """Split a line without its bullet into sentences; leave out sentences without a word."""
    return [part for part in _SENTENCE_END.split(_MARK.sub("", line, count=1).strip()) if _WORD.search(part)]


def _take_greeting(sentences: list[str]) -> str:
    """Return the greeting, and remove its sentence if the sentence contains nothing else."""
    words = _key(sentences[0])
    greeting = _value_or_other(words, GREETINGS, _OTHER_GREETING)
    length = len(_key(greeting).split()) if greeting in GREETINGS else 1
    if greeting != NONE and len(words.split()) <= length + _MAX_ADDED_WORDS:
        del sentences[0]
    return greeting


def _take_closing(sentences: list[str]) -> tuple[str, str]:
    """Remove the sign-off and the question at the end, in any order, and return both."""
    sign_off = question = NONE
    while sentences:
        last = sentences[-1]
        if sign_off == NONE and (candidate := _sign_off_of(last)) != NONE:
            sign_off = candidate
        elif question == NONE and last.rstrip("\"”')*_ ").endswith("?"):
            question = _matching_value(_key(last), QUESTIONS) or OTHER
        else:
            break
        sentences.pop()
    return sign_off, question


def _sign_off_of(sentence: str) -> str:
    words = _key(sentence)
    sign_off = _matching_value(words, SIGN_OFFS)
    is_short = len(words.split()) <= 4 + _MAX_ADDED_WORDS
    return sign_off or (_value_or_other(words, (), _OTHER_SIGN_OFF) if is_short else NONE)


def _matching_value(words: str, values: Sequence[str]) -> str | None:
    """Return the value that equals a sentence, ignoring case, punctuation and a name after it."""
    for value in values:
        key = _key(value)
        rest = words.removeprefix(key)
        if rest != words and rest[:1] in ("", " ") and len(rest.split()) <= _MAX_ADDED_WORDS:
            return value
    return None


def _value_or_other(words: str, values: Sequence[str], other: re.Pattern[str]) -> str:
    """Return the value that a sentence begins with, "other" if `other` matches it, or "none"."""
    match = next((value for value in values if f"{words} ".startswith(f"{_key(value)} ")), None)
    return match or (OTHER if other.match(words) else NONE)


def _key(sentence: str) -> str:
    return " ".join(_WORD.findall(sentence.lower()))


def _emoji_of(text: str) -> str:
    first = _EMOJI.search(text)
    if first is None:
        return NONE
    return first[0] if first[0] in EMOJI else OTHER


def _casing_of(text: str) -> str | None:
    if text.lower() == text.upper():
        return None
    return LOWER if text == text.lower() else NORMAL
