"""Rivals of a persona that only count: the control's soft tokens and a label prior."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from personaplug.config import PlugConfig
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError
from personaplug.infra.distributed import synchronized
from personaplug.llm.base import PromptBatch
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.training.batching import user_split
from personaplug.training.parts import INSTRUCTION, InstructionPart, Trainings, label_prior_fit
from personaplug.training.trainer import FitReport

_SCORED_TOGETHER = 32


@dataclass(frozen=True)
class LabelPriorPart(InstructionPart):
    """The tokens of the control with a label prior, whose numbers are fitted beside the control's scores.

    The language model runs over the held-out samples only, so this part adds little to the time of a training.

    Attributes:
        prior: counts or neighbors; see `PlugConfig.label_prior`.
    """

    prior: Literal["counts", "neighbors"] = "counts"
    counts_labels: ClassVar[bool] = True

    def check(self, task: Task) -> None:
        if not task.has_labelled_items:
            raise ConfigError(
                f"{self.name} needs history items with labels; task {task.name} has none. Use instruction-only instead."
            )

    def plug_config(self, own: PlugConfig) -> PlugConfig:
        return replace(super().plug_config(own), label_prior=self.prior)

    def prepare(self, trainings: Trainings, *, seed: int) -> None:
        trainings.train(INSTRUCTION, seed=seed)

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        started, config = time.monotonic(), trainings.run.config.training
        objective, samples = self.start(trainings, seed=seed)
        plug, control = objective.personalizer.plug, trainings.load_control(seed=seed)
        with torch.no_grad():
            plug.instruction.copy_(control.instruction)
        train, held_out = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)
        with synchronized():
            scores = _label_scores(control, held_out, trainings)
            loss = label_prior_fit(plug, trainings).fit_beside(scores, held_out)
        report = FitReport(
            steps=0,
            samples=0,
            best_step=0,
            best_loss=loss,
            seconds=round(time.monotonic() - started, 1),
            train_samples=len(train),
            validation_samples=len(held_out),
        )
        return self.save(objective, samples, trainings, facts=trainings.facts(report, objective, seed=seed), seed=seed)


LABEL_COUNTS = LabelPriorPart("instruction+labels", prior="counts")
NEIGHBORS = LabelPriorPart("instruction+neighbors", prior="neighbors")


@torch.no_grad()
def _label_scores(plug: PersonaPlug, samples: Sequence[EncodedSample], trainings: Trainings) -> torch.Tensor:
    """Return the log-probabilities of the labels after a plug's soft tokens, (n, C)."""
    personalizer, llm = Personalizer(plug, table=trainings.embeddings), trainings.models.llm
    labels, scores = trainings.run.task.labels, []
    for start in range(0, len(samples), _SCORED_TOGETHER):
        batch = samples[start : start + _SCORED_TOGETHER]
        soft = personalizer.soft_prompt(batch)
        prompts = PromptBatch([sample.prompt for sample in batch], soft, [sample.soft_at for sample in batch])
        scores.append(llm.score(prompts, labels).float().log_softmax(dim=1))
    return torch.cat(scores)
