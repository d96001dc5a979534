"""The training loop (PPlug, eq. 6) for any objective on a frozen language model.

A stopped training resumes from its last state and ends with the same weights as an uninterrupted one, because batches,
sub-histories and dropout depend only on seed and step. Several processes share each batch and sum their gradients.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from personaplug.config import Config, TrainingConfig
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.encoders.strangers import with_strangers_items
from personaplug.errors import ConfigError, TrainingDiverged
from personaplug.infra.distributed import (
    all_reduce_sum,
    connect,
    mark_shared,
    on_main,
    rank,
    shard,
    sum_gradients,
    synchronized,
)
from personaplug.infra.progress import Progress
from personaplug.training.batching import augment_history, epoch_batches, micro_batches, spaced, user_split
from personaplug.training.checkpointing import load_best, load_state, save_best, save_state
from personaplug.training.objectives import Objective
from personaplug.training.step_log import StepLog
from personaplug.training.task_mixture import TaskMixture

logger = logging.getLogger(__name__)

_GAIN_SAMPLES = 64
"""Upper bound of the held-out samples that the personal gain of a training is measured on."""


@dataclass(frozen=True)
class FitReport:
    steps: int
    samples: int  # augmented samples trained on, over all epochs
    best_step: int  # step of the checkpoint loaded at the end
    best_loss: float  # validation loss of that checkpoint, per `Objective.unit`
    seconds: float  # over all resumptions
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
    owner: str = "",
    on_step: Callable[[], None] | None = None,
    mixture: TaskMixture | None = None,
    about: Config | None = None,
) -> FitReport:
    """Train the objective's module in place and load the weights of the best checkpoint into it.

    Args:
        samples: the training split, validation users included.
        folder: holds states, best weights and `log.jsonl`; a training resumes from a state in it.
        owner: name of this training; states of other trainings are refused.
        on_step: called after each optimizer step.
        mixture: how often samples of each of several tasks occur; None = one task.
        about: all settings of the run, for the trackers of `report_to`.
    Raises:
        ConfigError: if a sample has no target, there are too few users, or processes cannot work together.
        TrainingDiverged, StorageError: if a loss is not finite or the disk is full; the last good state remains.
    """
    connect(objective.device.type)
    with synchronized():
        trainer = _Trainer(
            objective,
            samples=samples,
            config=config,
            seed=seed,
            folder=folder,
            title=title,
            owner=owner,
            mixture=mixture,
            about=about,
        )
    # Each step seeds torch's generator; restore it for the caller.
    with torch.random.fork_rng(devices=[]):
        return trainer.run(on_step or (lambda: None))


@torch.no_grad()
def mean_loss(objective: Objective, samples: Sequence[EncodedSample], *, max_tokens: int) -> float:
    """Return the loss of samples per unit; all processes share the work, and `max_tokens` bounds a micro-batch."""
    loss, tokens = _summed_loss(objective, samples, objective.live_lengths, max_tokens=max_tokens)
    return loss / tokens


@torch.no_grad()
def _losses_with_part(
    objective: Objective, samples: Sequence[EncodedSample], *, part: Set[str], max_tokens: int
) -> tuple[float, float]:
    """Return the loss per unit of samples, and of the part with these ids (NaN for no ids), from one pass."""
    sums = [0.0] * 4
    with synchronized():
        own = shard(samples)
        for batch in micro_batches(own, lengths=objective.live_lengths(own), max_tokens=max_tokens):
            rows = [row for row, sample in enumerate(batch) if sample.id in part]
            values = objective.sample_losses(batch)
            terms = (*values, *(value[rows] for value in values))
            sums = [total + float(value.sum()) for total, value in zip(sums, terms, strict=True)]
    loss, units, part_loss, part_units = all_reduce_sum(sums)
    return loss / units, part_loss / part_units if part_units else math.nan


@dataclass(eq=False)
class _Trainer:
    objective: Objective
    samples: Sequence[EncodedSample]
    config: TrainingConfig
    seed: int
    folder: Path
    title: str
    owner: str
    mixture: TaskMixture | None
    about: Config | None

    def __post_init__(self) -> None:
        objective, samples, config, seed = self.objective, self.samples, self.config, self.seed
        if missing := sum(sample.target is None for sample in samples):
            raise ConfigError(f"Training needs an answer for every sample; {missing} of {len(samples)} have none.")
        self.module = objective.module
        self._notes = {"loss": "", "held-out": "", "rate": ""}  # in the order in which they are shown
        split = user_split if self.mixture is None else self.mixture.split
        self.train, self.validation = split(
            samples, share=config.validation_share, limit=config.validation_limit, seed=seed
        )
        shares = None
        if self.mixture is not None:
            self.train, shares = self.mixture.repeated(self.train)
        ids = [sample.id for sample in self.train]
        self.live_lengths = dict(zip(ids, objective.live_lengths(self.train), strict=True))
        self.optimizer = torch.optim.AdamW(
            objective.parameter_groups(config),
            weight_decay=config.weight_decay,
            # One pass instead of ten over the 22 million weights and moments of a trained encoder.
            fused=objective.device.type in ("cpu", "cuda"),
        )
        self.state = load_state(self.folder, module=self.module, optimizer=self.optimizer, owner=self.owner)
        batches_of = partial(
            epoch_batches,
            objective.lengths(self.train),
            batch_size=config.batch_size,
            views=config.views,
            seed=seed,
            shares=shares,
        )
        self._batches_of = lru_cache(maxsize=1)(batches_of)
        self.samples_of_strangers = self._samples_of_strangers()
        self.steps_per_epoch = len(self._batches_of(epoch=0))
        steps = config.epochs * self.steps_per_epoch
        self.total_steps = min(steps, config.max_steps) if config.max_steps else steps
        self.eval_steps = config.eval_steps or max(1, self.steps_per_epoch // 4)

    def run(self, on_step: Callable[[], None]) -> FitReport:
        with synchronized():
            log = StepLog(
                self.folder,
                after=self.state.step,
                report_to=self.config.report_to,
                owner=self.owner,
                config=None if self.about is None else asdict(self.about),
            )
        if self.state.step:
            logger.info("%s: resuming after step %d of %d", self.title, self.state.step, self.total_steps)
        with log:
            with self._timed(), synchronized():
                self.objective.prepare(self.samples)
            with Progress(self.title, total=self.total_steps, start=self.state.step, unit="steps") as progress:
                while self.state.step < self.total_steps:
                    self._train_step(log, progress)
                    on_step()
                    self._validate_and_save(log, progress)
        with synchronized():
            load_best(self.folder, self.state.best_step, module=self.module)
        self.module.eval()
        return FitReport(
            steps=self.state.step,
            samples=self.state.samples,
            best_step=self.state.best_step,
            best_loss=self.state.best_loss,
            seconds=round(self.state.seconds, 1),
            train_samples=len(self.train),
            validation_samples=len(self.validation),
        )

    def _train_step(self, log: StepLog, progress: Progress) -> None:
        started = time.monotonic()
        learning_rate = self.config.learning_rate * self._lr_factor()
        with self._timed():
            batch = self._batch()
            loss, norm = self._optimize(batch)
        self.state.step += 1
        self.state.samples += len(batch)
        rate = len(batch) / (time.monotonic() - started)
        self._notes |= {"loss": f"loss {loss:.3f}", "rate": f"{rate:,.1f} samples/s"}
        progress.advance(note=self._note)
        values = {"loss": loss, "gradient_norm": norm, "samples_per_second": rate, "learning_rate": learning_rate}
        with synchronized():
            log.write(step=self.state.step, **values, seconds_left=progress.seconds_left())

    def _optimize(self, batch: Sequence[EncodedSample]) -> tuple[float, float]:
        """Update the weights once; return the mean loss per token and the gradient norm before clipping."""
        # Dropout depends only on step and rank: a resumed training repeats it, and ranks draw differently.
        torch.manual_seed((self.seed + 1) * 1_000_003 + self.state.step + rank() * 15_485_863)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._lr_factor()
        self.module.train()
        self.optimizer.zero_grad()
        max_tokens = self.config.max_tokens_per_microbatch
        loss_sum, tokens = _summed_loss(self.objective, batch, self._lengths_of, max_tokens=max_tokens, backward=True)
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss became {loss_sum / tokens}")
        sum_gradients(self.module.parameters())
        # Divide by the number of tokens here, because it is known only after the last micro-batch.
        torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], 1 / tokens)
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient became {norm}")
        self.optimizer.step()
        return loss_sum / tokens, norm

    def _lengths_of(self, samples: Sequence[EncodedSample]) -> list[int]:
        return [self.live_lengths[sample.id] for sample in samples]

    def _diverged(self, reason: str) -> TrainingDiverged:
        return mark_shared(
            TrainingDiverged(
                f"{self.title}: {reason} in step {self.state.step + 1}. The last checkpoint is in {self.folder}. Train "
                f"in a new folder with a lower learning_rate (now {self.config.learning_rate:g}), a lower "
                f"token_learning_rate (now {self.config.token_learning_rate:g}) or dtype=float32."
            )
        )

    def _validate_and_save(self, log: StepLog, progress: Progress) -> None:
        is_eval_step = self.state.step == self.total_steps or self.state.step % self.eval_steps == 0
        if is_eval_step:
            with self._timed():
                loss, gain = self._validate()
            with synchronized():
                gains = {} if gain is None else {"personal_gain": gain}
                log.write(step=self.state.step, validation_loss=loss, **gains)
            self._update_best(loss)
            gained = "" if gain is None else f", personal gain {gain:+.3f} nats"
            self._notes["held-out"] = f"held-out {loss:.3f} (best {self.state.best_loss:.3f}){gained}"
            progress.advance(0, note=self._note)
        if is_eval_step or self.state.step % self.config.save_steps == 0:
            on_main(
                lambda: save_state(
                    self.folder, self.state, module=self.module, optimizer=self.optimizer, owner=self.owner
                )
            )

    def _update_best(self, loss: float) -> None:
        if loss < self.state.best_loss:
            self.state.best_step, self.state.best_loss = self.state.step, loss
            on_main(lambda: save_best(self.folder, self.state.step, module=self.module))
        if not self.state.best_step:
            error = TrainingDiverged(
                f"{self.title}: the first validation loss is {loss}, in step {self.state.step}. Train in a new folder "
                f"with a lower learning_rate or dtype=float32."
            )
            raise mark_shared(error)

    @property
    def _note(self) -> str:
        return ", ".join(filter(None, self._notes.values()))

    def _validate(self) -> tuple[float, float | None]:
        """Return the held-out loss per unit, and the personal gain.

        In the loss, samples with and without histories weigh as much as in training.
        """
        self.module.eval()
        max_tokens = self.config.max_tokens_per_microbatch
        strangers = self.samples_of_strangers
        part = {sample.id for sample in strangers}
        loss, own_loss = _losses_with_part(self.objective, self.validation, part=part, max_tokens=max_tokens)
        share = self.config.drop_history_prob if self.objective.reads_histories else 0.0
        if share:
            samples = [sample.without_items() for sample in self.validation]
            loss = (1 - share) * loss + share * mean_loss(self.objective, samples, max_tokens=max_tokens)
        if not strangers:
            return loss, None
        return loss, mean_loss(self.objective, strangers, max_tokens=max_tokens) - own_loss

    def _samples_of_strangers(self) -> list[EncodedSample]:
        """Return held-out samples with the histories of strangers; none if the loss depends on no history."""
        if not self.objective.reads_histories:
            return []
        groups = [self.validation] if self.mixture is None else self.mixture.by_task(self.validation)
        groups = [group for group in groups if len({sample.owner for sample in group}) > 1]
        samples = [sample for group in groups for sample in with_strangers_items(group, seed=self.seed)]
        return [samples[index] for index in spaced(len(samples), _GAIN_SAMPLES)] if samples else []

    def _batch(self) -> list[EncodedSample]:
        """Return the augmented samples of the next step."""
        epoch, position = divmod(self.state.step, self.steps_per_epoch)
        return [
            augment_history(
                self.train[augmentation.index],
                augmentation,
                seed=self.seed,
                epoch=epoch,
                drop_history_prob=self.config.drop_history_prob,
                subsample_history_prob=self.config.subsample_history_prob,
            )
            for augmentation in self._batches_of(epoch=epoch)[position]
        ]

    def _lr_factor(self) -> float:
        """Return the next step's share of the peak rate: linear warm-up, then linear decay to 0."""
        warmup_steps = max(1, math.ceil(self.config.warmup_ratio * self.total_steps))
        if self.state.step < warmup_steps:
            return (self.state.step + 1) / warmup_steps
        return (self.total_steps - self.state.step) / max(1, self.total_steps - warmup_steps)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.state.seconds += time.monotonic() - started


def _summed_loss(
    objective: Objective,
    samples: Sequence[EncodedSample],
    lengths_of: Callable[[Sequence[EncodedSample]], list[int]],
    *,
    max_tokens: int,
    backward: bool = False,
) -> tuple[float, float]:
    """Return the summed loss and number of tokens (or other units) over all micro-batches and ranks.

    With `backward`, accumulate this rank's gradients.
    """
    loss_sum, tokens = 0.0, 0.0
    with synchronized():
        own = shard(samples)
        for batch in micro_batches(own, lengths=lengths_of(own), max_tokens=max_tokens):
            loss, count = objective.loss(batch)
            if backward:
                torch.autograd.backward(loss)
            loss_sum, tokens = loss_sum + float(loss.detach()), tokens + float(count)
    loss_sum, tokens = all_reduce_sum([loss_sum, tokens])
    return loss_sum, tokens
