"""A user's LoRA adapter: its training data, its training and its storage.

This follows OPPU (arXiv 2402.04401), without the leak in its code, which trains each user also on the users before.
Here a user starts with a fresh adapter and a fresh optimizer, and trains on the user's own items only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from personaplug.baselines.lora import TASK, USER, LoraAdapters
from personaplug.config import AdapterConfig
from personaplug.data.parsing import Flaw, target_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, DamagedFile, TrainingDiverged
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.tensor_files import load_tensors, save_tensors
from personaplug.llm.base import LanguageModel, PromptBatch

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
"""A prompt and its target."""

FREE_PROMPT = "Write as this person would write."

_MAX_GRAD_NORM = 1.0
_REMEDY = "It is trained again."


def history_pairs(task: Task, prompt: str, query: str, items: Iterable[HistoryItem]) -> list[Pair]:
    """Turn a user's items into prompts and targets of the task.

    The prompt is the sample's, with the item's values (without the answer) in place of the query. Items without
    content, or with an answer that the task does not allow, are left out.

    Some tasks have no such pairs; see `has_history_pairs`. Their prompt is `FREE_PROMPT` and the target is the item's
    first value (LaMP_1: the title; LaMP_7: the tweet). The adapter then learns how the user writes, not the task.
    """
    if not has_history_pairs(task):
        pairs = [(FREE_PROMPT, _first_value(item)) for item in items]
    elif query and prompt.endswith(query):
        head = prompt.removesuffix(query)
        pairs = [(head + content, _allowed_answer(task, item)) for item in items if (content := _content(item))]
    else:
        raise ConfigError(
            "The prompt must end with its query, because the user's items replace the query. Give the prompt and the "
            "query of one sample, as its reader returns them."
        )
    return [pair for pair in pairs if pair[1]]


def has_history_pairs(task: Task) -> bool:
    """True if a history item is a question of the task with its answer.

    This is false if items have no answer (LaMP_1) or only an answer (LaMP_7). It is also false if a pattern finds the
    task's query, because a pattern cannot write a prompt.
    """
    return task.answer_field is not None and task.item_fields != (task.answer_field,) and not task.query_pattern


def user_lora_caveat(task: Task) -> str | None:
    """Return the note that a report on this task must add to the row `lora-per-user`, or None."""
    if not has_history_pairs(task):
        return (
            f"lora-per-user: items of {task.name} are not questions with answers, so a user's adapter learns how the "
            f"user writes, not the tested task."
        )
    if not task.query_after:
        return (
            f"lora-per-user: {task.name} does not declare where a query starts, so users' adapters learn from items "
            f"without the wording of the tested prompts."
        )
    return None


def without_evaluated_items(items: Iterable[HistoryItem], samples: Iterable[Sample]) -> list[HistoryItem]:
    """Drop the items that contain a question of the user's evaluated samples.

    An item is dropped if its content, or one of its values except the answer, equals the query of a sample. Case,
    spaces and punctuation do not count. An item that is only an answer (LaMP_7) is also compared with the targets.
    """
    samples = list(samples)
    queries = {_normalized(sample.query) for sample in samples} - {""}
    targets = {_normalized(sample.target or "") for sample in samples} - {""}
    return [item for item in items if not _is_evaluated(item, queries, targets)]


def _is_evaluated(item: HistoryItem, queries: set[str], targets: set[str]) -> bool:
    values = _values(item)
    if not values:
        return _normalized(item.answer or "") in queries | targets
    return not queries.isdisjoint(map(_normalized, (*values, _content(item))))


def _values(item: HistoryItem) -> list[str]:
    """Return the item's nonblank values except the answer."""
    return [value for name, value in item.fields if name != item.answer_name and value.strip()]


def _content(item: HistoryItem) -> str:
    return " ".join(_values(item))


def _allowed_answer(task: Task, item: HistoryItem) -> str:
    """Return the item's answer, or "" if the task does not allow it as a target."""
    try:
        return target_of(task, (item.answer or "").strip())
    except Flaw:
        return ""


def _first_value(item: HistoryItem) -> str:
    return next((value for value in (*_values(item), item.answer or "") if value.strip()), "")


def _normalized(text: str) -> str:
    """Return the letters and digits of a text, or its other characters if it has none."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, folded)) or "".join(folded.split())


@dataclass(frozen=True)
class UserFit:
    """Number of optimizer steps and seconds of one user's training; 0 without pairs."""

    steps: int
    seconds: float


def fit_user(
    adapters: LoraAdapters, llm: LanguageModel, pairs: Sequence[Pair], *, config: AdapterConfig, seed: int
) -> UserFit:
    """Train a fresh user adapter on the latest pairs, on top of the task's, and leave it in `adapters`.

    AdamW without weight decay at a constant rate. The initial weights and the order of the pairs depend only on
    the seed. The trained weights are rounded to float16, the format on disk, so that reloading changes no prediction.

    Raises:
        TrainingDiverged: if a loss or a gradient is not finite; the user's adapter is fresh then.
    """
    adapters.reset(USER, seed=seed)
    if not pairs:
        return UserFit(steps=0, seconds=0.0)
    began = time.monotonic()
    with adapters.active(TASK, USER), adapters.trainable(USER):
        try:
            steps = _train(adapters, llm, pairs[-config.user_items :], config=config, seed=seed)
        except TrainingDiverged:
            adapters.reset(USER, seed=seed)
            raise
    seconds = time.monotonic() - began
    adapters.load(USER, {path: value.half().float() for path, value in adapters.state(USER).items()})
    return UserFit(steps=steps, seconds=seconds)


def _train(
    adapters: LoraAdapters, llm: LanguageModel, pairs: Sequence[Pair], *, config: AdapterConfig, seed: int
) -> int:
    parameters = list(adapters.module(USER).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lora_learning_rate, weight_decay=0.0)
    step = 0
    for step, batch in enumerate(_shuffled_batches(pairs, config=config, seed=seed), start=1):
        optimizer.zero_grad()
        with torch.enable_grad():
            losses, tokens = llm.loss(PromptBatch([prompt for prompt, _ in batch]), [target for _, target in batch])
            loss = losses.sum() / tokens.sum()
            loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM))
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"A user's LoRA adapter diverged in step {step}: loss {loss.item()}, gradient norm {norm}. "
                f"Use a lower lora_learning_rate (now {config.lora_learning_rate:g}) or dtype=float32."
            )
        optimizer.step()
    optimizer.zero_grad()
    return step


def _shuffled_batches(pairs: Sequence[Pair], *, config: AdapterConfig, seed: int) -> Iterator[list[Pair]]:
    for epoch in range(config.user_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(pairs))
        for start in range(0, len(pairs), config.user_batch_size):
            yield [pairs[index] for index in order[start : start + config.user_batch_size]]


@dataclass(frozen=True)
class UserCosts:
    """The number of users, and the mean seconds of training and bytes on disk per user."""

    users: int
    seconds: float
    bytes: float


@dataclass(frozen=True)
class _TrainingRecord:
    seconds: float
    items: int
    bytes: int


class UserLoraStore:
    """Trained user adapters in a folder, so that the same training never runs twice.

    A key is a list that JSON can hold: the user and all that the adapter depends on (the task's adapter, settings,
    seed, a fingerprint of the items). Only its hash is on disk, so no user is named there. Weights are float16.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._records: dict[str, _TrainingRecord] = {}

    def get(self, key: Sequence[Any]) -> dict[str, torch.Tensor] | None:
        """Return a user's adapter in float32, or None if it is missing or its files are damaged."""
        name = _hash(key)
        weights = self.folder / f"{name}.safetensors"
        if not (weights.exists() and weights.with_suffix(".json").exists()):
            return None
        try:
            record = self._read_record(name)
            state = load_tensors(weights, remedy=_REMEDY)
        except (DamagedFile, TypeError):
            logger.warning("%s: a user's adapter cannot be read and is trained again", self.folder / name)
            return None
        self._records[name] = record
        return {path: value.float() for path, value in state.items()}

    def count_stored(self, key: Sequence[Any]) -> None:
        """Include a user in `costs`, if the store holds one, without loading the weights."""
        name = _hash(key)
        if (self.folder / f"{name}.safetensors").exists():
            with suppress(OSError, DamagedFile, TypeError):
                self._records[name] = self._read_record(name)

    def put(self, key: Sequence[Any], state: dict[str, torch.Tensor], *, seconds: float, items: int) -> None:
        """Store a user's adapter, and the duration and number of items of its training."""
        name, weights = _hash(key), {path: value.half().contiguous() for path, value in state.items()}
        record = _TrainingRecord(seconds, items, bytes=sum(value.nbytes for value in weights.values()))
        save_tensors(self.folder / f"{name}.safetensors", weights)
        # The record comes last, because `get` ignores weights without a record.
        write_checked_json(self.folder / f"{name}.json", asdict(record))
        self._records[name] = record

    def costs(self) -> UserCosts | None:
        """Return the means over the users that this object has loaded, stored or counted; None without any."""
        records = self._records.values()
        if not records:
            return None
        return UserCosts(len(records), fmean(r.seconds for r in records), fmean(r.bytes for r in records))

    def _read_record(self, name: str) -> _TrainingRecord:
        return _TrainingRecord(**read_json(self.folder / f"{name}.json", remedy=_REMEDY))


def _hash(key: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(list(key), sort_keys=True).encode(), digest_size=16).hexdigest()
