"""What a run will cost, said beforehand: vectors, disk, memory and hours, from the data and a few timed steps."""

from __future__ import annotations

import heapq
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from personaplug.config import Config
from personaplug.data.records import Sample
from personaplug.data.task import Reader
from personaplug.encoders.embedding_store import EmbeddingStore, content_key
from personaplug.encoders.encoded_sample import EncodedSample, encode_samples
from personaplug.errors import MissingData
from personaplug.infra.memory import peak_memory
from personaplug.plug.model import PersonaPlug
from personaplug.run import Models, Run, drawn, resolved
from personaplug.training.objectives import PlugObjective
from personaplug.training.recipes import build_plug, closed_answers
from personaplug.training.trainer import fit

_INDEX_BYTES = 40  # of a row in the table's index, measured
_TIMED_STEPS = 4
_TIMED_ITEMS = 256


@dataclass(frozen=True)
class Estimate:
    """What is to be expected; bytes, seconds and counts.

    Attributes:
        samples, items: what is trained on, `train_limit` applied.
        vectors: different items, each encoded once.
        disk_bytes: vectors, their index, finished plugs and the states of one unfinished training.
        memory_bytes: most memory that this process held: the models, training steps on drawn samples and one on the
            longest prompts, and the count of different items; a run holds its prompts and rows of items in its place.
            Prompts kept in memory are added.
        prompts: where prompts ahead of the soft tokens are going to be kept, and why; empty for the placement prefix.
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
    prompts: str = ""

    def text(self) -> str:
        """The estimate for people."""
        whole = self.encode_seconds + self.train_seconds
        return "\n".join(
            [
                f"samples      {self.samples:,} with {self.items:,} items of history",
                f"vectors      {self.vectors:,} different items to encode, {_duration(self.encode_seconds)}",
                f"trainings    {self.trainings} × {self.steps:,} steps of {self.step_seconds:.2f} s, "
                f"{_duration(self.train_seconds)}",
                *([f"prompts      {self.prompts}"] if self.prompts else []),
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
        MissingData: if the split has samples of one user only.
        ConfigError: for settings that the task does not allow, as `train` does.
    """
    with tempfile.TemporaryDirectory() as place:
        config = resolved(config, reader.task)
        run = Run(Path(place), config, reader.task, Path(place) / "vectors")
        plug = build_plug(run, models, seed=0)
        found = _count(reader, config)
        if not found.several_users:
            raise MissingData("An estimate times real steps and needs samples of two users or more in the split.")
        per_item = _time_encoding(found.drawn, models)
        kept = _plan_prompts(run, found, models)
        per_step = _time_training(run, found, plug, models) + kept.step_seconds
    steps, validating = _planned(config, found.samples)
    trainings = len(config.training.seeds) * (2 if config.training.controls else 1)
    plug_bytes = sum(p.numel() * p.element_size() for p in plug.parameters())
    return Estimate(
        samples=found.samples,
        items=found.items,
        vectors=found.vectors,
        disk_bytes=found.vectors * (2 * models.encoder.width + _INDEX_BYTES) + plug_bytes * (trainings + 5) + kept.disk,
        memory_bytes=peak_memory() + kept.memory,
        encode_seconds=per_item * found.vectors,
        step_seconds=per_step,
        train_seconds=trainings * (steps + validating) * per_step + kept.once_seconds,
        trainings=trainings,
        steps=steps,
        prompts=kept.reason,
    )


@dataclass(frozen=True)
class _Counted:
    """What one pass over the data found: counts, samples drawn at random, and those with the longest prompts."""

    samples: int
    items: int
    vectors: int
    several_users: bool
    drawn: list[Sample]
    longest: list[Sample]


def _count(reader: Reader, config: Config) -> _Counted:
    """Read what is trained on once. The set of different items takes about 100 bytes an item; all else stays small."""
    with_answer = config.plug.encodes_answers
    wanted = _TIMED_STEPS * config.training.batch_size + 1
    rng = random.Random(0)
    count = items = 0
    different: set[bytes] = set()
    owners: set[str] = set()
    some: list[Sample] = []
    longest: list[tuple[int, int, Sample]] = []
    for count, sample in enumerate(drawn(reader, limit=config.training.train_limit, seed=0), 1):
        items += len(sample.history)
        # Eight bytes of the key: a collision among millions only makes the estimate one item too small.
        different.update(content_key(item.encoded(with_answer=with_answer))[:8] for item in sample.history)
        if len(owners) < 2:
            owners.add(sample.owner)
        # A reservoir: after each sample, every one so far is among these with the same chance.
        place = rng.randrange(count)
        if len(some) < wanted:
            some.append(sample)
        elif place < wanted:
            some[place] = sample
        heapq.heappush(longest, (len(sample.prompt), count, sample))
        if len(longest) > config.training.batch_size:
            heapq.heappop(longest)
    return _Counted(count, items, len(different), len(owners) > 1, some, [sample for _, _, sample in longest])


@dataclass(frozen=True)
class _Kept:
    """What reading prompts once will take: bytes, seconds before the first step and in each one."""

    reason: str = ""
    memory: int = 0
    disk: int = 0
    once_seconds: float = 0.0
    step_seconds: float = 0.0


def _plan_prompts(run: Run, found: _Counted, models: Models) -> _Kept:
    """Where all prompts find room, from the lengths of the drawn ones and the time it takes to read them."""
    if run.config.plug.placement != "suffix":
        return _Kept()
    prompts = list(dict.fromkeys(sample.prompt for sample in found.drawn))
    tokens = sum(one.tokens for one in models.llm.measure(prompts)) / len(prompts)
    plan = models.llm.plan_prompt_cache(int(tokens * found.samples))
    began = time.monotonic()
    models.llm.cache_prompts(prompts)
    each = (time.monotonic() - began) / len(prompts)
    size = {place: plan.bytes if plan.location == place else 0 for place in ("memory", "disk")}
    if plan.location == "nowhere":  # the timed steps read their prompts, as those of the training will
        return _Kept(plan.reason)
    anew = run.config.training.batch_size * each * (1 - plan.fraction)
    return _Kept(plan.reason, **size, once_seconds=each * found.samples * plan.fraction, step_seconds=anew)


def _planned(config: Config, samples: int) -> tuple[int, float]:
    """Steps of one training, and what its validations cost, in steps."""
    settings = config.training
    kept = samples * (1 - settings.validation_share)
    per_epoch = max(1, math.ceil(kept * (1 + settings.views) / settings.batch_size))
    steps = min(settings.epochs * per_epoch, settings.max_steps or settings.epochs * per_epoch)
    validations = math.ceil(steps / (settings.eval_steps or max(1, per_epoch // 4)))
    batches = min(settings.validation_limit, samples - kept) / settings.batch_size
    # A validation needs the forward pass only: about 2/5 of a step, as nothing is kept for a backward pass.
    return steps, 0.4 * validations * batches


def _time_encoding(samples: Sequence[Sample], models: Models) -> float:
    texts = [item.text for sample in samples for item in sample.history][:_TIMED_ITEMS]
    if not texts:
        return 0.0
    models.encoder.encode(texts)  # a faster engine is made on the first call
    began = time.monotonic()
    models.encoder.encode(texts)
    return (time.monotonic() - began) / len(texts)


def _time_training(run: Run, found: _Counted, plug: PersonaPlug, models: Models) -> float:
    """Seconds that a step takes on the drawn samples; then one step on the longest, for the memory it needs."""
    size = min(run.config.training.batch_size, found.samples)
    stamps = _fit(run, found.drawn, plug, models, steps=_TIMED_STEPS, batch_size=size)
    _fit(run, found.longest, plug, models, steps=1, batch_size=size)
    # The first step also allocates and warms up.
    steady = [later - earlier for earlier, later in pairwise(stamps)]
    return sum(steady) / len(steady)


def _fit(
    run: Run, samples: Sequence[Sample], plug: PersonaPlug, models: Models, *, steps: int, batch_size: int
) -> list[float]:
    """Train for a few full batches of these samples; the time at the end of each step."""
    table = run.open_vectors(models.encoder)
    settings = replace(
        run.config.training,
        batch_size=batch_size,
        epochs=1,
        max_steps=0,
        train_limit=0,
        views=0,
        validation_share=1e-9,
        eval_steps=10**6,
        save_steps=10**6,
        tensorboard=False,
    )
    stamps: list[float] = []
    fit(
        PlugObjective(plug, models.llm, table=table, labels=closed_answers(run)),
        samples=_of_their_own(_encoded(run, samples, table), count=steps * batch_size + 1),
        config=settings,
        seed=0,
        folder=run.folder / f"fit-{steps}",
        title="timing",
        on_step=lambda: stamps.append(time.monotonic()),
    )
    return stamps


def _encoded(run: Run, samples: Sequence[Sample], table: EmbeddingStore) -> list[EncodedSample]:
    plug = run.config.plug
    forms = plug.reads_forms
    return encode_samples(samples, table, labels=run.task.labels, with_answer=plug.encodes_answers, with_forms=forms)


def _of_their_own(samples: Sequence[EncodedSample], *, count: int) -> list[EncodedSample]:
    """That many samples, each as if of another user: validation then holds out just one, and batches stay full."""
    several = [samples[place % len(samples)] for place in range(count)]
    return [replace(sample, id=str(place), owner=str(place)) for place, sample in enumerate(several)]


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
