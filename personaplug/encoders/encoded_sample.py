"""EncodedSample: a sample whose history is rows of a vector table; what training and evaluation keep in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

from personaplug.data.label_set import LabelSet
from personaplug.data.records import HistoryItem, Options, Sample
from personaplug.encoders.embedding_store import EmbeddingStore, Float16Array, RowIds
from personaplug.encoders.style_features import StyleArray, style_features_of

Places = npt.NDArray[np.int16]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedHistory:
    """A user's items as a plug takes them, oldest first.

    Attributes:
        vectors: (N, E) float16.
        answers: (N,) int16 place of each item's answer in the task's labels; -1 if it is none of them.
        forms: (N, F) float16 form of each item's answer; F = 0 where the plug does not read them.
    """

    vectors: Float16Array
    answers: Places
    forms: StyleArray

    def __len__(self) -> int:
        """Items in it (N)."""
        return len(self.answers)

    def select(self, items: RowIds | slice) -> Self:
        """The same with some of the items, in the order of their indices."""
        return replace(self, vectors=self.vectors[items], answers=self.answers[items], forms=self.forms[items])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} items)"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedSample:
    """A sample whose history is rows of a table: what training and evaluation keep in memory.

    Attributes:
        id, owner, user_id, prompt, query, target, soft_at, options: as in `Sample`.
        rows: (N,) int64 rows of the history's items, in the history's order.
        answers: (N,) int16 place of each item's answer in the task's labels; -1 if it is none of them.
        forms: (N, F) form of each item's answer; F = 0 where the plug does not read them.
        own_answers: the answers in a history whose phrases are mixed into what the model says; none elsewhere.
    """

    id: str
    owner: str
    user_id: str | None
    prompt: str
    query: str
    target: str | None
    rows: RowIds
    answers: npt.NDArray[np.int16]
    forms: StyleArray
    soft_at: int = 0
    options: Options | None = None
    own_answers: tuple[str, ...] = ()

    def with_items_of(self, other: EncodedSample, places: npt.NDArray[np.intp]) -> EncodedSample:
        """The same question beside some of the items of a history, in the order of `places`."""
        return replace(self, rows=other.rows[places], answers=other.answers[places], forms=other.forms[places])

    def without_items(self) -> EncodedSample:
        """The same question of a user without any history."""
        return self.latest(0)

    def latest(self, items: int) -> EncodedSample:
        """The same with so many of the latest items, if there are more."""
        return self.with_items_of(self, np.arange(max(0, len(self.rows) - items), len(self.rows)))

    def __repr__(self) -> str:
        return f"EncodedSample(id={self.id!r}, user_id={self.user_id!r}, items={len(self.rows)})"


def encode_samples(
    samples: Iterable[Sample],
    table: EmbeddingStore,
    *,
    labels: Sequence[str] = (),
    with_answer: bool = True,
    with_forms: bool = False,
    progress: Callable[[int], None] | None = None,
    batch_size: int = 64,
    chunk: int = 4096,
) -> list[EncodedSample]:
    """Put the items of all histories into a table and return the samples with rows in their place.

    One pass: `samples` may be a generator, and of the histories' texts only a chunk is in memory at a time.

    Args:
        samples: in any order, which is kept.
        table: gets what it lacks.
        labels: the task's closed set of answers, if it has one.
        with_answer: encode the item with the user's answer (the paper's Table 7), else without.
        with_forms: note the form of each answer too.
        progress: called after each chunk with the number of items done so far.
        batch_size: texts that the encoder takes at once.
        chunk: items that are read, encoded and committed together (a sample is never split).
    Raises:
        UserError, StorageError: as `EmbeddingStore.add`.
    """
    encoded: list[EncodedSample] = []
    done = 0
    for group in _groups(samples, chunk):
        texts = [item.encoded(with_answer=with_answer) for sample in group for item in sample.history]
        rows = table.add(texts, batch_size=batch_size, chunk=max(chunk, len(texts)))
        ends = np.cumsum([len(sample.history) for sample in group])[:-1]
        histories = zip(group, np.split(rows, ends), strict=True)
        encoded += [_encoded_sample(sample, own, labels=labels, with_forms=with_forms) for sample, own in histories]
        done += len(texts)
        if progress:
            progress(done)
    return encoded


def label_ids(items: Sequence[HistoryItem], labels: Sequence[str]) -> Places:
    """Where each item's answer stands among the labels, (N,) int16; see `LabelSet.index`."""
    closed = _closed_answers(tuple(labels))
    return np.array([closed.index(item.answer) for item in items], dtype=np.int16)


def style_of_answers(items: Sequence[HistoryItem]) -> StyleArray:
    """The form of each item's answer, (N, F); of the whole item where it has none."""
    return style_features_of(item.text if item.answer is None else item.answer for item in items)


def past_answers(items: Sequence[HistoryItem], *, latest: int) -> tuple[str, ...]:
    """The answers in so many of the latest items of a history, in order, without those that hold none."""
    return tuple(item.answer for item in items[-latest:] if item.answer)


def no_style(items: int = 0) -> StyleArray:
    """What stands for the forms of so many items where they are not read, (N, 0)."""
    return np.empty((items, 0), dtype=np.float16)


def samples_fingerprint(samples: Sequence[EncodedSample], table: EmbeddingStore) -> str:
    """16 hex digits from everything that answers and training depend on: texts asked and wanted, items and answers.

    Items count by their vectors, since row numbers mean nothing once a table is made anew.
    """
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        words = json.dumps([sample.id, sample.owner, sample.prompt, sample.query, sample.target, sample.soft_at])
        digest.update(words.encode("ascii"))
        if sample.own_answers:
            digest.update(json.dumps(sample.own_answers).encode("ascii"))
        digest.update(sample.answers.tobytes())
        digest.update(sample.forms.tobytes())
        digest.update(table.gather(sample.rows).tobytes())
    return digest.hexdigest()


_closed_answers = lru_cache(maxsize=8)(LabelSet)  # asked for sample by sample


def _encoded_sample(sample: Sample, rows: RowIds, *, labels: Sequence[str], with_forms: bool) -> EncodedSample:
    return EncodedSample(
        id=sample.id,
        owner=sample.owner,
        user_id=sample.user_id,
        prompt=sample.prompt,
        query=sample.query,
        target=sample.target,
        rows=rows.copy(),  # a slice would keep the whole group's rows
        answers=label_ids(sample.history, labels),
        forms=style_of_answers(sample.history) if with_forms else no_style(len(rows)),
        soft_at=sample.soft_at,
        options=sample.options,
    )


def _groups(samples: Iterable[Sample], items: int) -> Iterator[list[Sample]]:
    """Runs of samples with about so many items together; the last may be short."""
    group: list[Sample] = []
    held = 0
    for sample in samples:
        group.append(sample)
        held += len(sample.history)
        if held >= items:
            yield group
            group, held = [], 0
    if group:
        yield group
