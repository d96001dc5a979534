"""One loop that trains a plug in front of a frozen language model (PPlug, eq. 6), on Accelerate.

What may be trained is the plug; the language model only passes gradients on. A stopped training resumes from its last
state to the same plug as an unbroken one: the order of samples, the sub-histories and the dropout of a step depend on
the seed and the step alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from personaplug.backends.base import Backend
from personaplug.batching import View, epoch_batches, hold_out, in_passes, seen_through
from personaplug.checkpoint import drop_states, load_best, load_state, save_best, save_state
from personaplug.config import PlugConfig, TrainingConfig
from personaplug.data.base import Reader
from personaplug.errors import BadConfig, TrainingDiverged
from personaplug.files import write_json
from personaplug.memory import peak_memory, reset_peak_memory
from personaplug.personalizer import Personalizer
from personaplug.plug import Fitting, PersonaPlug
from personaplug.progress import Progress
from personaplug.run import TRAINED, Models, Run
from personaplug.samples import EncodedSample
from personaplug.training_log import TrainingLog
from personaplug.vectors import VectorTable

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


def train(run: Run, reader: Reader, *, models: Models) -> list[Path]:
    """Train the plugs of a run, and their controls; what is finished already is left as it is.

    Args:
        reader: the training split.
    Returns:
        The folders of the plugs.
    Raises:
        BadConfig, TrainingDiverged, StorageError: see `fit`.
    """
    config = run.config.training
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(reader, table, limit=config.train_limit)
    run.check_data(samples, table)
    wanted = [(name, seed) for seed in config.seeds for name in (TRAINED if config.controls else ("plug",))]
    return [_train_one(run, samples, models=models, table=table, name=name, seed=seed) for name, seed in wanted]


def _train_one(
    run: Run, samples: Sequence[EncodedSample], *, models: Models, table: VectorTable, name: str, seed: int
) -> Path:
    folder = run.plug_folder(name, seed=seed)
    if run.trained(name, seed=seed):
        logger.info("%s (seed %d) is trained already", name, seed)
        return folder
    reset_peak_memory()
    plug = build_plug(run, models, name=name, seed=seed)
    report = fit(
        plug,
        models.backend,
        table=table,
        samples=samples,
        config=run.config.training,
        seed=seed,
        folder=folder,
        title=f"{name} (seed {seed})",
    )
    facts = asdict(report) | {"task": run.task.name, "seed": seed}
    write_json(
        folder / "fit.json",
        facts | {"peak_memory_bytes": peak_memory(), "parameters": sum(p.numel() for p in plug.parameters())},
    )
    plug.save_pretrained(folder, facts=facts)
    drop_states(folder)
    return folder


def build_plug(run: Run, models: Models, *, name: str, seed: int) -> PersonaPlug:
    """A fresh plug (or its control) for the run's models, its first weights drawn by `seed`."""
    identity = models.backend.identity
    fitting = Fitting(identity, models.backend.embedding_scale, models.encoder.identity, run.task.labels)
    config = run.config.plug if name == "plug" else instruction_only(run.config.plug)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plug = PersonaPlug(config, fitting=fitting, encoder=models.encoder)
    return plug.to(models.backend.device)


def instruction_only(config: PlugConfig) -> PlugConfig:
    """The control plug: as many soft tokens, none of them made from a history."""
    return replace(config, instruction_tokens=config.instruction_tokens + config.persona_tokens, persona_tokens=0)


def fit(
    plug: PersonaPlug,
    backend: Backend,
    *,
    table: VectorTable,
    samples: Sequence[EncodedSample],
    config: TrainingConfig,
    seed: int,
    folder: Path,
    title: str = "train",
    on_step: Callable[[], None] | None = None,
) -> FitReport:
    """Train `plug` in place and leave the best checkpoint's weights in it.

    Args:
        table: where the samples' item vectors are.
        samples: the training split; the validation users are held out of it.
        seed: of everything drawn at random.
        folder: states, best plug and `log.jsonl`; a state found there is gone on from.
        title: what the progress says.
        on_step: called after each optimizer step.
    Raises:
        BadConfig: if a sample has no target, there are too few users, or several processes.
        TrainingDiverged: if a loss is NaN or infinite; the last good state stays.
        StorageError: if the disk is full; the last good state stays.
    """
    parts = _Fit(plug, backend, table=table, samples=samples, config=config, seed=seed, folder=folder, title=title)
    # The steps seed torch's generator; the caller's own draws go on as if nothing had been trained.
    with torch.random.fork_rng(devices=[]):
        return parts.run(on_step or (lambda: None))


class _Fit:
    """The parts of one training, held together."""

    def __init__(
        self,
        plug: PersonaPlug,
        backend: Backend,
        *,
        table: VectorTable,
        samples: Sequence[EncodedSample],
        config: TrainingConfig,
        seed: int,
        folder: Path,
        title: str,
    ) -> None:
        _check_targets(samples)
        self.backend, self.config, self.seed, self.folder, self.title = backend, config, seed, folder, title
        self.train, self.validation = hold_out(
            samples, share=config.validation_share, limit=config.validation_limit, seed=seed
        )
        both = [*self.train, *self.validation]
        self.lengths = dict(zip((sample.id for sample in both), _lengths(both, backend=backend), strict=True))
        self.accelerator = Accelerator(cpu=_on_cpu(backend), device_placement=False)
        if self.accelerator.num_processes > 1:
            raise BadConfig(
                f"Training runs in one process; it was started in {self.accelerator.num_processes}. "
                f"Start it without a launcher."
            )
        self.plug = plug
        self.optimizer = torch.optim.AdamW(parameter_groups(plug, config), weight_decay=config.weight_decay)
        self.state = load_state(folder, plug=plug, optimizer=self.optimizer)
        self.prepared = self.accelerator.prepare(self.optimizer)
        self.personalizer = Personalizer(plug, table=table)
        self.per_epoch = len(self._batches(0))
        planned = config.epochs * self.per_epoch
        self.total = min(planned, config.max_steps) if config.max_steps else planned
        self.every = config.validate_every or max(1, self.per_epoch // 4)

    def run(self, on_step: Callable[[], None]) -> FitReport:
        log = TrainingLog(self.folder, after=self.state.step, tensorboard=self.config.tensorboard)
        if self.state.step:
            logger.info("%s: going on from step %d of %d", self.title, self.state.step, self.total)
        with log, Progress(self.title, total=self.total, start=self.state.step, unit="steps") as progress:
            while self.state.step < self.total and not self._out_of_patience():
                began = time.monotonic()
                batch = list(self._views(self.state.step))
                loss, norm = self._step(batch)
                self._count(len(batch), seconds=time.monotonic() - began)
                rate = len(batch) / (time.monotonic() - began)
                progress.advance(note=f"loss {loss:.3f}, {rate:.1f} samples/s")
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
        load_best(self.folder, self.state.best_step, plug=self.plug)
        self.plug.eval()
        return self._report()

    def _step(self, batch: Sequence[EncodedSample]) -> tuple[float, float]:
        """One optimizer step; the mean loss per token and the gradient's length before clipping."""
        # Dropout of the trained encoder is drawn anew in each step, from the step's number alone.
        torch.manual_seed((self.seed + 1) * 1_000_003 + self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule(self.state.step)
        self.plug.train()
        self.prepared.zero_grad()
        summed, tokens = self._accumulate(batch)
        if not math.isfinite(summed):
            raise TrainingDiverged(self._diverged(f"the loss became {summed / tokens}"))
        self._scale_gradients(1 / tokens)
        norm = float(self.accelerator.clip_grad_norm_(self.plug.parameters(), self.config.clip_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(self._diverged(f"the gradient became {norm}"))
        self.prepared.step()
        return summed / tokens, norm

    def _accumulate(self, batch: Sequence[EncodedSample]) -> tuple[float, int]:
        """Gradients of the summed loss, pass by pass so that activations stay within `pass_tokens`; loss and tokens."""
        summed, tokens = 0.0, 0
        for part in self._passes(batch):
            loss, count = self._loss(part)
            self.accelerator.backward(loss)
            summed, tokens = summed + float(loss.detach()), tokens + int(count)
        return summed, tokens

    def _scale_gradients(self, factor: float) -> None:
        """From the sum over tokens to their mean, which is known only after the last pass."""
        held = [parameter.grad for parameter in self.plug.parameters() if parameter.grad is not None]
        torch._foreach_mul_(held, factor)

    def _passes(self, batch: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        return in_passes(batch, lengths=[self.lengths[sample.id] for sample in batch], most=self.config.pass_tokens)

    def _diverged(self, what: str) -> str:
        return (
            f"{self.title}: {what} in step {self.state.step + 1}. The state of the last checkpoint is kept in "
            f"{self.folder}. Train anew with lower rates (learning_rate is {self.config.learning_rate:g}, "
            f"token_learning_rate {self.config.token_learning_rate:g}) or dtype=float32."
        )

    def _loss(self, samples: Sequence[EncodedSample]) -> tuple[torch.Tensor, torch.Tensor]:
        soft = self.personalizer.soft_prompt(samples)
        targets = [sample.target or "" for sample in samples]
        losses, tokens = self.backend.loss([sample.prompt for sample in samples], targets, soft=soft)
        return losses.sum(), tokens.sum()

    def _look_after(self, log: TrainingLog) -> None:
        """Validate and save where it is time to."""
        last = self.state.step == self.total
        validate = last or self.state.step % self.every == 0
        if validate:
            began = time.monotonic()
            loss = self._validate()
            self.state.seconds += time.monotonic() - began
            log.write(step=self.state.step, validation_loss=loss)
            self._judge(loss)
        if validate or self.state.step % self.config.checkpoint_every == 0:
            save_state(self.folder, self.state, plug=self.plug, optimizer=self.optimizer)

    def _judge(self, loss: float) -> None:
        if loss < self.state.best_loss:
            self.state.best_step, self.state.best_loss, self.state.worse = self.state.step, loss, 0
            save_best(self.folder, self.state.step, plug=self.plug)
        else:
            self.state.worse += 1
        if not self.state.best_step:
            raise TrainingDiverged(f"{self.title}: the validation loss is {loss} in step {self.state.step}.")

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss per token of the held-out users, with their whole histories."""
        self.plug.eval()
        summed, tokens = 0.0, 0
        for part in self._passes(self.validation):
            loss, count = self._loss(part)
            summed, tokens = summed + float(loss), tokens + int(count)
        return summed / tokens

    def _views(self, step: int) -> Iterator[EncodedSample]:
        epoch, offset = divmod(step, self.per_epoch)
        for view in self._batches(epoch)[offset]:
            yield seen_through(
                self.train[view.index], view, seed=self.seed, epoch=epoch, empty_share=self.config.empty_share
            )

    def _batches(self, epoch: int) -> list[list[View]]:
        if getattr(self, "_planned", (-1, []))[0] != epoch:
            batches = epoch_batches(
                [self.lengths[sample.id] for sample in self.train],
                batch_size=self.config.batch_size,
                views=self.config.views,
                seed=self.seed,
                epoch=epoch,
            )
            self._planned: tuple[int, list[list[View]]] = (epoch, batches)
        return self._planned[1]

    def _schedule(self, step: int) -> float:
        """Share of the peak rate in a step: linear warm-up, then linear decay to 0."""
        warm = max(1, math.ceil(self.config.warmup_share * self.total))
        if step < warm:
            return (step + 1) / warm
        return (self.total - step) / max(1, self.total - warm)

    def _out_of_patience(self) -> bool:
        return bool(self.config.patience) and self.state.worse >= self.config.patience

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


def parameter_groups(plug: PersonaPlug, config: TrainingConfig) -> list[dict[str, Any]]:
    """The plug's parameters with their peak learning rates: tokens, the trained copy of the encoder, and the rest.

    A token that is trained as it stands moves by about its rate in a step, so it needs a far higher one than the
    layers of the projector; with one rate for all, the control without history would hardly be trained.
    """
    rates = {
        "tokens": config.token_learning_rate,
        "encoder": config.encoder_learning_rate,
        "rest": config.learning_rate,
    }
    groups: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in plug.named_parameters():
        groups[_kind_of(name, plug)].append(parameter)
    return [{"params": held, "peak": rates[kind]} for kind, held in groups.items() if held]


def _kind_of(name: str, plug: PersonaPlug) -> str:
    if name in ("instruction", "population"):
        return "tokens"
    copied = plug.config.query_encoder == "trained" and name.startswith("query_encoder.")
    return "encoder" if copied else "rest"


def _check_targets(samples: Sequence[EncodedSample]) -> None:
    without = sum(sample.target is None for sample in samples)
    if without:
        raise BadConfig(f"Training needs an answer for every sample; {without} of {len(samples)} have none.")


def _lengths(samples: Sequence[EncodedSample], *, backend: Backend) -> list[int]:
    targets = [sample.target or "" for sample in samples]
    return [found.tokens for found in backend.measure([sample.prompt for sample in samples], targets=targets)]


def _on_cpu(backend: Backend) -> bool:
    return getattr(backend, "device", torch.device("cpu")).type == "cpu"
