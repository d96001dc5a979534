"""The context of an evaluation: one split of a run, its models, and the history that each sample gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from personaplug.analysis.method_info import SHUFFLED, WRONG_USER, HistorySource
from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.config import EvaluationConfig, PlugConfig
from personaplug.data.records import ITEM_KINDS, HistoryItem, Sample
from personaplug.data.splits import drawn
from personaplug.data.task import Reader, Task
from personaplug.encoders.encoded_sample import EncodedSample, Int8Array, encoded, latest_items
from personaplug.encoders.strangers import strangers
from personaplug.errors import ConfigError, MissingData
from personaplug.llm.base import GenerationConfig
from personaplug.methods.costs import CostMeter
from personaplug.plug.model import PersonaPlug
from personaplug.run import Models, Run

T = TypeVar("T")

Indices = npt.NDArray[np.int64]

_TIMED_SAMPLES = 8
_KINDS_SHOWN = {"all": ITEM_KINDS, "answers": ("answer", "rejection"), "preferences": ("preference",)}


@dataclass(frozen=True)
class Assignment:
    """The history that one sample gets.

    Attributes:
        source: index of the sample whose history it is; None = no history.
        items: (n,) indices of the source's items, in order.
    """

    source: int | None
    items: Indices


class EvalContext:
    """One split of a run, with its models.

    Attributes:
        samples: the split's samples with their own histories.
        owners: the samples' users.
        decoding: `score` the labels or `generate` text.
    """

    def __init__(
        self, run: Run, reader: Reader, *, models: Models, config: EvaluationConfig, train: Reader | None = None
    ) -> None:
        """Read the split.

        Args:
            reader: the split.
            train: the training split; only needed for rows without a language model.
        """
        run.check_models(models)
        self.run, self.reader, self.models, self.config, self.train = run, reader, models, config, train
        self.decoding = _decoding(run.task, config)
        self.generation = GenerationConfig(
            max_new_tokens=config.max_new_tokens or run.task.max_new_tokens, num_beams=config.num_beams
        )
        self.embeddings = run.open_vectors(models.encoder)
        timed = list(
            islice(reader, _TIMED_SAMPLES)
        )  # before the split is read, so that the reader's report counts it once
        truncated = models.encoder.truncated
        self.samples = run.read_samples(reader, self.embeddings, limit=config.limit, seed=config.draw_seed)
        self.truncated_texts = models.encoder.truncated - truncated
        if not self.samples:
            raise MissingData("The split holds no samples.")
        self.owners = [sample.owner for sample in self.samples]
        self.history_sizes = [len(sample.rows) for sample in self.samples]
        self.prompt_lengths = models.llm.measure([sample.prompt for sample in self.samples])
        self.prompts = PromptBuilder(run, models, table=self.embeddings)
        self.costs = CostMeter(self.history_sizes, timed, encoder=models.encoder)
        self._samples_by_channel = {run.config.plug.answer_channel: self.samples}
        self._cache: dict[Any, Any] = {}
        self._plug: tuple[tuple[str, int], PersonaPlug] | None = None

    @property
    def task(self) -> Task:
        """The run's task."""
        return self.run.task

    @property
    def sampling(self) -> GenerationConfig:
        """The settings of sampled answers."""
        temperature = self.config.sample_temperature or 1.0
        return replace(
            self.generation, num_beams=1, do_sample=True, temperature=temperature, seed=self.config.draw_seed
        )

    @cached_property
    def texts(self) -> list[Sample]:
        """The samples with the texts of their histories, read on first use."""
        return list(drawn(self.reader, limit=self.config.limit, seed=self.config.draw_seed))

    @cached_property
    def shown_items(self) -> list[Indices]:
        """The indices of the items of each sample's history that rows may use."""
        kinds, latest = self.config.item_kinds, self.config.max_eval_history
        return [shown_items(sample.kind_ids, kinds, latest=latest) for sample in self.samples]

    @cached_property
    def training_texts(self) -> list[Sample]:
        """The training samples of the run with their texts."""
        if self.train is None:
            raise MissingData(
                "Rows without a language model are fitted on the training split, but none was given. Use "
                "data that has one."
            )
        samples = list(drawn(self.train, limit=self.run.config.training.train_limit, seed=0))
        if self.run.knows_its_data:
            rows = encoded(samples, self.embeddings, plug=self.run.config.plug, labels=self.run.item_labels)
            self.run.check_data(rows, self.embeddings)
        return samples

    def samples_for(self, plug: PlugConfig) -> list[EncodedSample]:
        """Return the samples encoded for a plug."""
        channel = plug.answer_channel
        if channel not in self._samples_by_channel:
            limit, seed = self.config.limit, self.config.draw_seed
            samples = self.run.read_samples(self.reader, self.embeddings, limit=limit, seed=seed, plug=plug)
            self._samples_by_channel[channel] = samples
        return self._samples_by_channel[channel]

    def assign(self, history: HistorySource, *, seed: int) -> list[Assignment]:
        """Assign a history to each sample; equal arguments give equal draws."""
        return assign_histories(history, self.owners, self.shown_items, seed=self.config.draw_seed + seed)

    @cached_property
    def shown_texts(self) -> list[Sample]:
        """The samples with the texts of the items that rows may use."""
        pairs = zip(self.texts, self.shown_items, strict=True)
        return [replace(text, history=tuple(text.history[index] for index in shown)) for text, shown in pairs]

    def assigned_items(self, assignments: Sequence[Assignment]) -> list[tuple[HistoryItem, ...]]:
        """Return the items of the histories that the samples get, with their texts."""
        return [
            () if a.source is None else tuple(self.texts[a.source].history[index] for index in a.items)
            for a in assignments
        ]

    def load_plug(self, name: str, *, seed: int) -> PersonaPlug:
        """Load a trained plug; the last one stays loaded."""
        if self._plug is None or self._plug[0] != (name, seed):
            self._plug = None  # free the memory before the next plug takes it
            self._plug = ((name, seed), self.run.load_plug(name, seed=seed, models=self.models))
        return self._plug[1]

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """Return a value that several rows and seeds share; it is computed on first use."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value


def shown_items(kinds: Int8Array, shown: str, *, latest: int) -> Indices:
    """Return the indices of the items of a history that rows may use, in order.

    Args:
        kinds: (N,) kinds of all items.
        shown: `item_kinds` of the config.
        latest: maximum number of items, which `latest_items` chooses; -1 = all.
    """
    indices = np.flatnonzero(np.isin(kinds, [ITEM_KINDS.index(kind) for kind in _KINDS_SHOWN[shown]]))
    return indices if latest < 0 else indices[latest_items(kinds[indices], latest)]


def assign_histories(
    history: HistorySource, owners: Sequence[str], shown: Sequence[Indices], *, seed: int
) -> list[Assignment]:
    """Assign a history to each of n samples. One assignment serves vectors, texts and weights alike.

    Args:
        history: whose history the samples get.
        owners: (n,) the samples' users.
        shown: (n,) indices of the items of the samples' own histories that rows may use.
        seed: seed of the drawn users and orders.
    """
    if history == "none":
        return [Assignment(None, np.empty(0, np.int64)) for _ in owners]
    sources = list(strangers(owners, seed=seed)) if history == WRONG_USER else range(len(owners))
    items = [shown[source] for source in sources]
    if history == SHUFFLED:
        items = [np.random.default_rng([seed, 5, k]).permutation(indices) for k, indices in enumerate(items)]
    return [Assignment(source, indices) for source, indices in zip(sources, items, strict=True)]


def with_assigned_items(samples: Sequence[EncodedSample], assignments: Sequence[Assignment]) -> list[EncodedSample]:
    """Return the samples with the rows and answers of the histories assigned to them."""
    return [
        sample.with_items_of(sample if a.source is None else samples[a.source], a.items)
        for sample, a in zip(samples, assignments, strict=True)
    ]


def _decoding(task: Task, config: EvaluationConfig) -> str:
    if config.decoding == "score" and not task.labels:
        raise ConfigError(f"decoding=score needs a task with labels; {task.name} has none. Use decoding=generate.")
    return ("score" if task.labels else "generate") if config.decoding == "auto" else config.decoding
