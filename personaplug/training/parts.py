"""Trained parts of a run: modules that are trained once per seed and serve all users.

This file has the soft tokens; `baseline_parts.py` has a LoRA and a retriever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from personaplug.baselines.retrievers import Retrieval
from personaplug.config import PAPER, PlugConfig
from personaplug.data.task import Reader, Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.encoders.item_parts import check_item_parts, warn_of_unused_parts
from personaplug.encoders.joint import OUTSIDE, PICTURE, TEXT, part_slice
from personaplug.errors import ConfigError, TrainingDiverged
from personaplug.infra.distributed import main_first, on_main, synchronized
from personaplug.infra.locks import sole_trainer
from personaplug.llm.base import LanguageModel
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.run import Models, Run
from personaplug.training.cold_start import set_best_cold_start
from personaplug.training.label_prior_fit import LabelPriorFit, State
from personaplug.training.objectives import PlugObjective, prompts_with
from personaplug.training.persona_choice import keep_better
from personaplug.training.preference_loss import PreferenceLoss
from personaplug.training.trainer import FitReport, mean_loss
from personaplug.training.trainings import TrainedPart, Trainings

logger = logging.getLogger(__name__)

MAX_START_ANSWERS = 1024
"""Upper bound of the training answers whose tokens initialize the instruction tokens."""


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
        prior = objective.personalizer.plug.label_prior
        if prior is not None:
            prior.switch_off()
        facts = trainings.fit(self, objective, samples, seed=seed)
        if prior is not None:
            _, held_out = trainings.split(samples, seed=seed)
            _fit_prior_beside(objective.personalizer.plug, held_out, trainings, seed=seed)
        return self.save(objective, samples, trainings, facts=facts, seed=seed)

    def start(self, trainings: Trainings, *, seed: int) -> tuple[PlugObjective, list[EncodedSample]]:
        """Return the objective of an untrained plug, and its training samples."""
        run, models = trainings.run, trainings.models
        config = self.plug_config(run.config.plug)
        self.check_run(run, models)
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

    def check_run(self, run: Run, models: Models) -> None:
        """Raise `ConfigError` if the run's settings do not allow the part's label prior."""
        if self.plug_config(run.config.plug).label_prior == "none":
            return
        if run.shared_labels is not None:
            raise ConfigError(
                f"{self.name} counts the labels of one task, but {run.folder} shares a plug with other tasks. "
                f"Train it in a run of one task."
            )
        if not closed_labels(run):
            raise ConfigError(
                "label_prior needs train_eos=auto and a task with labels, because it adds to the labels' scores. "
                "Otherwise use label_prior=none."
            )

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
        """Train the parts without a persona, whose tokens may serve users; the plug does not require them."""
        if self._has_control(trainings.run):
            try:
                trainings.train(INSTRUCTION, seed=seed)
                if counting := _counting_part(trainings.run):
                    trainings.train(counting, seed=seed)
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
        """Choose the soft tokens of users with few items, then whether any user gets a persona."""
        run = trainings.run
        if not self._has_control(run) or not on_main(lambda: run.trained(INSTRUCTION.name, seed=seed)):
            return {}
        config = run.config.training
        _, held_out = trainings.split(samples, seed=seed)
        with synchronized():
            control = load_control(trainings, seed=seed).instruction.detach()
        measure = partial(mean_loss, objective, max_tokens=config.max_tokens_per_microbatch)
        losses = set_best_cold_start(plug, control, held_out, mean_loss=measure)
        facts: dict[str, object] = {"loss_of_few_items": losses}
        part = _counting_part(run)
        if part is None or not on_main(lambda: run.trained(part.name, seed=seed)):
            return facts
        with synchronized():
            counting = run.load_plug(part.name, seed=seed, models=trainings.models)
        return facts | keep_better(plug, counting, held_out, name=part.name, mean_loss=measure)


@dataclass(frozen=True)
class OnePartPlug(PlugPart):
    """The run's plug, trained on one part of the items alone: the text, the picture or the outside vector."""

    item_part: Literal["text", "picture", "vector"] = "text"

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(own, item_parts=self.item_part)

    def check_run(self, run: Run, models: Models) -> None:
        part_slice(models.encoder.identity, self.item_part)
        super().check_run(run, models)


@dataclass(frozen=True)
class InstructionPart(SoftPromptPart):
    """Soft tokens without a history: the same number as the plug's, trained on the same samples."""

    reads_items: ClassVar[bool] = False

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(own, instruction_tokens=own.soft_tokens, persona_tokens=0, label_prior="none")


@dataclass(frozen=True)
class LabelPriorPart(InstructionPart):
    """The tokens of the control with a label prior, whose numbers are fitted beside the control's scores.

    The language model runs over the held-out samples only, so this part adds little to the time of a training.

    Attributes:
        prior: counts or neighbors; see `PlugConfig.label_prior`.
    """

    prior: Literal["counts", "neighbors"] = "counts"
    counts_labels: ClassVar[bool] = True

    @property
    def reads_items(self) -> bool:  # type: ignore[override]  # here it depends on the prior
        """Whether the label prior depends on the vectors of a user's items."""
        return self.prior == "neighbors"

    def check(self, task: Task) -> None:
        if not task.has_labelled_items:
            raise ConfigError(
                f"{self.name} needs history items with labels; task {task.name} has none. Use instruction-only instead."
            )

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(super().plug_config(own), label_prior=self.prior)

    def prepare(self, trainings: Trainings, *, seed: int) -> None:
        self.check_run(trainings.run, trainings.models)
        trainings.train(INSTRUCTION, seed=seed)

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        started = time.monotonic()
        objective, samples = self.start(trainings, seed=seed)
        plug, control = objective.personalizer.plug, load_control(trainings, seed=seed)
        with torch.no_grad():
            plug.instruction.copy_(control.instruction)
        assert plug.label_prior is not None
        plug.label_prior.switch_off()
        train, held_out = trainings.split(samples, seed=seed)
        loss = _fit_prior_beside(plug, held_out, trainings, seed=seed)
        report = FitReport(
            steps=0,
            samples=0,
            best_step=0,
            best_loss=loss,
            seconds=round(time.monotonic() - started, 1),
            train_samples=len(train),
            validation_samples=len(held_out),
        )
        facts = trainings.facts(report, objective.module, unit="label", seed=seed)
        return self.save(objective, samples, trainings, facts=facts, seed=seed)


@dataclass(frozen=True)
class PaperPlugPart(SoftPromptPart):
    """The plug of the paper, with the placement of the run's plug."""

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(PAPER, placement=own.placement, max_history=own.max_history)


PLUG = PlugPart("plug")
ONE_PART_PLUGS = tuple(OnePartPlug(f"plug:{part}", item_part=part) for part in (TEXT, PICTURE, OUTSIDE))
INSTRUCTION = InstructionPart("instruction-only")
PAPER_PLUG = PaperPlugPart("paper-plug")
LABEL_COUNTS = LabelPriorPart("instruction+labels", prior="counts")
NEIGHBORS = LabelPriorPart("instruction+neighbors", prior="neighbors")
COUNTING = (LABEL_COUNTS, NEIGHBORS)
"""Parts that only count labels. They take seconds once the control is trained."""


def train(run: Run, reader: Reader, *, models: Models, parts: Sequence[TrainedPart] | None = None) -> list[Path]:
    """Train parts of a run, skip finished ones, and return all folders, seed by seed.

    Args:
        reader: the training split.
        parts: None = `default_parts`.
    Raises:
        ConfigError, TrainingDiverged, StorageError: see `fit`.
        RunConflict: if another process trains in the run's folder.
    """
    parts = default_parts(run) if parts is None else parts
    check_item_parts(models.encoder.identity, reader)
    warn_of_unused_parts(models.encoder.identity, [run.task])
    for part in parts:
        part.check_run(run, models)
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(sole_trainer(run.folder)))
        trainings = Trainings(run, reader, models=models)
        pairs = [(part, seed) for seed in run.config.training.seeds for part in parts]
        if len(pairs) > 1:
            order = ", ".join(f"{part.name} (seed {seed})" for part, seed in pairs)
            logger.info("%d trainings, one after the other: %s", len(pairs), order)
        return [trainings.train(part, seed=seed) for part, seed in pairs]


def default_parts(run: Run) -> tuple[TrainedPart, ...]:
    """Return the plug and, with `training.controls`, its control and the rivals that only count labels."""
    if not run.config.training.controls:
        return (PLUG,)
    counting = () if run.config.plug.label_prior == "none" else COUNTING
    return (INSTRUCTION, *counting, PLUG)


def trained_counting(run: Run) -> list[str]:
    """Return the names of the run's trained parts that only count labels."""
    return run.trained_parts(*(part.name for part in COUNTING))


def _counting_part(run: Run) -> LabelPriorPart | None:
    """Return the part without a persona that has the plug's kind of label prior."""
    return next((part for part in COUNTING if part.prior == run.config.plug.label_prior), None)


def build_plug(run: Run, models: Models, *, part: SoftPromptPart = PLUG, seed: int) -> PersonaPlug:
    """Return an untrained plug for the run's models; `seed` determines its initial weights."""
    identity = models.llm.identity
    options = None if run.shared_labels is None else len(run.task.labels)
    spec = PlugSpec(identity, models.llm.embedding_scale, models.encoder.identity, run.item_labels, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plug = PersonaPlug(part.plug_config(run.config.plug), spec=spec, encoder=models.encoder)
    return plug.compute_items_in(models.llm.dtype).to(models.llm.device)


def load_control(trainings: Trainings, *, seed: int) -> PersonaPlug:
    """Load the trained control without a history."""
    return trainings.run.load_plug(INSTRUCTION.name, seed=seed, models=trainings.models)


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
    personalizer = Personalizer(plug, table=trainings.embeddings)
    return LabelPriorFit(personalizer, plug.label_prior, closed_labels(trainings.run))


def _fit_label_prior(plug: PersonaPlug, samples: Sequence[EncodedSample], trainings: Trainings, *, seed: int) -> None:
    """Fit the label prior of an untrained plug, or copy the one that another part has fitted in the same way."""
    if plug.label_prior is None:
        return
    # Encode all queries in order, so that rounding does not depend on whether the prior is fitted or copied.
    plug.cache_queries([sample.query for sample in samples], [sample.options for sample in samples])
    states, kind = trainings.label_priors, _prior_key(plug, seed=seed)
    if kind not in states:
        fit, config = label_prior_fit(plug, trainings), trainings.run.config.training
        # One process fits for all, because rounding may differ between devices.
        states[kind] = on_main(lambda: (fit.fit_alone(samples, config=config, seed=seed), fit.state()))[1]
    plug.label_prior.load_state_dict(states[kind])


def _prior_key(plug: PersonaPlug, *, seed: int) -> tuple[str, str, int]:
    """Return what the fit of a plug's label prior depends on, besides the samples."""
    return plug.config.label_prior, plug.config.item_parts, seed


def _fit_prior_beside(
    plug: PersonaPlug, held_out: Sequence[EncodedSample], trainings: Trainings, *, seed: int
) -> float:
    """Fit the numbers of a label prior beside the label scores of the plug's soft tokens, on held-out users.

    Args:
        plug: a plug with trained soft tokens; its prior is switched off.
    Returns:
        The mean loss of the held-out users, in nats.
    """
    fit = label_prior_fit(plug, trainings)

    def fitted() -> tuple[float, State]:
        scores = _label_scores(plug, held_out, trainings)
        fit.prior.load_state_dict(trainings.label_priors[_prior_key(plug, seed=seed)])
        return fit.fit_beside(scores, held_out), fit.state()

    loss, state = on_main(fitted)
    fit.prior.load_state_dict(state)
    return loss


@torch.no_grad()
def _label_scores(plug: PersonaPlug, samples: Sequence[EncodedSample], trainings: Trainings) -> torch.Tensor:
    """Return the log-probabilities of the labels after a plug's soft tokens, (n, C)."""
    personalizer, llm = Personalizer(plug, table=trainings.embeddings), trainings.models.llm
    labels, rows, scores = trainings.run.task.labels, trainings.run.config.evaluation.evaluation_batch_size, []
    for start in range(0, len(samples), rows):
        batch = samples[start : start + rows]
        prompts = prompts_with(personalizer.soft_prompt(batch), batch)
        scores.append(llm.score(prompts, labels).float().log_softmax(dim=1))
    return torch.cat(scores)
