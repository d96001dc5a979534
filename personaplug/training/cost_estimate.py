"""Estimate the time, memory and disk space of a training, from the data and a few timed steps."""

from __future__ import annotations

import heapq
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from personaplug.config import Config
from personaplug.config_resolution import resolved
from personaplug.data.records import Sample, characters
from personaplug.data.splits import drawn
from personaplug.data.task import Reader
from personaplug.encoders.base import encode_items
from personaplug.encoders.embedding_store import EmbeddingStore, content_key
from personaplug.encoders.encoded_sample import encoded
from personaplug.errors import MissingData
from personaplug.infra.memory import peak_memory
from personaplug.infra.progress import duration_text
from personaplug.llm.prompt_cache import CachePlan
from personaplug.run import Models, Run
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import build_plug, closed_labels
from personaplug.training.trainer import fit

_INDEX_BYTES = 40  # per row of the embedding store's index, measured
_TIMED_STEPS = 4
_TIMED_ITEMS = 256
_FORWARD_SHARE = 0.4  # forward pass as a share of a training step; validation has no backward pass


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a run; sizes in bytes, times in seconds."""

    samples: int  # after `train_limit`
    items: int
    vectors: int  # distinct items, each encoded once
    disk_bytes: int  # vectors, finished plugs, states of one unfinished training, prompts cached on disk
    memory_bytes: int  # peak of this process with real steps, and prompts cached in memory
    encode_seconds: float
    step_seconds: float
    train_seconds: float  # all trainings, validations included
    trainings: int  # plugs and controls of all seeds
    steps: int  # of one training
    prompts: str = ""  # where prompts are cached, and why; empty for placement=prefix

    def text(self) -> str:
        """Return the estimate as lines of text."""
        steps = f"{self.trainings} × {self.steps:,} steps of {self.step_seconds:.2f} s"
        lines = {
            "samples": f"{self.samples:,} with {self.items:,} items of history",
            "vectors": f"{self.vectors:,} different items to encode, {duration_text(self.encode_seconds)}",
            "trainings": f"{steps}, {duration_text(self.train_seconds)}",
            "prompts": self.prompts,
            "disk": _size(self.disk_bytes),
            "memory": f"{_size(self.memory_bytes)} at most",
            "time": f"{duration_text(self.encode_seconds + self.train_seconds)} in all",
        }
        return "\n".join(f"{name:<13}{line}" for name, line in lines.items() if line)


def estimate(config: Config, reader: Reader, *, models: Models) -> Estimate:
    """Count the data, time a few encodings and training steps on it, and extrapolate."""
    with tempfile.TemporaryDirectory() as temporary:
        config = resolved(config, reader.task)
        run = Run(Path(temporary), config, reader.task, Path(temporary) / "vectors")
        table = run.open_vectors(models.encoder)
        objective = PlugObjective(build_plug(run, models, seed=0), models.llm, table=table, labels=closed_labels(run))
        data = _count(reader, config)
        if data.users < 2:
            raise MissingData(
                f"An estimate needs samples of 2 or more users, because it times real steps; found {data.users}."
            )
        encode_seconds = _time_encoding(data.drawn, models) * data.vectors
        plan, prompt_seconds = _time_prompts(run, data, models)
        step_seconds = _time_steps(run, data, objective, table)
    step_seconds += config.training.batch_size * prompt_seconds * (1 - plan.fraction)
    steps, validation_steps = _planned_steps(config, data.samples)
    trainings = len(config.training.seeds) * (2 if config.training.controls else 1)
    all_steps = trainings * (steps + validation_steps)
    plug_bytes = sum(p.numel() * p.element_size() for p in objective.module.parameters()) * (trainings + 5)
    vector_bytes = data.vectors * (2 * models.encoder.width + _INDEX_BYTES)
    return Estimate(
        samples=data.samples,
        items=data.items,
        vectors=data.vectors,
        disk_bytes=vector_bytes + plug_bytes + (plan.bytes if plan.location == "disk" else 0),
        memory_bytes=peak_memory() + (plan.bytes if plan.location == "memory" else 0),
        encode_seconds=encode_seconds,
        step_seconds=step_seconds,
        train_seconds=all_steps * step_seconds + prompt_seconds * data.samples * plan.fraction,
        trainings=trainings,
        steps=steps,
        prompts=plan.reason,
    )


@dataclass(frozen=True)
class _TrainData:
    samples: int
    items: int
    vectors: int
    users: int
    drawn: list[Sample]  # random samples
    longest: list[Sample]  # samples with the longest prompts


def _count(reader: Reader, config: Config) -> _TrainData:
    """Read the training data once. Memory grows only with distinct items, by 100 bytes for each key."""
    batch_size, with_answer = config.training.batch_size, config.plug.encodes_answers
    rng, number, items = random.Random(0), 0, 0
    keys, owners = set[bytes](), set[str]()
    reservoir, longest = list[Sample](), list[Sample]()
    for number, sample in enumerate(drawn(reader, limit=config.training.train_limit, seed=0), 1):
        items += len(sample.history)
        # Eight bytes of a key are enough: a collision only makes the count one too small.
        keys.update(content_key(item.encoded(with_answer=with_answer))[:8] for item in sample.history)
        owners.add(sample.owner)
        # Reservoir sampling: each sample so far is in the reservoir with the same probability.
        index = rng.randrange(number)
        if len(reservoir) < _TIMED_STEPS * batch_size + 1:
            reservoir.append(sample)
        elif index < len(reservoir):
            reservoir[index] = sample
        longest = heapq.nlargest(batch_size, [*longest, sample], key=lambda sample: characters(sample.full_prompt))
    return _TrainData(number, items, len(keys), len(owners), reservoir, longest)


def _time_prompts(run: Run, data: _TrainData, models: Models) -> tuple[CachePlan, float]:
    """Return the plan of the prompt cache, and the seconds per prompt; 0 if the timed steps include prompts."""
    if run.config.plug.placement != "suffix":
        return CachePlan("nowhere", 0, ""), 0.0
    prompts = list(dict.fromkeys(sample.full_prompt for sample in data.drawn))
    tokens = sum(measure.tokens for measure in models.llm.measure(prompts)) / len(prompts)
    plan = models.llm.plan_prompt_cache([round(tokens)] * data.samples)
    started = time.monotonic()
    models.llm.cache_prompts(prompts)
    return plan, 0.0 if plan.location == "nowhere" else (time.monotonic() - started) / len(prompts)


def _planned_steps(config: Config, samples: int) -> tuple[int, float]:
    """Return the steps of one training, and the cost of its validations in steps."""
    settings = config.training
    train_samples = samples * (1 - settings.validation_share)
    per_epoch = max(1, math.ceil(train_samples * (1 + settings.views) / settings.batch_size))
    steps = min(settings.epochs * per_epoch, settings.max_steps or settings.epochs * per_epoch)
    validations = math.ceil(steps / (settings.eval_steps or max(1, per_epoch // 4)))
    batches = min(settings.validation_limit, samples - train_samples) / settings.batch_size
    return steps, _FORWARD_SHARE * validations * batches


def _time_encoding(samples: Sequence[Sample], models: Models) -> float:
    """Return the seconds per item."""
    items = islice((item for sample in samples for item in sample.history), _TIMED_ITEMS)
    contents = [item.encoded(with_answer=True) for item in items]
    encode_items(models.encoder, contents)  # the first call may build a faster engine
    started = time.monotonic()
    encode_items(models.encoder, contents)
    return (time.monotonic() - started) / max(1, len(contents))


def _time_steps(run: Run, data: _TrainData, objective: PlugObjective, table: EmbeddingStore) -> float:
    """Return the seconds per step, without the first step, which warms up.

    Then run a step on the longest samples, so that it counts for peak memory.
    """
    # One epoch of full batches, with a validation of one sample at its end.
    settings = replace(run.config.training, epochs=1, max_steps=0, train_limit=0, views=0, validation_share=1e-9)
    settings = replace(settings, eval_steps=10**6, save_steps=10**6, report_to="none")
    settings = replace(settings, batch_size=min(settings.batch_size, data.samples))
    stamps: list[float] = []

    def stamp() -> None:
        stamps.append(time.monotonic())

    for samples, steps in ((data.drawn, _TIMED_STEPS), (data.longest, 1)):
        embedded = encoded(samples, table, plug=run.config.plug, labels=run.item_labels)
        # Each sample gets a different user, so that validation holds out only one sample.
        count, folder = steps * settings.batch_size + 1, run.folder / f"fit-{steps}"
        repeated = [replace(embedded[i % len(embedded)], id=str(i), owner=str(i)) for i in range(count)]
        fit(objective, samples=repeated, config=settings, seed=0, folder=folder, title="timing", on_step=stamp)
    return (stamps[_TIMED_STEPS - 1] - stamps[0]) / (_TIMED_STEPS - 1)


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
