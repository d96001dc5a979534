"""Manners in words: sentences with which users state them, and instructions in a prompt that override them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from personaplug.data.manners import FULL, LIST, LOWER, NONE, NORMAL, ONE, PROSE, SEVERAL, SHORT, Manners

_FIXED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("length", ONE): (
        "Keep answers to one sentence.",
        "I want a single sentence, no more.",
        "Please be brief: one sentence is enough for me.",
    ),
    ("length", SEVERAL): (
        "Give me about three sentences.",
        "One sentence is too short for me; write three.",
        "I like answers with some detail, three sentences or so.",
    ),
    ("layout", PROSE): (
        "Write running text, not lists.",
        "Please do not use bullet points.",
        "I prefer a paragraph to a list.",
    ),
    ("layout", LIST): (
        "Give me a list with a line for each point.",
        "I like bullet points.",
        "Put every point on a line of its own, with a dash before it.",
    ),
    ("emoji", NONE): ("Do not use emoji.", "No emoji, please.", "I do not like emoji in answers."),
    ("greeting", NONE): (
        "Do not greet me.",
        "Skip the greeting and come to the point.",
        "Start with the answer, without a greeting.",
    ),
    ("sign_off", NONE): (
        "Do not end with a closing phrase.",
        "No sign-off at the end, please.",
        "Leave out wishes at the end.",
    ),
    ("contractions", FULL): (
        "Write full forms such as “do not”.",
        "Please do not use contractions.",
        "I prefer “it is” to “it's”.",
    ),
    ("contractions", SHORT): (
        "Use contractions such as “don't”.",
        "I like short forms, “it's” and not “it is”.",
        "Write as people talk, with “won't” and “can't”.",
    ),
    ("casing", NORMAL): (
        "Use capital letters as usual.",
        "Write with normal capital letters.",
        "Begin sentences with a capital letter.",
    ),
    ("casing", LOWER): (
        "Write everything in lower case.",
        "No capital letters, please.",
        "I like texts in small letters only.",
    ),
    ("question", NONE): (
        "Do not ask me anything at the end.",
        "Please do not end with a question.",
        "No questions back to me.",
    ),
}
_WITH_VALUE: Mapping[str, tuple[str, ...]] = {
    "emoji": ("End with the emoji {}.", "I like a {} after the last sentence.", "Please add {} to your answers."),
    "greeting": ("Start with “{}”.", "Greet me with “{}”.", "I like answers that begin with “{}”."),
    "sign_off": ("End with “{}”.", "Please sign off with “{}”.", "The last words should be “{}”."),
    "question": ("Ask me “{}” at the end.", "End by asking “{}”.", "I like to be asked “{}” after an answer."),
}


def stated(dimension: str, value: str) -> tuple[str, ...]:
    """Return several wordings of the preference for a manner."""
    fixed = _FIXED.get((dimension, value))
    return fixed or tuple(template.format(value) for template in _WITH_VALUE[dimension])


@dataclass(frozen=True)
class Instruction:
    """An instruction in a prompt that overrides the user's manners.

    Attributes:
        values: the manners that the instruction sets.
        wordings: several wordings; train uses all except the last one, which only the instructed sets use.
    """

    values: Mapping[str, str]
    wordings: tuple[str, ...]

    def contradicts(self, manners: Manners) -> bool:
        """Return whether the instruction changes these manners."""
        return any(getattr(manners, name) != value for name, value in self.values.items())

    def obeyed_by(self, manners: Manners) -> Manners:
        """Return these manners with the changes that the instruction demands."""
        return replace(manners, **self.values)


INSTRUCTIONS: Mapping[str, Instruction] = {
    "length": Instruction(
        {"length": ONE, "layout": PROSE},
        ("Answer in one sentence.", "Use a single sentence.", "One sentence only.", "Say it in just one sentence."),
    ),
    "layout": Instruction(
        {"length": SEVERAL, "layout": LIST},
        ("Answer as a list.", "Use bullet points.", "Give me a list.", "Write the answer as bullet points."),
    ),
    "emoji": Instruction(
        {"emoji": NONE},
        ("Do not use emoji.", "No emoji.", "Write without emoji.", "Please leave out emoji."),
    ),
    "casing": Instruction(
        {"casing": NORMAL},
        (
            "Write in full sentences with normal capital letters.",
            "Use normal capital letters.",
            "Begin each sentence with a capital letter.",
            "Use upper and lower case as usual.",
        ),
    ),
}
"""Instructions by the dimension that shows whether they were followed."""
