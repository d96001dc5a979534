"""Trained parts of a run: modules that are trained once per seed and serve all users.

This file has the soft tokens; `baseline_parts.py` has a LoRA and a retriever. `Trainings` trains the parts of one run,
which share models, item vectors and samples. It skips finished parts and resumes stopped ones.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.baselines.retrievers import Retrieval
from personaplug.config import PAPER, PlugConfig
from personaplug.data.records import Sample
from personaplug.data.splits import drawn
from personaplug.data.task import Reader, Task
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError, TrainingDiverged
from personaplug.infra.distributed import main_first, on_main, synchronized
from personaplug.infra.locks import sole_trainer
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.infra.training_facts import write_facts
from personaplug.llm.base import LanguageModel
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.run import Models, Run
from personaplug.training.batching import user_split
from personaplug.training.checkpointing import drop_states
from personaplug.training.cold_start import set_best_cold_start
from personaplug.training.label_prior_fit import LabelPriorFit
from personaplug.training.objectives import Objective, PlugObjective
from personaplug.training.preference_loss import PreferenceLoss
from personaplug.training.trainer import FitReport, fit, mean_loss

logger = logging.getLogger(__name__)

MAX_START_ANSWERS = 1024
"""Upper bound of the training answers whose tokens initialize the instruction tokens."""


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
        self._trained_now: set[Path] = set()
        self.embeddings, self.samples = main_first(self._read)
        self.prompts = PromptBuilder(run, models, table=self.embeddings)

    def train(self, part: TrainedPart, *, seed: int) -> Path:
        """Train one part with one seed, unless it is already trained, and return its folder."""
        folder = self.run.plug_folder(part.name, seed=seed)
        if on_main(lambda: self.run.trained(part.name, seed=seed)):
            if folder not in self._trained_now:
                logger.info("%s (seed %d) is already trained", part.name, seed)
            return folder
        part.prepare(self, seed=seed)
        reset_peak_memory()
        facts = part.fit(self, seed=seed)
        on_main(lambda: write_facts(folder, facts, owner=self.run.owner(part.name, seed=seed)))
        on_main(lambda: drop_states(folder))
        self._trained_now.add(folder)
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
        )
        return self.facts(report, objective, seed=seed)

    def facts(self, report: FitReport, objective: Objective, *, seed: int) -> dict[str, object]:
        """Return the facts about a training for `fit.json`."""
        facts = {"task": self.run.task.name, "seed": seed, "peak_memory_bytes": peak_memory()}
        return asdict(report) | facts | {"unit": objective.unit, "parameters": _parameter_count(objective.module)}

    def load_control(self, *, seed: int) -> PersonaPlug:
        """Load the trained control without a history."""
        return self.run.load_plug(INSTRUCTION.name, seed=seed, models=self.models)

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

    def texts(self, count: int) -> list[Sample]:
        """Return `count` evenly spaced training samples with their texts; 0 = all."""
        total = len(self.samples)
        indices = set(np.linspace(0, total - 1, num=min(count or total, total)).round().astype(int).tolist())
        samples = drawn(self.reader, limit=self.run.config.training.train_limit, seed=0)
        return [sample for index, sample in enumerate(samples) if index in indices]

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

    def prepare(self, trainings: Trainings, *, seed: int) -> None:  # noqa: B027  # an optional hook
        """Train the parts that this one depends on, and free memory."""

    @abstractmethod
    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        """Train with one seed, save, and return the facts for `fit.json`, which marks the training as finished."""


@dataclass(frozen=True)
class SoftPromptPart(TrainedPart):
    """Soft tokens from a plug.

    Attributes:
        retrieval: adds retrieved texts to the training prompts; None = bare prompts.
    """

    retrieval: Retrieval | None = None

    reads_items: ClassVar[bool] = True
    """Whether the soft tokens depend on the vectors of a user's items."""

    counts_labels: ClassVar[bool] = False
    """Whether the plug counts the labels in a user's past answers."""

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        """Return the config of this part's plug; `own` is the config of the run's plug."""
        return own

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        objective, samples = self.start(trainings, seed=seed)
        facts = trainings.fit(self, objective, samples, seed=seed)
        return self.save(objective, samples, trainings, facts=facts, seed=seed)

    def start(self, trainings: Trainings, *, seed: int) -> tuple[PlugObjective, list[EncodedSample]]:
        """Return the objective of an untrained plug, and its training samples."""
        run, models = trainings.run, trainings.models
        config = self.plug_config(run.config.plug)
        if config.label_prior != "none" and run.shared_labels is not None:
            raise ConfigError(
                f"{self.name} counts the labels of one task, but {run.folder} shares a plug with other tasks. "
                f"Train it in a run of one task."
            )
        # The main process goes first, because it may have to encode items.
        samples = main_first(lambda: trainings.samples_for(config, retrieval=self.retrieval, seed=seed))
        with synchronized():
            plug = build_plug(run, models, part=self, seed=seed)
            if plug.config.instruction_start == "words":
                _start_from_words(plug, samples, trainings.models, seed=seed)
            _fit_label_prior(plug, samples, trainings, seed=seed)
        objective = PlugObjective(
            plug,
            models.llm,
            table=trainings.embeddings,
            labels=closed_labels(run),
            preference=_preference_loss(run, models.llm),
        )
        return objective, samples

    def save(
        self,
        objective: PlugObjective,
        samples: Sequence[EncodedSample],
        trainings: Trainings,
        *,
        facts: dict[str, object],
        seed: int,
    ) -> dict[str, object]:
        """Complete and save the trained plug, and return all facts about its training."""
        run, plug = trainings.run, objective.personalizer.plug
        facts = facts | self._finish(plug, objective, samples, trainings, seed=seed)
        plug.training_facts = {key: value for key, value in facts.items() if key != "parameters"}
        on_main(lambda: plug.save_pretrained(run.plug_folder(self.name, seed=seed)))
        return facts

    def _finish(
        self,
        plug: PersonaPlug,
        objective: PlugObjective,
        samples: Sequence[EncodedSample],
        trainings: Trainings,
        *,
        seed: int,
    ) -> dict[str, object]:
        """Run the steps after the training loop, and return facts about them."""
        return {}


@dataclass(frozen=True)
class PlugPart(SoftPromptPart):
    """The run's own plug."""

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        if self.retrieval is None and trainings.run.shared_labels is not None:
            raise ConfigError(
                f"The plug of {trainings.run.folder} is shared with other tasks. Train it on the data of all "
                f"these tasks."
            )
        return super().fit(trainings, seed=seed)

    def prepare(self, trainings: Trainings, *, seed: int) -> None:
        """Train the control, whose tokens may serve users with few items; the plug does not require it."""
        if self._has_control(trainings.run):
            try:
                trainings.train(INSTRUCTION, seed=seed)
            except TrainingDiverged as error:
                logger.warning("The control diverged, so the plug is trained without it. %s", error)

    def _has_control(self, run: Run) -> bool:
        return self.retrieval is None and run.config.training.controls

    def _finish(
        self,
        plug: PersonaPlug,
        objective: PlugObjective,
        samples: Sequence[EncodedSample],
        trainings: Trainings,
        *,
        seed: int,
    ) -> dict[str, object]:
        """Choose the cold start: the soft tokens of users with few items."""
        run = trainings.run
        if not self._has_control(run) or not on_main(lambda: run.trained(INSTRUCTION.name, seed=seed)):
            return {}
        config = run.config.training
        _, held_out = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)
        with synchronized():
            control = trainings.load_control(seed=seed).instruction.detach()
        losses = set_best_cold_start(
            plug,
            control,
            held_out,
            mean_loss=lambda subset: mean_loss(objective, subset, max_tokens=config.max_tokens_per_microbatch),
        )
        return {"loss_of_few_items": losses}


@dataclass(frozen=True)
class InstructionPart(SoftPromptPart):
    """Soft tokens without a history: the same number as the plug's, trained on the same samples."""

    reads_items: ClassVar[bool] = False

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(own, instruction_tokens=own.soft_tokens, persona_tokens=0, label_prior="none")


@dataclass(frozen=True)
class PaperPlugPart(SoftPromptPart):
    """The plug of the paper, with the placement of the run's plug."""

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(PAPER, placement=own.placement, max_history=own.max_history)


PLUG = PlugPart("plug")
INSTRUCTION = InstructionPart("instruction-only")
PAPER_PLUG = PaperPlugPart("paper-plug")


def train(run: Run, reader: Reader, *, models: Models, parts: Sequence[TrainedPart] | None = None) -> list[Path]:
    """Train parts of a run, skip finished ones, and return all folders, seed by seed.

    Args:
        reader: the training split.
        parts: None = the plug and, with `training.controls`, its control.
    Raises:
        ConfigError, TrainingDiverged, StorageError: see `fit`.
        RunConflict: if another process trains in the run's folder.
    """
    if parts is None:
        parts = (INSTRUCTION, PLUG) if run.config.training.controls else (PLUG,)
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(sole_trainer(run.folder)))
        trainings = Trainings(run, reader, models=models)
        pairs = [(part, seed) for seed in run.config.training.seeds for part in parts]
        if len(pairs) > 1:
            order = ", ".join(f"{part.name} (seed {seed})" for part, seed in pairs)
            logger.info("%d trainings, one after the other: %s", len(pairs), order)
        return [trainings.train(part, seed=seed) for part, seed in pairs]


def build_plug(run: Run, models: Models, *, part: SoftPromptPart = PLUG, seed: int) -> PersonaPlug:
    """Return an untrained plug for the run's models; `seed` determines its initial weights."""
    identity = models.llm.identity
    options = None if run.shared_labels is None else len(run.task.labels)
    spec = PlugSpec(identity, models.llm.embedding_scale, models.encoder.identity, run.item_labels, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plug = PersonaPlug(part.plug_config(run.config.plug), spec=spec, encoder=models.encoder)
    return plug.compute_items_in(models.llm.dtype).to(models.llm.device)


def closed_labels(run: Run) -> tuple[str, ...]:
    """Return the labels that are trained without an end-of-text token; empty if answers are generated as text."""
    return run.task.labels if run.config.training.train_eos == "auto" else ()


def _start_from_words(plug: PersonaPlug, samples: Sequence[EncodedSample], models: Models, *, seed: int) -> None:
    """Initialize a plug's instruction tokens with token embeddings of training answers."""
    rng, count = np.random.default_rng([seed, 9]), len(plug.instruction)
    answers = [samples[index].target or "" for index in rng.permutation(len(samples))[:MAX_START_ANSWERS]]
    tokens = models.llm.embed_texts(answers)
    if len(tokens):
        plug.init_instruction(tokens[rng.choice(len(tokens), size=count, replace=len(tokens) < count)])


def _preference_loss(run: Run, llm: LanguageModel) -> PreferenceLoss | None:
    config = run.config.training
    if config.preference_loss == "none":
        return None
    return PreferenceLoss(config.preference_loss, llm, config.preference_weight)


def label_prior_fit(plug: PersonaPlug, trainings: Trainings) -> LabelPriorFit:
    """Return the fit of a plug's label prior to samples of these trainings."""
    assert plug.label_prior is not None
    labels = closed_labels(trainings.run)
    if not labels:
        raise ConfigError(
            "label_prior needs train_eos=auto and a task with labels, because it adds to the labels' scores. "
            "Otherwise use label_prior=none."
        )
    return LabelPriorFit(Personalizer(plug, table=trainings.embeddings), plug.label_prior, labels)


def _fit_label_prior(plug: PersonaPlug, samples: Sequence[EncodedSample], trainings: Trainings, *, seed: int) -> None:
    if plug.label_prior is not None:
        label_prior_fit(plug, trainings).fit_alone(samples, config=trainings.run.config.training, seed=seed)


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
