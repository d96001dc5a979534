"""Samples of several tasks in one training: their tasks, the split by user, and how often an epoch shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError
from personaplug.training.batching import user_split


def of_task(sample: EncodedSample, task: int) -> EncodedSample:
    """Return a sample whose id begins with the index of its task, so that ids of different tasks never collide."""
    return replace(sample, id=f"{task}:{sample.id}")


def task_of(sample: EncodedSample) -> int:
    """Return the index of the task in an id from `of_task`."""
    return int(sample.id.partition(":")[0])


@dataclass(frozen=True)
class TaskMixture:
    """How often an epoch shows samples of several tasks.

    Attributes:
        weights: average appearances of a sample in an epoch, by task.
    """

    weights: tuple[float, ...]

    def split(
        self, samples: Sequence[EncodedSample], *, share: float, limit: int, seed: int
    ) -> tuple[list[EncodedSample], list[EncodedSample]]:
        """Split samples into (train, validation).

        Each task holds out the same users as a training of that task alone. A user who is held out in one task is in no
        task's train part.
        """
        train: list[EncodedSample] = []
        validation: list[EncodedSample] = []
        held_out: set[str] = set()
        for own in self.by_task(samples):
            own_train, own_validation = user_split(own, share=share, limit=limit, seed=seed)
            train, validation = train + own_train, validation + own_validation
            held_out |= {sample.owner for sample in own} - {sample.owner for sample in own_train}
        train = [sample for sample in train if sample.owner not in held_out]
        if empty := [task for task, own in enumerate(self.by_task(train), 1) if not own]:
            raise ConfigError(
                f"All users of task {empty[0]} are held out for validation, in this task or another. Add users, or "
                f"lower validation_share."
            )
        return train, validation

    def repeated(self, samples: Sequence[EncodedSample]) -> tuple[list[EncodedSample], list[float]]:
        """Return copies of each sample, as many as an epoch may show, and the share of these that an epoch shows."""
        copies = [max(1, math.ceil(weight)) for weight in self.weights]
        repeated = [sample for sample in samples for _ in range(copies[task_of(sample)])]
        return repeated, [self.weights[task_of(sample)] / copies[task_of(sample)] for sample in repeated]

    def by_task(self, samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        """Return the samples of each task, in their order."""
        groups: list[list[EncodedSample]] = [[] for _ in self.weights]
        for sample in samples:
            groups[task_of(sample)].append(sample)
        return groups
