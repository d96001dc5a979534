"""What a run will cost, said beforehand: vectors, disk, memory and hours, from the data and a few timed steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from personaplug.config import Config
from personaplug.data.base import Reader
from personaplug.errors import MissingData
from personaplug.memory import peak_memory
from personaplug.records import Sample
from personaplug.run import Models, Run
from personaplug.training import build_plug, fit
from personaplug.vectors import content_key

_INDEX_BYTES = 40  # of a row in the table's index, measured
_TIMED_STEPS = 4
_TIMED_ITEMS = 256


@dataclass(frozen=True)
class Estimate:
    """What is to be expected; bytes, seconds and counts.

    Attributes:
        samples, items: what the training split holds.
        vectors: different items, each encoded once.
        disk_bytes: vectors, their index, finished plugs and the states of one unfinished training.
        memory_bytes: most memory at once.
        encode_seconds: encoding the vectors.
        step_seconds: one training step.
        train_seconds: all trainings of the config (controls and seeds included), validations included.
        trainings: how many those are.
        steps: of one training.
    """

    samples: int
    items: int
    vectors: int
    disk_bytes: int
    memory_bytes: int
    encode_seconds: float
    step_seconds: float
    train_seconds: float
    trainings: int
    steps: int

    def text(self) -> str:
        """The estimate for people."""
        whole = self.encode_seconds + self.train_seconds
        return "\n".join(
            [
                f"samples      {self.samples:,} with {self.items:,} items of history",
                f"vectors      {self.vectors:,} different items to encode, {_duration(self.encode_seconds)}",
                f"trainings    {self.trainings} × {self.steps:,} steps of {self.step_seconds:.2f} s, "
                f"{_duration(self.train_seconds)}",
                f"disk         {_size(self.disk_bytes)}",
                f"memory       {_size(self.memory_bytes)} at most",
                f"time         {_duration(whole)} in all",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(config: Config, reader: Reader, *, models: Models) -> Estimate:
    """Count the data, time a few encodings and training steps on it, and extrapolate.

    Raises:
        MissingData: if the split has too few samples to time a step.
    """
    samples, items, vectors = _count(reader, config)
    first = list(islice(reader, _TIMED_STEPS * config.training.batch_size))
    if len({sample.owner for sample in first}) < 2:
        raise MissingData("An estimate times real steps and needs samples of two users or more in the training split.")
    per_item = _time_encoding(first, models)
    used = min(samples, config.training.train_limit or samples)
    kept = used * (1 - config.training.validation_share)
    planned = max(1, round(kept * (1 + config.training.views) / config.training.batch_size)) * config.training.epochs
    steps = min(planned, config.training.max_steps or planned)
    per_step, plug_bytes = _time_training(config, first, models)
    validations = (
        4 * config.training.epochs if not config.training.validate_every else (steps / config.training.validate_every)
    )
    validated = min(config.training.validation_limit, used - kept) / config.training.batch_size
    trainings = len(config.training.seeds) * (2 if config.training.controls else 1)
    # A validation needs the forward pass only: about 2/5 of a step, as nothing is kept for a backward pass.
    seconds = trainings * (steps + 0.4 * validations * validated) * per_step
    disk = vectors * (2 * models.encoder.width + _INDEX_BYTES) + plug_bytes * (trainings + 5)
    return Estimate(
        samples, items, vectors, disk, peak_memory(), per_item * vectors, per_step, seconds, trainings, steps
    )


def _count(reader: Reader, config: Config) -> tuple[int, int, int]:
    with_answer = config.plug.answers == "text"
    samples = items = 0
    different: set[bytes] = set()
    for sample in reader:
        samples, items = samples + 1, items + len(sample.history)
        # Eight bytes of the key: a collision among millions only makes the estimate one item too small.
        different.update(content_key(i.text if with_answer else i.content)[:8] for i in sample.history)
    return samples, items, len(different)


def _time_encoding(samples: Sequence[Sample], models: Models) -> float:
    texts = [item.text for sample in samples for item in sample.history][:_TIMED_ITEMS]
    if not texts:
        return 0.0
    models.encoder.encode(texts[:8])
    began = time.monotonic()
    models.encoder.encode(texts)
    return (time.monotonic() - began) / len(texts)


def _time_training(config: Config, samples: Sequence[Sample], models: Models) -> tuple[float, int]:
    """Seconds a step of the plug's training takes on these samples, and the size of its weights."""
    with tempfile.TemporaryDirectory() as place:
        from personaplug.data.base import Task
        from personaplug.samples import encode_samples

        task = Task(
            "estimate",
            "label" if config.plug.answers == "label" else "text",
            ("text",),
            None,
            (),
            labels=tuple(sorted({s.target or "" for s in samples})),
        )
        run = Run(Path(place), config, task, Path(place) / "vectors")
        table = run.open_vectors(models.encoder)
        encoded = encode_samples(samples, table, labels=task.labels, with_answer=config.plug.answers == "text")
        plug = build_plug(run, models, name="plug", seed=0)
        timed = replace(
            config.training,
            max_steps=_TIMED_STEPS,
            epochs=_TIMED_STEPS,
            views=0,
            validation_limit=1,
            validate_every=10**6,
            checkpoint_every=10**6,
            tensorboard=False,
        )
        stamps: list[float] = []
        report = fit(
            plug,
            models.backend,
            table=table,
            samples=encoded,
            config=timed,
            seed=0,
            folder=Path(place) / "fit",
            title="timing",
            on_step=lambda: stamps.append(time.monotonic()),
        )
        size = sum(p.numel() * p.element_size() for p in plug.parameters())
    # The first step also allocates and warms up.
    steady = [b - a for a, b in pairwise(stamps)]
    return sum(steady) / len(steady) if steady else report.seconds, size


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
