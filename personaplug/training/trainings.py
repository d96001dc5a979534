"""Trainings: the trainings of one run, which share models, item vectors and samples.

It skips finished parts and resumes stopped ones. A subclass of `TrainedPart` is one trained module.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.baselines.retrievers import Retrieval
from personaplug.config import PlugConfig
from personaplug.data.records import Sample
from personaplug.data.splits import drawn
from personaplug.data.task import Reader, Task
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, past_answers
from personaplug.infra.distributed import main_first, on_main
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.infra.training_facts import write_facts
from personaplug.run import Models, Run
from personaplug.training.batching import spaced, user_split
from personaplug.training.checkpointing import drop_states
from personaplug.training.objectives import Objective
from personaplug.training.trainer import FitReport, fit

logger = logging.getLogger(__name__)


class Trainings:
    """The trainings of one run.

    The constructor records the training data in the run, so that an evaluation can count users seen in training.

    Args:
        reader: the training split.
    Raises:
        RunConflict: if the run was started on other data.
    """

    def __init__(self, run: Run, reader: Reader, *, models: Models) -> None:
        run.check_models(models)
        self.run, self.reader, self.models = run, reader, models
        self._reported: set[Path] = set()
        self.label_priors: dict[tuple[str, str, int], dict[str, Tensor]] = {}  # fitted states, by kind, part and seed
        self.embeddings, self.samples = main_first(self._read)
        self.prompts = PromptBuilder(run, models, table=self.embeddings)

    def train(self, part: TrainedPart, *, seed: int) -> Path:
        """Train one part with one seed, unless it is already trained, and return its folder."""
        folder = self.run.plug_folder(part.name, seed=seed)
        if on_main(lambda: self.run.trained(part.name, seed=seed)):
            if folder not in self._reported:
                logger.info("%s (seed %d) is already trained", part.name, seed)
                self._reported.add(folder)
            return folder
        part.prepare(self, seed=seed)
        reset_peak_memory()
        facts = part.fit(self, seed=seed)
        on_main(lambda: write_facts(folder, facts, owner=self.run.owner(part.name, seed=seed)))
        on_main(lambda: drop_states(folder))
        self._reported.add(folder)
        return folder

    def fit(
        self, part: TrainedPart, objective: Objective, samples: Sequence[EncodedSample], *, seed: int
    ) -> dict[str, object]:
        """Run the training loop, and return the facts about it."""
        report: FitReport = fit(
            objective,
            samples=samples,
            config=self.run.config.training,
            seed=seed,
            folder=self.run.plug_folder(part.name, seed=seed),
            title=f"{part.name} (seed {seed})",
            owner=on_main(lambda: self.run.owner(part.name, seed=seed)),
            about=self.run.config,
        )
        return self.facts(report, objective.module, unit=objective.unit, seed=seed)

    def facts(self, report: FitReport, module: nn.Module, *, unit: str, seed: int) -> dict[str, object]:
        """Return the facts about the training of a module for `fit.json`."""
        facts = {"task": self.run.task.name, "seed": seed, "peak_memory_bytes": peak_memory()}
        return asdict(report) | facts | {"unit": unit, "parameters": _parameter_count(module)}

    def samples_for(self, plug: PlugConfig, *, retrieval: Retrieval | None, seed: int) -> list[EncodedSample]:
        """Return the training samples encoded for a plug; with `retrieval`, their prompts contain retrieved texts."""
        if retrieval is None and plug.answer_channel == self.run.config.plug.answer_channel:
            return self.samples
        limit, without_text = self.run.config.training.train_limit, 0

        def with_texts(sample: Sample) -> Sample:
            nonlocal without_text
            if retrieval is None:
                return sample
            prompted = self.prompts.with_retrieved(sample, retrieval, seed=seed)
            without_text += bool(sample.history) and prompted.full_prompt == sample.full_prompt
            return prompted

        samples = self.run.read_samples(self.reader, self.embeddings, limit=limit, plug=plug, rewrite=with_texts)
        if retrieval is not None and without_text:
            message = "%s: %d of %d training prompts have no room for an item"
            logger.warning(message, retrieval.name, without_text, len(samples))
        return samples

    def split(self, samples: Sequence[EncodedSample], *, seed: int) -> tuple[list[EncodedSample], list[EncodedSample]]:
        """Split samples into (train, held out), as the training loop with this seed does."""
        config = self.run.config.training
        return user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)

    def texts(self, count: int) -> list[Sample]:
        """Return `count` evenly spaced training samples with their texts; 0 = all."""
        return [sample for _, sample in self._texts(set(spaced(len(self.samples), count)))]

    def with_answers(self, samples: Sequence[EncodedSample], *, latest: int) -> list[EncodedSample]:
        """Return some of the training samples, in order, with the answers of their users' latest items."""
        chosen = {id(sample) for sample in samples}
        indices = {index for index, sample in enumerate(self.samples) if id(sample) in chosen}
        return [
            replace(self.samples[index], own_answers=past_answers(sample.history, latest=latest))
            for index, sample in self._texts(indices)
        ]

    def _texts(self, indices: Set[int]) -> Iterator[tuple[int, Sample]]:
        """Yield the training samples with these indices and their texts, in order."""
        samples = drawn(self.reader, limit=self.run.config.training.train_limit, seed=0)
        yield from ((index, sample) for index, sample in enumerate(samples) if index in indices)

    def _read(self) -> tuple[EmbeddingStore, list[EncodedSample]]:
        embeddings = self.run.open_vectors(self.models.encoder)
        samples = self.run.read_samples(self.reader, embeddings, limit=self.run.config.training.train_limit)
        self.run.check_data(samples, embeddings)
        return embeddings, samples


@dataclass(frozen=True)
class TrainedPart(ABC):
    """A module that is trained once per seed; several rows of a table may share it.

    Attributes:
        name: name of the folder in the run, also used in messages.
    """

    name: str

    def check(self, task: Task) -> None:  # noqa: B027  # an optional hook
        """Raise `ConfigError` if the task lacks what the training needs."""

    def check_run(self, run: Run, models: Models) -> None:  # noqa: B027  # an optional hook
        """Raise `ConfigError` if the run's settings or the language model do not allow the part."""

    def prepare(self, trainings: Trainings, *, seed: int) -> None:  # noqa: B027  # an optional hook
        """Train the parts that this one depends on, and free memory."""

    @abstractmethod
    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        """Train with one seed, save, and return the facts for `fit.json`, which marks the training as finished."""


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
