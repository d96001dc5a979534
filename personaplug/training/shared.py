"""Train the plugs of several tasks together: one persona head, and an instruction for each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from personaplug.config import TrainingConfig
from personaplug.data.task import Reader
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.encoders.item_parts import check_item_parts, warn_of_unused_parts
from personaplug.infra.distributed import on_main
from personaplug.infra.locks import sole_trainer
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.infra.training_facts import write_facts
from personaplug.plug.model import PersonaPlug
from personaplug.run import Models
from personaplug.shared_run import SharedRun
from personaplug.training.batching import user_split
from personaplug.training.checkpointing import drop_states
from personaplug.training.objectives import PlugObjective, plug_parameter_groups
from personaplug.training.parts import PLUG
from personaplug.training.task_mixture import TaskMixture, of_task, task_of
from personaplug.training.trainer import FitReport, fit, mean_loss
from personaplug.training.trainings import Trainings


class SharedPlugs(nn.Module):
    """Plugs with one persona head: the whole first plug, and the parameters of the others that they do not share.

    The state thus holds each parameter once.
    """

    def __init__(self, plugs: Sequence[PersonaPlug]) -> None:
        super().__init__()
        self.first, others = plugs[0], plugs[1:]
        for plug in others:
            plug.share_persona(self.first)
        self.instructions = nn.ParameterList([plug.instruction for plug in others])
        self.hints = nn.ModuleList([hint for plug in others if plug.persona and (hint := plug.persona.hint)])
        self._plugs = tuple(plugs)  # a tuple, so that torch does not register the plugs as modules

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all plugs."""
        for plug in self._plugs:
            plug.train(mode)
        return super().train(mode)


class SharedObjective:
    """The losses of several tasks. Each task has a plug; this class makes the plugs share one persona head.

    The loss of a sample is the mean over its answer's tokens. With the sum, tasks with long answers would outweigh
    tasks with one-token answers. So a task counts by its number of samples and its weight.

    Args:
        objectives: one for each task, in the order of `task_of`.
        mixture: its weights apply to the validation loss. In training, they decide how often samples occur.
    """

    unit = "sample"

    def __init__(self, objectives: Sequence[PlugObjective], *, mixture: TaskMixture) -> None:
        self.objectives, self.mixture = tuple(objectives), mixture
        self.plugs = [objective.personalizer.plug for objective in objectives]
        self.module: nn.Module = SharedPlugs(self.plugs)
        self.device = objectives[0].device
        self.reads_histories = objectives[0].reads_histories

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        self.objectives[0].cache_prompts(samples)
        for objective, own in self._by_task(samples):
            objective.prepare_task(own)

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        losses, weights = self.sample_losses(samples)
        return losses.sum(), weights.sum()

    def sample_losses(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        rows: dict[int, list[int]] = {}
        for row, sample in enumerate(samples):
            rows.setdefault(task_of(sample), []).append(row)
        losses = torch.zeros(len(samples), device=self.device)
        weights = torch.ones(len(samples), dtype=torch.float64, device=self.device)
        for task, own in rows.items():
            own_losses, tokens = self.objectives[task].sample_losses([samples[row] for row in own])
            weight = 1.0 if torch.is_grad_enabled() else self.mixture.weights[task]
            index = torch.tensor(own, device=self.device)
            losses = losses.index_add(0, index, weight * (own_losses / tokens).to(losses.dtype))
            weights[index] = weight
        return losses, weights

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return self.objectives[0].lengths(samples)  # lengths of prompts and answers do not depend on the plug

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        lengths = {
            sample.id: length
            for objective, own in self._by_task(samples)
            for sample, length in zip(own, objective.live_lengths(own), strict=True)
        }
        return [lengths[sample.id] for sample in samples]

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        return plug_parameter_groups(self.plugs, config)

    def _by_task(self, samples: Sequence[EncodedSample]) -> Iterator[tuple[PlugObjective, list[EncodedSample]]]:
        """Yield the objective and the samples of each task that has samples."""
        for objective, own in zip(self.objectives, self.mixture.by_task(samples), strict=True):
            if own:
                yield objective, own


def train_shared(shared: SharedRun, readers: Sequence[Reader], *, models: Models) -> list[Path]:
    """Train the plugs of a shared run and, with `training.controls`, their controls; return the plugs' folders.

    Finished trainings are skipped; a stopped one resumes.

    Args:
        readers: the training split of each task, in the order of the runs.
    Raises:
        ConfigError, TrainingDiverged, StorageError: see `fit`.
        RunConflict: if another process trains in the folder, or a run was started on other data.
    """
    check_item_parts(models.encoder.identity, *readers)
    warn_of_unused_parts(models.encoder.identity, [run.task for run in shared.runs])
    with ExitStack() as stack:
        for folder in (shared.folder, *(run.folder for run in shared.runs)):
            on_main(lambda folder=folder: stack.enter_context(sole_trainer(folder)))  # type: ignore[misc]
        pairs = zip(shared.runs, readers, strict=True)
        trainings = [Trainings(run, reader, models=models) for run, reader in pairs]
        return [
            folder for seed in shared.runs[0].config.training.seeds for folder in _train(shared, trainings, seed=seed)
        ]


def _train(shared: SharedRun, trainings: Sequence[Trainings], *, seed: int) -> list[Path]:
    """Train all plugs with one seed, unless all are trained, and return their folders."""
    for training in trainings:
        PLUG.prepare(training, seed=seed)
    unfinished = [t for t in trainings if not on_main(lambda run=t.run: run.trained(PLUG.name, seed=seed))]  # type: ignore[misc]
    if unfinished:
        reset_peak_memory()
        starts = [PLUG.start(training, seed=seed) for training in trainings]
        objectives, own_samples = [objective for objective, _ in starts], [samples for _, samples in starts]
        mixture, config = TaskMixture(shared.weights), shared.runs[0].config.training
        mixed = [of_task(sample, task) for task, own in enumerate(own_samples) for sample in own]
        report = _fit(shared, objectives, mixed, mixture=mixture, seed=seed)
        train, _ = mixture.split(mixed, share=config.validation_share, limit=config.validation_limit, seed=seed)
        counts = map(len, mixture.by_task(train))
        for training, objective, samples, count in zip(trainings, objectives, own_samples, counts, strict=True):
            if training in unfinished:
                _save(training, objective, samples, shared=shared, report=report, train_samples=count, seed=seed)
    on_main(lambda: drop_states(shared.training_folder(seed=seed)))
    return [training.run.plug_folder(PLUG.name, seed=seed) for training in trainings]


def _fit(
    shared: SharedRun,
    objectives: Sequence[PlugObjective],
    samples: Sequence[EncodedSample],
    *,
    mixture: TaskMixture,
    seed: int,
) -> FitReport:
    return fit(
        SharedObjective(objectives, mixture=mixture),
        samples=samples,
        config=shared.runs[0].config.training,
        seed=seed,
        folder=shared.training_folder(seed=seed),
        title=f"{PLUG.name} of {len(objectives)} tasks (seed {seed})",
        owner=on_main(lambda: f"{shared.owner} {seed}"),
        mixture=mixture,
        about=shared.runs[0].config,
    )


def _save(
    training: Trainings,
    objective: PlugObjective,
    samples: Sequence[EncodedSample],
    *,
    shared: SharedRun,
    report: FitReport,
    train_samples: int,
    seed: int,
) -> None:
    """Save one task's plug with the facts of the shared training, its own loss and its number of train samples."""
    run, config = training.run, training.run.config.training
    _, held_out = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)
    own_loss = mean_loss(objective, held_out, max_tokens=config.max_tokens_per_microbatch)
    plug = objective.personalizer.plug
    facts: dict[str, object] = asdict(report) | {
        "task": run.task.name,
        "seed": seed,
        "best_loss": own_loss,
        "unit": objective.unit,
        "train_samples": train_samples,
        "validation_samples": len(held_out),
        "shared_by": list(shared.names),
        "shared_loss": report.best_loss,
        "weight": shared.weights[shared.names.index(run.task.name)],
        "peak_memory_bytes": peak_memory(),
        "parameters": sum(parameter.numel() for parameter in plug.parameters()),
    }
    facts = PLUG.save(objective, samples, training, facts=facts, seed=seed)
    folder = run.plug_folder(PLUG.name, seed=seed)
    on_main(lambda: write_facts(folder, facts, owner=run.owner(PLUG.name, seed=seed)))
