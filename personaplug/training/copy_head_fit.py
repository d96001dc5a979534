"""Fit a copy head behind a trained plug. The plug and the language model are frozen, so the model runs only once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personaplug.errors import TrainingDiverged
from personaplug.infra.progress import Progress
from personaplug.llm.copied_answers import ReadAnswer
from personaplug.llm.copy_head import CopyHead, CopyInputs, CopySource
from personaplug.training.trainer import FitReport

logger = logging.getLogger(__name__)

_EPOCHS = 4
_BATCH_SIZE = 16
_RATE = 2e-3
_WARMUP_STEPS = 20
_MAX_NORM = 1.0
_STRANGER_PROB = 0.25  # of showing another user's answers, so that the gate learns when answers do not help


@dataclass(frozen=True, repr=False)
class CopySample:
    """An answer to predict, its user, and the user's past answers."""

    inputs: CopyInputs
    owner: str
    answers: Sequence[ReadAnswer]


@dataclass(frozen=True)
class CopyHeadReport(FitReport):
    """Outcome of a fit; losses are in nats per token of held-out users."""

    loss_without_copy_head: float


def fit_copy_head(
    head: CopyHead, samples: Sequence[CopySample], *, held_out: Sequence[CopySample], seed: int, title: str
) -> CopyHeadReport:
    """Train a head in place, and restore the epoch with the lowest loss of held-out users.

    A quarter of the training samples shows the answers of another user.

    Raises:
        TrainingDiverged: if a gradient is not finite.
    """
    started = time.monotonic()
    rng, optimizer = np.random.default_rng([seed, 11]), torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(samples) / _BATCH_SIZE)
    total, step = _EPOCHS * steps_per_epoch, 0
    best_loss, best_state, best_step = held_out_loss(head, held_out), _copy_of(head), 0
    with Progress(title, total=total, unit="steps") as progress:
        for _ in range(_EPOCHS):
            for part in np.array_split(rng.permutation(len(samples)), steps_per_epoch):
                optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / total)
                batch = [samples[index] for index in part]
                answers = [_drawn_answers(sample, samples, rng) for sample in batch]
                losses = torch.cat([_losses(head, sample, shown) for sample, shown in zip(batch, answers, strict=True)])
                optimizer.zero_grad()
                torch.autograd.backward(losses.mean())
                norm = float(torch.nn.utils.clip_grad_norm_(head.parameters(), _MAX_NORM))
                if not math.isfinite(norm):
                    raise TrainingDiverged(
                        f"{title}: the gradient became {norm} in step {step + 1}. Use dtype=float32."
                    )
                optimizer.step()
                step += 1
                progress.advance()
            if (loss := held_out_loss(head, held_out)) < best_loss:
                best_loss, best_step = loss, step
                best_state = _copy_of(head)
    head.load_state_dict(best_state)
    without = float(torch.cat([sample.inputs.losses for sample in held_out]).mean())
    if best_loss >= without:
        logger.warning("%s: held-out users do not gain (%.4f with it, %.4f without)", title, best_loss, without)
    return CopyHeadReport(
        steps=step,
        samples=_EPOCHS * len(samples),
        best_step=best_step,
        best_loss=best_loss,
        seconds=round(time.monotonic() - started, 1),
        train_samples=len(samples),
        validation_samples=len(held_out),
        loss_without_copy_head=without,
    )


def _copy_of(head: CopyHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


@torch.no_grad()
def held_out_loss(head: CopyHead, samples: Sequence[CopySample]) -> float:
    """Return the mean −log p per token, with the users' own answers."""
    return float(torch.cat([_losses(head, sample, sample.answers) for sample in samples]).mean())


def _losses(head: CopyHead, sample: CopySample, answers: Sequence[ReadAnswer]) -> Tensor:
    return head.losses(sample.inputs, _own_source(head, answers))


def _own_source(head: CopyHead, answers: Sequence[ReadAnswer]) -> CopySource:
    if not answers:
        return CopySource.cat([])
    states = torch.cat([answer.states for answer in answers])
    return head.own.source(states, torch.cat([answer.tokens for answer in answers]))


def _drawn_answers(sample: CopySample, samples: Sequence[CopySample], rng: np.random.Generator) -> Sequence[ReadAnswer]:
    """Return the sample's answers or, with a certain probability, those of another user."""
    if rng.random() >= _STRANGER_PROB:
        return sample.answers
    other = samples[int(rng.integers(len(samples)))]
    return other.answers if other.owner != sample.owner else ()
