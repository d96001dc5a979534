"""One loop that trains whatever an objective holds, in front of (or inside) a frozen language model, on Accelerate.

A stopped training resumes from its last state to the same weights as an unbroken one: the order of samples, the
sub-histories and the dropout of a step depend on the seed and the step alone. Several processes share each batch out
and step alike, by the sum of their gradients; the main one writes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from personaplug.config import TrainingConfig
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError, TrainingDiverged
from personaplug.infra.distributed import (
    alike,
    all_reduce_sum,
    connect,
    index,
    on_main,
    share,
    sum_gradients,
    synchronized,
)
from personaplug.infra.progress import Progress
from personaplug.training.batching import Augmentation, augment_history, epoch_batches, micro_batches, user_split
from personaplug.training.checkpointing import load_best, load_state, save_best, save_state
from personaplug.training.objectives import Objective
from personaplug.training.step_log import StepLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitReport:
    """What a training was.

    Attributes:
        steps: optimizer steps done.
        samples: samples (views) trained on, passes counted.
        best_step, best_loss: the checkpoint kept, and its validation loss per token.
        seconds: time spent, over all resumptions.
        train_samples, validation_samples: sizes of the two sides.
    """

    steps: int
    samples: int
    best_step: int
    best_loss: float
    seconds: float
    train_samples: int
    validation_samples: int


def fit(
    objective: Objective,
    *,
    samples: Sequence[EncodedSample],
    config: TrainingConfig,
    seed: int,
    folder: Path,
    title: str = "train",
    on_step: Callable[[], None] | None = None,
) -> FitReport:
    """Train the objective's module in place and leave the best checkpoint's weights in it.

    Args:
        objective: what is trained, and on which loss.
        samples: the training split; the validation users are held out of it.
        seed: of everything drawn at random.
        folder: states, best weights and `log.jsonl`; a state found there is gone on from.
        title: what the progress says.
        on_step: called after each optimizer step.
    Raises:
        ConfigError: if a sample has no target, there are too few users, or several processes cannot work together.
        TrainingDiverged: if a loss is NaN or infinite; the last good state stays.
        StorageError: if the disk is full; the last good state stays.
    """
    connect(objective.device.type)
    with synchronized():
        parts = _Fit(objective, samples=samples, config=config, seed=seed, folder=folder, title=title)
    # The steps seed torch's generator; the caller's own draws go on as if nothing had been trained.
    with torch.random.fork_rng(devices=[]):
        return parts.run(on_step or (lambda: None))


@torch.no_grad()
def mean_loss(objective: Objective, samples: Sequence[EncodedSample], *, most: int) -> float:
    """What an objective loses per token on samples, which all processes share out.

    Args:
        most: tokens in a pass, as `max_tokens_per_microbatch`.
    """
    summed, tokens = 0.0, 0
    with synchronized():
        own = share(samples)
        for part in micro_batches(own, lengths=objective.live_lengths(own), most=most):
            loss, count = objective.loss(part)
            summed, tokens = summed + float(loss), tokens + int(count)
    summed, tokens = _totals(summed, tokens)
    return summed / tokens


class _Fit:
    """The parts of one training, held together."""

    def __init__(
        self,
        objective: Objective,
        *,
        samples: Sequence[EncodedSample],
        config: TrainingConfig,
        seed: int,
        folder: Path,
        title: str,
    ) -> None:
        _check_targets(samples)
        self.objective, self.module, self.samples = objective, objective.module, samples
        self.config, self.seed, self.folder, self.title = config, seed, folder, title
        self.train, self.validation = user_split(
            samples, share=config.validation_share, limit=config.validation_limit, seed=seed
        )
        ids = [sample.id for sample in self.train]
        self.lengths = dict(zip(ids, objective.lengths(self.train), strict=True))
        self.live = dict(zip(ids, objective.live_lengths(self.train), strict=True))
        # Everything is in its place; which device Accelerate would choose can be said but once in a process.
        self.accelerator = Accelerator(device_placement=False)
        # Fused: one pass over a trained encoder's 22 million weights and moments in place of ten.
        fused = objective.device.type in ("cpu", "cuda")
        groups = objective.parameter_groups(config)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)
        self.state = load_state(folder, module=self.module, optimizer=self.optimizer)
        self.prepared = self.accelerator.prepare(self.optimizer)
        self.per_epoch = len(self._batches(0))
        planned = config.epochs * self.per_epoch
        self.total = min(planned, config.max_steps) if config.max_steps else planned
        self.every = config.eval_steps or max(1, self.per_epoch // 4)

    def run(self, on_step: Callable[[], None]) -> FitReport:
        with synchronized():
            log = StepLog(self.folder, after=self.state.step, tensorboard=self.config.tensorboard)
        if self.state.step:
            logger.info("%s: going on from step %d of %d", self.title, self.state.step, self.total)
        began = time.monotonic()
        with synchronized():
            self.objective.prepare(self.samples)
        self.state.seconds += time.monotonic() - began
        with log, Progress(self.title, total=self.total, start=self.state.step, unit="steps") as progress:
            while self.state.step < self.total and not self._out_of_patience():
                began = time.monotonic()
                batch = list(self._views(self.state.step))
                loss, norm = self._step(batch)
                self._count(len(batch), seconds=time.monotonic() - began)
                rate = len(batch) / (time.monotonic() - began)
                progress.advance(note=f"loss {loss:.3f}, {rate:.1f} samples/s")
                with synchronized():
                    log.write(
                        step=self.state.step,
                        loss=loss,
                        gradient_norm=norm,
                        samples_per_second=rate,
                        learning_rate=self.config.learning_rate * self._schedule(self.state.step - 1),
                        seconds_left=progress.seconds_left(),
                    )
                on_step()
                self._look_after(log)
        with synchronized():
            load_best(self.folder, self.state.best_step, module=self.module)
        self.module.eval()
        return self._report()

    def _step(self, batch: Sequence[EncodedSample]) -> tuple[float, float]:
        """One optimizer step; the mean loss per token and the gradient's length before clipping."""
        # Dropout of the trained encoder is drawn anew in each step, from the step's number alone; shares of one batch
        # must not repeat each other's.
        torch.manual_seed((self.seed + 1) * 1_000_003 + self.state.step + index() * 15_485_863)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule(self.state.step)
        self.module.train()
        self.prepared.zero_grad()
        summed, tokens = self._accumulate(batch)
        if not math.isfinite(summed):
            raise self._diverged(f"the loss became {summed / tokens}")
        sum_gradients(self.module.parameters())
        self._scale_gradients(1 / tokens)
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient became {norm}")
        self.prepared.step()
        return summed / tokens, norm

    def _accumulate(self, batch: Sequence[EncodedSample]) -> tuple[float, int]:
        """Gradients of the summed loss of this process's share, pass by pass so that activations stay within
        `max_tokens_per_microbatch`; loss and tokens of the whole batch.
        """
        summed, tokens = 0.0, 0
        with synchronized():
            for part in self._passes(share(batch)):
                loss, count = self.objective.loss(part)
                self.accelerator.backward(loss)
                summed, tokens = summed + float(loss.detach()), tokens + int(count)
        return _totals(summed, tokens)

    def _scale_gradients(self, factor: float) -> None:
        """From the sum over tokens to their mean, which is known only after the last pass."""
        held = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        torch._foreach_mul_(held, factor)

    def _passes(self, batch: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        return micro_batches(
            batch, lengths=[self.live[sample.id] for sample in batch], most=self.config.max_tokens_per_microbatch
        )

    def _diverged(self, what: str) -> TrainingDiverged:
        return alike(
            TrainingDiverged(
                f"{self.title}: {what} in step {self.state.step + 1}. The state of the last checkpoint is kept in "
                f"{self.folder}. Train anew with lower rates (learning_rate is {self.config.learning_rate:g}, "
                f"token_learning_rate {self.config.token_learning_rate:g}) or dtype=float32."
            )
        )

    def _look_after(self, log: StepLog) -> None:
        """Validate and save where it is time to."""
        last = self.state.step == self.total
        validate = last or self.state.step % self.every == 0
        if validate:
            began = time.monotonic()
            loss = self._validate()
            self.state.seconds += time.monotonic() - began
            with synchronized():
                log.write(step=self.state.step, validation_loss=loss)
            self._judge(loss)
        if validate or self.state.step % self.config.save_steps == 0:
            on_main(lambda: save_state(self.folder, self.state, module=self.module, optimizer=self.optimizer))

    def _judge(self, loss: float) -> None:
        if loss < self.state.best_loss:
            self.state.best_step, self.state.best_loss, self.state.worse = self.state.step, loss, 0
            on_main(lambda: save_best(self.folder, self.state.step, module=self.module))
        else:
            self.state.worse += 1
        if not self.state.best_step:
            raise alike(TrainingDiverged(f"{self.title}: the validation loss is {loss} in step {self.state.step}."))

    def _validate(self) -> float:
        """Mean loss per token of the held-out users: with their whole histories and, for its share, with none."""
        self.module.eval()
        without = self.config.drop_history_prob if self.objective.reads_histories else 0.0
        whole = mean_loss(self.objective, self.validation, most=self.config.max_tokens_per_microbatch)
        if not without:
            return whole
        unseen = [sample.without_items() for sample in self.validation]
        hidden = mean_loss(self.objective, unseen, most=self.config.max_tokens_per_microbatch)
        return (1 - without) * whole + without * hidden

    def _views(self, step: int) -> Iterator[EncodedSample]:
        epoch, offset = divmod(step, self.per_epoch)
        for view in self._batches(epoch)[offset]:
            yield augment_history(
                self.train[view.index],
                view,
                seed=self.seed,
                epoch=epoch,
                drop_history_prob=self.config.drop_history_prob,
                subsample_history_prob=self.config.subsample_history_prob,
            )

    def _batches(self, epoch: int) -> list[list[Augmentation]]:
        if getattr(self, "_planned", (-1, []))[0] != epoch:
            batches = epoch_batches(
                [self.lengths[sample.id] for sample in self.train],
                batch_size=self.config.batch_size,
                views=self.config.views,
                seed=self.seed,
                epoch=epoch,
            )
            self._planned: tuple[int, list[list[Augmentation]]] = (epoch, batches)
        return self._planned[1]

    def _schedule(self, step: int) -> float:
        """Share of the peak rate in a step: linear warm-up, then linear decay to 0."""
        warm = max(1, math.ceil(self.config.warmup_ratio * self.total))
        if step < warm:
            return (step + 1) / warm
        return (self.total - step) / max(1, self.total - warm)

    def _out_of_patience(self) -> bool:
        return bool(self.config.early_stopping_patience) and self.state.worse >= self.config.early_stopping_patience

    def _count(self, samples: int, *, seconds: float) -> None:
        self.state.step += 1
        self.state.samples += samples
        self.state.seconds += seconds

    def _report(self) -> FitReport:
        return FitReport(
            steps=self.state.step,
            samples=self.state.samples,
            best_step=self.state.best_step,
            best_loss=self.state.best_loss,
            seconds=round(self.state.seconds, 1),
            train_samples=len(self.train),
            validation_samples=len(self.validation),
        )


def _totals(summed: float, tokens: int) -> tuple[float, int]:
    """Loss and tokens over all processes."""
    loss, count = all_reduce_sum([summed, tokens])
    return loss, int(count)


def _check_targets(samples: Sequence[EncodedSample]) -> None:
    without = sum(sample.target is None for sample in samples)
    if without:
        raise ConfigError(f"Training needs an answer for every sample; {without} of {len(samples)} have none.")
