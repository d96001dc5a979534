"""EncodedSample: a sample whose history refers to rows of an embedding store. Training and evaluation use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

from personaplug.config import PlugConfig
from personaplug.data.label_set import LabelSet
from personaplug.data.records import ITEM_KINDS, HistoryItem, Options, Prompt, Sample
from personaplug.encoders.embedding_store import EmbeddingStore, Float16Array, RowIds
from personaplug.encoders.item_parts import named_by_question
from personaplug.encoders.style_features import StyleArray, style_features_of
from personaplug.errors import PartError
from personaplug.infra.progress import Progress

Int16Array = npt.NDArray[np.int16]
Int8Array = npt.NDArray[np.int8]

REJECTION_KIND, PREFERENCE_KIND = map(ITEM_KINDS.index, ("rejection", "preference"))

_label_set = lru_cache(maxsize=32)(LabelSet)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedHistory:
    """A user's items as input of a plug, oldest first.

    Attributes:
        vectors: (N, E) float16.
        label_ids: (N,) int16 index of each item's answer among the task's labels; -1 if the answer is not a label.
        style: (N, F) float16 style features of each item's answer; F = 0 if the plug does not use them.
        kind_ids: (N,) int8 index of each item's kind in ITEM_KINDS.
    """

    vectors: Float16Array
    label_ids: Int16Array
    style: StyleArray
    kind_ids: Int8Array

    def __len__(self) -> int:
        return len(self.label_ids)

    def select(self, items: RowIds | slice) -> Self:
        """Return the history with only these items, in the order of `items`."""
        return replace(
            self,
            vectors=self.vectors[items],
            label_ids=self.label_ids[items],
            style=self.style[items],
            kind_ids=self.kind_ids[items],
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} items)"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedSample:
    """A sample whose history refers to rows of an embedding store.

    Attributes:
        id, owner, user_id, query, target, soft_at, options, rejected: as in `Sample`.
        prompt: prompt with the messages before it.
        rows: (N,) row ids of the history's items, in order.
        label_ids, style, kind_ids: as in `EncodedHistory`.
        own_answers: the user's past answers, if a copy head reads them.
    """

    id: str
    owner: str
    user_id: str | None
    prompt: Prompt
    query: str
    target: str | None
    rows: RowIds
    label_ids: Int16Array
    style: StyleArray
    kind_ids: Int8Array
    soft_at: int = 0
    options: Options | None = None
    own_answers: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()

    def with_items_of(self, other: EncodedSample, indices: npt.NDArray[np.intp]) -> EncodedSample:
        """Return this query with these items of another sample's history."""
        return replace(
            self,
            rows=other.rows[indices],
            label_ids=other.label_ids[indices],
            style=other.style[indices],
            kind_ids=other.kind_ids[indices],
        )

    def without_items(self) -> EncodedSample:
        return self.latest(0)

    def without_preferences(self) -> EncodedSample:
        """Return this query without the stated preferences."""
        return self.with_items_of(self, np.flatnonzero(self.kind_ids != PREFERENCE_KIND))

    def latest(self, items: int) -> EncodedSample:
        """Return this query with at most `items` items; see `latest_items`."""
        return self.with_items_of(self, latest_items(self.kind_ids, items))

    def __repr__(self) -> str:
        return f"EncodedSample(id={self.id!r}, user_id={self.user_id!r}, items={len(self.rows)})"


def encode_samples(
    samples: Iterable[Sample],
    table: EmbeddingStore,
    *,
    labels: Sequence[str] = (),
    with_answer: bool = True,
    with_style: bool = False,
    progress: Callable[[int], None] | None = None,
    chunk: int = 4096,
) -> list[EncodedSample]:
    """Add the items of all histories to a store and return the samples in order, with row ids for items.

    Args:
        samples: may be a generator; only one chunk of the histories' texts is in memory.
        labels: labels of the task; empty for free text.
        with_answer: True = encode items with the user's answer (PPlug, Table 7).
        with_style: True = compute the style features of each answer.
        progress: called after each chunk with the number of items so far.
        chunk: number of items that are encoded and committed together; a sample is never split.
    """
    encoded: list[EncodedSample] = []
    done = 0
    for group in _groups(samples, chunk):
        texts = [item.encoded(with_answer=with_answer) for sample in group for item in sample.history]
        try:
            row_ids = table.add(texts, chunk=max(chunk, len(texts)))
        except PartError as error:
            raise named_by_question(error, group) from None
        ends = np.cumsum([len(sample.history) for sample in group])[:-1]
        encoded += [
            EncodedSample(
                *(sample.id, sample.owner, sample.user_id, sample.full_prompt, sample.query, sample.target),
                rows=rows.copy(),  # a view would keep the rows of the whole group in memory
                label_ids=label_ids(sample.history, labels),
                style=style_of_answers(sample.history) if with_style else no_style(len(rows)),
                kind_ids=kind_ids(sample.history),
                soft_at=sample.soft_at,
                options=sample.options,
                rejected=sample.rejected,
            )
            for sample, rows in zip(group, np.split(row_ids, ends), strict=True)
        ]
        done += len(texts)
        if progress:
            progress(done)
    return encoded


def encoded(
    samples: Iterable[Sample], table: EmbeddingStore, *, plug: PlugConfig, labels: Sequence[str] = ()
) -> list[EncodedSample]:
    """Encode samples for a plug, add missing items to the store, and show the progress."""
    with Progress("encode", total=None) as progress:

        def show_progress(done: int) -> None:
            progress.advance(done - progress.done)

        return encode_samples(
            samples,
            table,
            labels=labels,
            with_answer=plug.encodes_answers,
            with_style=plug.reads_style,
            progress=show_progress,
        )


def label_ids(items: Sequence[HistoryItem], labels: Sequence[str]) -> Int16Array:
    """Return the index of each item's answer among the labels, (N,) int16; see `LabelSet.index`.

    If an item has its own closed set of answers, its answer is matched within that set first.
    """
    task_labels = tuple(labels)
    return np.array([_label_id(item, task_labels) for item in items], dtype=np.int16)


def _label_id(item: HistoryItem, labels: tuple[str, ...]) -> int:
    own = item.answer_labels
    if own is None or own == labels:
        return _label_set(labels).index(item.answer)
    index = _label_set(own).index(item.answer)
    return index if index < 0 else _label_set(labels).index(own[index])


def kind_ids(items: Sequence[HistoryItem]) -> Int8Array:
    """Return the index of each item's kind in ITEM_KINDS, (N,)."""
    return np.array([ITEM_KINDS.index(item.kind) for item in items], dtype=np.int8)


def latest_items(kinds: Int8Array, limit: int) -> npt.NDArray[np.intp]:
    """Return the indices of the items of a history that are used, at most `limit`, in order.

    The latest stated preferences are used first, because people state a preference once and mean it for long. The
    latest other items fill the rest.
    """
    is_preference = kinds == PREFERENCE_KIND
    preferences = np.flatnonzero(is_preference)
    preferences = preferences[max(0, len(preferences) - limit) :]
    others = np.flatnonzero(~is_preference)
    others = others[max(0, len(others) - (limit - len(preferences))) :]
    return np.sort(np.concatenate([preferences, others]))


def all_answers(items: int = 0) -> Int8Array:
    """Return the kind ids of N items that are all answers, (N,)."""
    return np.zeros(items, dtype=np.int8)


def style_of_answers(items: Sequence[HistoryItem]) -> StyleArray:
    """Return the style features of each item's answer, (N, F), or of the whole item if it has no answer."""
    return style_features_of(item.text if item.answer_text is None else item.answer_text for item in items)


def past_answers(items: Sequence[HistoryItem], *, latest: int | None = None) -> tuple[str, ...]:
    """Return the non-empty answers of the latest items, in order; None = of all items."""
    chosen = items if latest is None else items[-latest:]
    return tuple(item.answer for item in chosen if item.answer)


def no_style(items: int = 0) -> StyleArray:
    """Return empty style features of N items, (N, 0)."""
    return np.empty((items, 0), dtype=np.float16)


def samples_fingerprint(samples: Sequence[EncodedSample], table: EmbeddingStore) -> str:
    """Return a hash of everything that training and predictions depend on, 16 hex digits.

    Items are hashed by their vectors, because row ids differ between stores of the same texts.
    """
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        prompt = sample.prompt if isinstance(sample.prompt, str) else sample.prompt.turns
        texts = json.dumps([sample.id, sample.owner, prompt, sample.query, sample.target, sample.soft_at])
        digest.update(texts.encode("ascii"))
        for answers in filter(None, (sample.own_answers, sample.rejected)):
            digest.update(json.dumps(answers).encode("ascii"))
        if sample.kind_ids.any():
            digest.update(sample.kind_ids.tobytes())
        for array in (sample.label_ids, sample.style, table.gather(sample.rows)):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _groups(samples: Iterable[Sample], items: int) -> Iterator[list[Sample]]:
    """Yield groups of consecutive samples with at least `items` items in total; the last group may have fewer."""
    group: list[Sample] = []
    count = 0
    for sample in samples:
        group.append(sample)
        count += len(sample.history)
        if count >= items:
            yield group
            group, count = [], 0
    if group:
        yield group
