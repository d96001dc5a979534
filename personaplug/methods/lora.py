"""Rows with a LoRA in the model: the task's alone (`lora`), and each user's on top of it (`lora-per-user`, OPPU).

Each user's LoRA is trained once, on the history of the user's sample whose history ends earliest, without later items.
Items that contain the query of an evaluated sample of the user are left out too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from personaplug.baselines.lora import TASK, USER, LoraAdapters
from personaplug.baselines.user_lora import (
    Pair,
    UserLoraStore,
    fit_user,
    history_pairs,
    user_lora_caveat,
    without_evaluated_items,
)
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.infra.progress import Progress
from personaplug.methods.base import ModelInputs
from personaplug.methods.context import Assignment, EvalContext
from personaplug.methods.costs import UserCost
from personaplug.methods.language_model import LanguageModelMethod
from personaplug.methods.predictions import Predictions, joined
from personaplug.run import Models, Run
from personaplug.training.baseline_parts import ADAPTER, LORA, task_lora
from personaplug.training.trainings import TrainedPart


@dataclass(frozen=True)
class LoraMethod(LanguageModelMethod):
    """The language model with the task's LoRA."""

    @property
    def requires(self) -> tuple[TrainedPart, ...]:
        return (LORA, *super().requires)

    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        with task_lora(context.run, context.models, seed=seed):
            return super().predict(context, inputs, seed=seed)

    def reference_nll(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        with task_lora(context.run, context.models, seed=seed):
            return super().reference_nll(context, inputs, seed=seed)

    def sampled_answers(
        self, context: EvalContext, inputs: ModelInputs, *, count: int, seed: int
    ) -> list[list[str]] | None:
        with task_lora(context.run, context.models, seed=seed):
            return super().sampled_answers(context, inputs, count=count, seed=seed)

    def divergence(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        """Return None, because a model with a LoRA is not the plain model."""
        return None

    def identification(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[float | None] | None:
        """Return None, because each persona would be another LoRA in the model."""
        return None


@dataclass(frozen=True)
class UserLoraMethod(LoraMethod):
    """The language model with the task's LoRA and, on top of it, a LoRA for each user."""

    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        inputs = super().build_inputs(context, assignments, seed=seed)
        users = self._users(context, seed=seed)
        return replace(
            inputs,
            items_used=[0 if a.source is None else users.trained_items(a.source) for a in assignments],
            cut_items_rate=users.cut_items_rate(),
        )

    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        parts = [
            (indices, self._predict(context, samples, prompter=None, seed=seed))
            for indices, samples in self._by_user(context, inputs, seed=seed)
        ]
        return joined(parts, len(inputs.samples))

    def reference_nll(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        nll: list[list[float]] = [[] for _ in inputs.samples]
        for indices, samples in self._by_user(context, inputs, seed=seed):
            for index, row in zip(
                indices, self._reference_nll(context, samples, prompter=None, seed=seed), strict=True
            ):
                nll[index] = row
        return nll

    def sampled_answers(
        self, context: EvalContext, inputs: ModelInputs, *, count: int, seed: int
    ) -> list[list[str]] | None:
        answers: list[list[str]] = [[] for _ in inputs.samples]
        for indices, samples in self._by_user(context, inputs, seed=seed):
            of_user = self._sampled_answers(context, samples, prompter=None, count=count, seed=seed)
            for index, texts in zip(indices, of_user, strict=True):
                answers[index] = texts
        return answers

    def cache_key(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[Any] | None:
        key = super().cache_key(context, inputs, seed=seed) or []
        return [*key, asdict(context.run.config.adapter), seed]

    def user_cost(self, context: EvalContext, inputs: ModelInputs) -> UserCost | None:
        return self._users(context, seed=context.run.config.training.seeds[0]).cost()

    def remark(self, task: Task) -> str | None:
        return user_lora_caveat(task)

    @property
    def can_be_shuffled(self) -> bool:
        return False

    def _users(self, context: EvalContext, *, seed: int) -> UserLoras:
        return context.once(
            ("user-loras", seed),
            lambda: UserLoras(context.run, context.models, context.shown_texts, seed=seed),
        )

    def _by_user(
        self, context: EvalContext, inputs: ModelInputs, *, seed: int
    ) -> Iterator[tuple[list[int], list[EncodedSample]]]:
        """Yield the samples user by user, with their indices, while that user's LoRA is in the model."""
        users = self._users(context, seed=seed)
        by_owner: dict[str | None, list[int]] = {}
        for index, assignment in enumerate(inputs.assignments):
            owner = None if assignment.source is None else context.owners[assignment.source]
            by_owner.setdefault(owner, []).append(index)
        with (
            task_lora(context.run, context.models, seed=seed) as adapters,
            Progress(self._title(seed), total=len(by_owner), unit="users") as progress,
        ):
            for owner, indices in by_owner.items():
                with users.loaded(owner, adapters):
                    yield indices, [inputs.samples[index] for index in indices]
                progress.advance()


class UserLoras:
    """The LoRAs of the users of some samples, for one seed; each is trained on first use.

    Args:
        run: a run whose task LoRA is trained.
        texts: the evaluated samples with the texts of the items that rows may use.
        seed: seed of the task's LoRA and of the users' trainings.
    """

    def __init__(self, run: Run, models: Models, texts: Sequence[Sample], *, seed: int) -> None:
        self.run, self.models, self.seed = run, models, seed
        self.owners = [text.owner for text in texts]
        self.by_owner: dict[str, list[Sample]] = {}
        for text in texts:
            self.by_owner.setdefault(text.owner, []).append(text)
        self.store = UserLoraStore(run.folder / "users")
        self._pairs_by_owner: dict[str, list[Pair]] = {}

    def cost(self) -> UserCost | None:
        """Return the mean size and training time of a user's LoRA; None if none is stored."""
        for owner in self.by_owner:
            self.store.count_stored(self._key(owner))
        costs = self.store.costs()
        return None if costs is None else UserCost(costs.bytes, costs.seconds)

    def trained_items(self, sample: int) -> int:
        """Return the number of items that the LoRA of a sample's user is trained on."""
        return len(self._pairs(self.owners[sample]))

    def cut_items_rate(self) -> float:
        """Return the share of the items in users' longest histories that their LoRAs are not trained on."""
        sizes = {owner: max(len(text.history) for text in texts) for owner, texts in self.by_owner.items()}
        trained = sum(len(self._pairs(owner)) for owner in sizes)
        return 1 - trained / sum(sizes.values()) if any(sizes.values()) else 0.0

    @contextmanager
    def loaded(self, owner: str | None, adapters: LoraAdapters) -> Iterator[None]:
        """Apply a user's LoRA on top of the task's within a block; without an owner, apply the task's alone."""
        if owner is None:
            adapters.reset(USER, seed=self.seed)
        else:
            self._load(owner, adapters)
        with adapters.active(TASK, USER):
            yield

    def _load(self, owner: str, adapters: LoraAdapters) -> None:
        key = self._key(owner)
        state = self.store.get(key)
        if state is None:
            pairs = self._pairs(owner)
            report = fit_user(adapters, self.models.llm, pairs, config=self.run.config.adapter, seed=self.seed)
            self.store.put(key, adapters.state(USER), seconds=report.seconds, items=len(pairs))
            state = adapters.state(USER)
        adapters.load(USER, state)

    def _pairs(self, owner: str) -> list[Pair]:
        if owner not in self._pairs_by_owner:
            text = self.by_owner[owner][0]
            pairs = history_pairs(self.run.task, text.prompt, text.query, self._items(owner))
            self._pairs_by_owner[owner] = pairs
        return self._pairs_by_owner[owner]

    def _items(self, owner: str) -> list[HistoryItem]:
        samples = self.by_owner[owner]
        with_history = [sample for sample in samples if sample.history] or samples
        earliest = min(with_history, key=lambda sample: (_last_date(sample), len(sample.history)))
        answers = [item for item in earliest.history if item.kind == "answer"]
        return without_evaluated_items(answers, samples)[-self.run.config.adapter.user_items :]

    @cached_property
    def _task_weights(self) -> str:
        path = self.run.check_trained(LORA.name, seed=self.seed) / ADAPTER
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _key(self, owner: str) -> list[object]:
        """Return everything that a user's LoRA depends on."""
        llm, settings = self.models.llm, self.run.config.adapter
        texts = hashlib.sha256(json.dumps(self._pairs(owner)).encode()).hexdigest()
        rates = [settings.lora_learning_rate, settings.user_epochs, settings.user_batch_size, self.seed]
        return [owner, texts, self._task_weights, llm.identity.fingerprint, llm.dtype, *rates]


def _last_date(sample: Sample) -> date:
    return max((item.date for item in sample.history if item.date is not None), default=date.min)
