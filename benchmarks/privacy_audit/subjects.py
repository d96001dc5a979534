"""Who and what the privacy audit looks at: users, their items, and the options under which vectors are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personaplug.data import open_dataset
from personaplug.data.records import Sample
from personaplug.encoders.embedding_store import Float16Array, RowIds
from personaplug.encoders.encoded_sample import EncodedSample, encoded
from personaplug.errors import ConfigError
from personaplug.plug.model import PersonaPlug
from personaplug.run import Models, Run, open_models

MIN_ITEMS = 6


@dataclass(frozen=True)
class Person:
    """A user: distinct items, as rows of the vectors, and questions with their histories, at least one.

    `labels` are the label ids of the items.
    """

    rows: RowIds
    labels: npt.NDArray[np.int16]
    samples: tuple[EncodedSample, ...]

    @property
    def longest(self) -> EncodedSample:
        return max(self.samples, key=lambda sample: len(sample.rows))


@dataclass(frozen=True)
class Option:
    """How vectors are kept and used."""

    name: str
    noise: float = 0.0  # expected length of the noise; an item's vector has length 1
    items: int = 0  # latest items of a history; 0 = all
    persona_scale: float = 1.0

    def vectors(self, stored: Float16Array, *, seed: int) -> Float16Array:
        """Return the vectors as they would be stored: noise once per item, then length 1 again."""
        values = stored.astype(np.float32)
        if self.noise:
            scale = self.noise / values.shape[1] ** 0.5
            values += np.random.default_rng([seed, 1]).normal(0, scale, values.shape).astype(np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        return values.astype(np.float16)

    def history(self, sample: EncodedSample) -> EncodedSample:
        return sample.latest(self.items) if self.items else sample


class Table:
    """Vectors as a personalizer reads them."""

    def __init__(self, vectors: Float16Array) -> None:
        self.vectors, self.width = vectors, int(vectors.shape[1])

    def gather(self, rows: RowIds) -> Float16Array:
        return self.vectors[rows]


@dataclass(frozen=True)
class Subjects:
    """The users of an audit, none of whom the plug has seen in training.

    Attributes:
        strangers: attacks are fitted on them.
        targets: attacks are measured on them.
        vectors: (R, E) as a store keeps them.
        texts: what the encoder read of each row.
        contents: the same without field names.
    """

    run: Run
    models: Models
    plug: PersonaPlug
    strangers: tuple[Person, ...]
    targets: tuple[Person, ...]
    vectors: Float16Array
    texts: dict[int, str]
    contents: dict[int, str]
    seed: int

    @cached_property
    def slice_(self) -> npt.NDArray[np.bool_]:
        """Which strangers an attack's settings are chosen on: every third."""
        return np.isin(np.arange(len(self.strangers)) % 3, 0)

    def texts_of(self, rows: Sequence[int] | RowIds) -> list[str]:
        return [self.texts[int(row)] for row in rows]

    def contents_of(self, rows: Sequence[int] | RowIds) -> list[str]:
        return [self.contents[int(row)] for row in rows]


def open_subjects(folder: Path, data: Path, *, users: int, seed: int) -> Subjects:
    """Read the users of a data set's dev split for a trained run; at most `users` strangers and as many targets."""
    run = Run.open(folder)
    models = open_models(run.config)
    if not run.task.has_labelled_items:
        raise ConfigError(f"The audit needs items with answers from a closed set; task {run.task.name} has none.")
    plug = run.load_plug("plug", seed=run.config.training.seeds[0], models=models)
    samples = [sample for sample in open_dataset(data, "dev", task=run.task) if len(sample.history) >= MIN_ITEMS]
    if seen := run.users_trained_on(sample.user_id for sample in samples):
        raise ConfigError(
            f"The plug was trained on {seen} of the users in {data}'s dev split. Train it on the train split of a data "
            f"set that `personaplug split` made."
        )
    names = np.random.default_rng(seed).permutation(sorted({sample.owner for sample in samples}))[: 2 * users]
    chosen = sorted((sample for sample in samples if sample.owner in set(names)), key=lambda sample: sample.owner)
    table = run.open_vectors(models.encoder)
    rows_of = encoded(chosen, table, plug=run.config.plug, labels=run.task.labels)
    pairs = list(zip(chosen, rows_of, strict=True))
    people = {owner: _person([row for _, row in own]) for owner, own in groupby(pairs, key=lambda pair: pair[0].owner)}
    ordered = [people[name] for name in names.tolist()]
    half = len(ordered) // 2
    vectors = table.gather(np.arange(len(table)))
    texts, contents = _texts(pairs, with_answer=run.config.plug.encodes_answers)
    return Subjects(
        *(run, models, plug, tuple(ordered[:half]), tuple(ordered[half : 2 * half])),
        *(vectors, texts, contents, seed),
    )


def _person(samples: list[EncodedSample]) -> Person:
    rows = np.concatenate([sample.rows for sample in samples])
    labels = np.concatenate([sample.label_ids for sample in samples])
    first = np.sort(np.unique(rows, return_index=True)[1])
    return Person(rows[first], labels[first], tuple(samples))


def _texts(
    pairs: Sequence[tuple[Sample, EncodedSample]], *, with_answer: bool
) -> tuple[dict[int, str], dict[int, str]]:
    texts, contents = dict[int, str](), dict[int, str]()
    for sample, encoded_sample in pairs:
        for row, item in zip(encoded_sample.rows.tolist(), sample.history, strict=True):
            texts[row] = item.text if with_answer else item.content
            contents[row] = " ".join(value for name, value in item.fields if name != item.answer_name)
    return texts, contents


def with_rows(sample: EncodedSample, indices: npt.ArrayLike) -> EncodedSample:
    """Return the sample with these items of its own history."""
    return sample.with_items_of(sample, np.asarray(indices, dtype=np.intp))


def with_history_of(sample: EncodedSample, other: EncodedSample) -> EncodedSample:
    """Return the sample's question behind another sample's history."""
    return sample.with_items_of(other, np.arange(len(other.rows)))


def with_item(sample: EncodedSample, index: int, *, row: int, label: int) -> EncodedSample:
    """Return the sample with another item in one place; its style stays."""
    rows, labels = sample.rows.copy(), sample.label_ids.copy()
    rows[index], labels[index] = row, label
    return replace(sample, rows=rows, label_ids=labels)
