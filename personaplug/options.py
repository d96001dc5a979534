"""Options in a prompt: labels that are markers such as [1], the texts behind them, the question in front of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from personaplug.records import Options


class OptionFinder:
    """Finds options behind a task's labels: each label once, in order, with a colon, a point or a bracket behind it.

    Args:
        prompts: of the training split; the words with which the questions of all of them begin and end are their
            wording, and are left out of every question.
        labels: the markers.

    Attributes:
        everywhere: whether each of these prompts has something to choose from behind its markers.
    """

    def __init__(self, prompts: Sequence[str], labels: Sequence[str]) -> None:
        self._markers = [re.compile(rf"(?<!\w){re.escape(label)}[:.)]") for label in labels]
        self._first, self._last = 0, 0
        found = [self.find(prompt) for prompt in prompts]
        self.everywhere = len(labels) > 1 and bool(found) and all(one is not None and all(one.texts) for one in found)
        words = [one.question.split() for one in found if one is not None]
        self._first = _shared(words)
        self._last = _shared([told[self._first :][::-1] for told in words])

    def find(self, prompt: str) -> Options | None:
        """The options of a prompt, stripped; None where not all of the markers are in it."""
        parts, start = [], 0
        for marker in self._markers:
            match = marker.search(prompt, start)
            if match is None:
                return None
            parts.append(prompt[start : match.start()].strip())
            start = match.end()
        question, *texts = [*parts, prompt[start:].strip()]
        words = question.split()
        return Options(" ".join(words[self._first : len(words) - self._last]), tuple(texts))


def _shared(texts: Sequence[Sequence[str]]) -> int:
    """How many first words all of some texts have in common."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*texts, strict=False)))
