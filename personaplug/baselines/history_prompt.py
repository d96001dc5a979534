"""Texts of a history in a prompt: retrieved items, or what was written of the user, within a budget of tokens.

The wordings are the task's (LaMP's for its own tasks). Users' texts are put into them piece by piece and are never
read as templates. The input itself is never cut here: where not a single item fits beside it, the prompt stays bare
and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from personaplug.data.records import HistoryItem
from personaplug.data.task import Task, template_parts
from personaplug.llm.base import LanguageModel

_FEWEST = 8  # tokens of an item's content that still say something of it
_KEPT = 1 << 13  # items whose measures are remembered
_NOTE = template_parts("About this user: {history}. {input}")


@dataclass(frozen=True, repr=False)
class Written:
    """A prompt with texts of a history in it.

    Attributes:
        prompt: the whole of it.
        soft_at: how many characters stand in front of the input's text, where soft tokens go.
        offered: how many texts were to be written.
        written: how many of them are in the prompt.
        shortened: how many of these are not there in full.
    """

    prompt: str
    soft_at: int
    offered: int
    written: int
    shortened: int


@dataclass(frozen=True, repr=False)
class _Item:
    """An item's wording and its measures.

    Attributes:
        parts: (text in front, name of a field) pairs, then the text at the end with no field.
        values: of the fields.
        contents: tokens of each field that may be shortened.
        full: tokens of the whole.
        frame: tokens of it without its contents.
    """

    parts: tuple[tuple[str, str | None], ...]
    values: dict[str, str]
    contents: dict[str, int]
    full: int
    frame: int

    @property
    def least(self) -> int:
        """Tokens below which it says too little of itself."""
        return self.frame + min(self.full - self.frame, _FEWEST)


class HistoryWriter:
    """Puts texts of a history into prompts so that the language model's limit never cuts the input.

    Args:
        task: how an item, and a prompt with items, are worded.
        backend: counts and cuts in tokens of the model that reads the prompt.
        history_tokens: most tokens of a prompt that are texts of the history; 0 = all that the input leaves.
    """

    def __init__(self, task: Task, llm: LanguageModel, *, history_tokens: int = 0) -> None:
        self.task, self.llm, self.history_tokens = task, llm, history_tokens
        self._around = template_parts(task.history_template)
        self._measured = lru_cache(maxsize=_KEPT)(self._measure)
        self._joint = llm.count_tokens([task.item_joint])[0]

    def write(self, prompt: str, items: Sequence[HistoryItem]) -> Written:
        """Put items into a prompt.

        Each item gets an equal share of the room, and what short ones leave of theirs. Contents are shortened at their
        end; the user's answers and the words around them stay whole. Where shares get too small to say anything the
        last items are left out, and so is one that no room would be enough for.

        Args:
            prompt: the task's input.
            items: best first.
        """
        after = self._place_in(prompt)
        left = self._left(self._composed(prompt, "", after=after)) if items else 0
        while left > 0:
            texts, shortened = self._fitting(items, left)
            if not texts:
                break
            history = self.task.item_joint.join(texts)
            made = self._composed(prompt, history, after=after)
            over = self._excess(made, history)
            if over <= 0:
                return Written(*made, offered=len(items), written=len(texts), shortened=shortened)
            left -= over  # parts of a text may be fewer tokens each than together
        return Written(prompt, 0, offered=len(items), written=0, shortened=0)

    def write_note(self, prompt: str, note: str, *, soft_at: int = 0) -> Written:
        """Put what was written of the user in front of a prompt, cut where it is too long; a blank one adds nothing.

        Args:
            prompt: kept whole; it may have items in it already.
            note: sentences about the user.
            soft_at: where soft tokens go in the prompt as it is.
        """
        note = _without_stop(note)
        if not note:
            return Written(prompt, soft_at, offered=0, written=0, shortened=0)
        whole = self.llm.count_tokens([note])[0]
        left = min(whole, self._left(self._noted(prompt, "", soft_at=soft_at)))
        while left >= min(whole, _FEWEST):
            kept = note if left >= whole else _without_stop(self.llm.cut_text(note, left))
            made = self._noted(prompt, kept, soft_at=soft_at)
            over = self._excess(made, kept)
            if over <= 0:
                return Written(*made, offered=1, written=1, shortened=int(kept != note))
            left -= over
        return Written(prompt, soft_at, offered=1, written=0, shortened=0)

    def _noted(self, prompt: str, note: str, *, soft_at: int) -> tuple[str, int]:
        made, ahead = _filled(_NOTE, history=note, input=prompt)
        return made, ahead + soft_at

    def _place_in(self, prompt: str) -> int:
        """Behind which character of the input the items go; 0 where they go around it."""
        word = self.task.history_after
        found = prompt.find(word) if word else -1
        return found + len(word) if found >= 0 else 0

    def _composed(self, prompt: str, history: str, *, after: int) -> tuple[str, int]:
        """A prompt with items in it, and where its soft tokens go."""
        if not after:
            return _filled(self._around, history=history, input=prompt)
        return prompt[:after] + self.task.item_joint + history + prompt[after:], 0

    def _left(self, bare: tuple[str, int]) -> int:
        """How many tokens the texts may have in a prompt that has none of them yet."""
        left = self.llm.max_text_tokens - self._tokens(bare)
        return min(left, self.history_tokens) if self.history_tokens else left

    def _excess(self, made: tuple[str, int], history: str) -> int:
        """By how many tokens a prompt is too long, or its history is."""
        over = self._tokens(made) - self.llm.max_text_tokens
        if not self.history_tokens:
            return over
        return max(over, self.llm.count_tokens([history])[0] - self.history_tokens)

    def _tokens(self, made: tuple[str, int]) -> int:
        """Tokens of a prompt, the more of both ways to read it: in one piece, and with soft tokens in between."""
        prompt, soft_at = made
        if not soft_at:
            return self.llm.count_tokens([prompt])[0]
        whole, before, behind = self.llm.count_tokens([prompt, prompt[:soft_at], prompt[soft_at:]])
        return max(whole, before + behind)

    def _fitting(self, items: Sequence[HistoryItem], left: int) -> tuple[list[str], int]:
        """The items' texts that fit into so many tokens, joints included, and how many of them are shortened."""
        chosen: list[_Item] = []
        least = 0
        for item in map(self._measured, items):
            if item.least > left:
                continue
            least += item.least + (self._joint if chosen else 0)
            if least > left:
                break
            chosen.append(item)
        room = left - self._joint * (len(chosen) - 1)
        shares = _shares([item.full for item in chosen], least=[item.least for item in chosen], room=room)
        made = [self._text(item, share) for item, share in zip(chosen, shares, strict=True)]
        return [text for text, _ in made], sum(cut for _, cut in made)

    def _text(self, item: _Item, share: int) -> tuple[str, bool]:
        """An item's text in so many tokens, and whether it was shortened."""
        if share >= item.full:
            return _worded(item.parts, item.values), False
        sizes = list(item.contents.values())
        rooms = _shares(sizes, least=[0] * len(sizes), room=share - item.frame)
        kept = {
            name: item.values[name] if size <= room else self.llm.cut_text(item.values[name], room)
            for (name, size), room in zip(item.contents.items(), rooms, strict=True)
        }
        return _worded(item.parts, item.values | kept), any(kept[name] != item.values[name] for name in kept)

    def _measure(self, item: HistoryItem) -> _Item:
        fields = dict(item.fields)
        parts = _parts_of(self.task.item_template) if self.task.item_template else _parts_as_text(item)
        shown = list(dict.fromkeys(name for _, name in parts if name is not None))
        values = {name: fields.get(name, "") for name in shown}
        contents = [name for name in shown if name != self.task.answer_field] or shown
        frame = _worded(parts, values | dict.fromkeys(contents, ""))
        full, bare, *sizes = self.llm.count_tokens(
            [_worded(parts, values), frame, *(values[name] for name in contents)]
        )
        return _Item(parts, values, dict(zip(contents, sizes, strict=True)), full=full, frame=bare)


def _shares(wanted: Sequence[int], *, least: Sequence[int], room: int) -> list[int]:
    """Divide a room equally: nobody gets more than is wanted or less than its least, and nothing lies idle.

    Args:
        wanted: the most that each can use.
        least: together no more than the room.
    """

    def given(share: int) -> list[int]:
        return [min(most, max(share, few)) for most, few in zip(wanted, least, strict=True)]

    low, high = 0, max(room, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(given(middle)) <= room else (low, middle - 1)
    shares = given(low)
    spare = max(room - sum(shares), 0)  # less than one for each that wants more: the first ones get it
    for place, most in enumerate(wanted):
        more = min(spare, 1, most - shares[place])
        shares[place], spare = shares[place] + more, spare - more
    return shares


def _parts_of(template: str) -> tuple[tuple[str, str | None], ...]:
    *pieces, end = template_parts(template)
    return (*zip(pieces[::2], pieces[1::2], strict=True), (end, None))


def _parts_as_text(item: HistoryItem) -> tuple[tuple[str, str | None], ...]:
    """The parts of `HistoryItem.text`."""
    return tuple((f"{' ' if place else ''}{name}: ", name) for place, (name, _) in enumerate(item.fields))


def _worded(parts: Sequence[tuple[str, str | None]], values: dict[str, str]) -> str:
    return "".join(before + (values[name] if name is not None else "") for before, name in parts)


def _filled(around: Sequence[str], *, history: str, input: str) -> tuple[str, int]:
    """A template of `{history}` and `{input}` filled, and how many characters stand in front of the input."""
    pieces = [{"history": history, "input": input}[piece] if place % 2 else piece for place, piece in enumerate(around)]
    return "".join(pieces), sum(map(len, pieces[: 1 + 2 * around[1::2].index("input")]))


def _without_stop(note: str) -> str:
    """A note without the stop at its end, which the template sets."""
    return note.strip().rstrip(".").rstrip()
