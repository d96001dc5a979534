"""One user's own matrices: what they are trained on, the training, and the store on disk.

After OPPU (arXiv 2402.04401), without the leak of its code, where each user is trained on the users before as well:
here a user begins with fresh matrices, a fresh optimizer and nothing but the user's own items.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from personaplug.baselines.lora import TASK, USER, LoraAdapters
from personaplug.config import AdapterConfig
from personaplug.data.parsing import Flaw, target_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, TrainingDiverged
from personaplug.infra.atomic_io import atomic_write, write_json
from personaplug.llm.base import LanguageModel, PromptBatch

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
"""A prompt and its answer."""

FREE_PROMPT = "Write as this person would write."

_CLIP = 1.0

# ---- what a user is trained on


def history_pairs(task: Task, prompt: str, query: str, items: Iterable[HistoryItem]) -> list[Pair]:
    """Turn a user's own items into what the task asks and the user answered.

    The prompt is the sample's, with its query replaced by the item's values other than the answer, joined by a space.
    Items that lack one of the two, or whose answer is none of the task's labels, are left out.

    Some tasks have no such pairs in their histories: an item has no answer (LaMP_1), is nothing but its answer
    (LaMP_7), or the query's place in the input is found by a pattern, which tells how to read an input and not how to
    write one. There the prompt is one fixed sentence and the target the first of the item's values (LaMP_1: the
    title; LaMP_7: the tweet). The matrices then learn how the user writes and not the task that is tested; whoever
    reports such a row says so beside it.

    Args:
        prompt, query: of a sample of this task; the query is the end of the prompt (`data.fields.query_of`).
        items: the user's, oldest first.
    Raises:
        ConfigError: if the prompt does not end with the query.
    """
    if answers_in_history(task):
        head = _before(prompt, query)
        found = ((head + _content(item), _answer(task, item)) for item in items if _content(item))
    else:
        found = ((FREE_PROMPT, _own_words(item)) for item in items)
    return [(asked, answered) for asked, answered in found if answered]


def answers_in_history(task: Task) -> bool:
    """Whether an item of this task's histories is a question of the task with its answer (see `history_pairs`)."""
    return task.answer_field is not None and task.item_fields != (task.answer_field,) and not task.query_pattern


def remark(task: Task) -> str | None:
    """What has to be said beside a per-user row of this task, if anything."""
    if not answers_in_history(task):
        return (
            f"lora-per-user: the items of {task.name} hold no pairs of question and answer, so users' matrices learn "
            f"how they write and not the task that is tested."
        )
    if not task.query_after:
        return (
            f"lora-per-user: where the query starts in an input of {task.name} is not declared, so users' matrices "
            f"learn from their items without the wording that is tested."
        )
    return None


def without_asked(items: Iterable[HistoryItem], samples: Iterable[Sample]) -> list[HistoryItem]:
    """Leave out the items that hold what a user's evaluated samples ask.

    An item goes if its content, or one of the values that make it, is the query of one of the samples; case, spaces
    and punctuation aside. An item that is nothing but its answer (LaMP_7) goes too if it is a sample's target.
    """
    queries, targets = set(), set()
    for sample in samples:
        queries.add(_plain(sample.query))
        targets.add(_plain(sample.target or ""))
    return [item for item in items if not _asked(item, queries - {""}, targets - {""})]


def _asked(item: HistoryItem, queries: set[str], targets: set[str]) -> bool:
    values = _values(item)
    if queries & {_plain(value) for value in (*values, " ".join(values))}:
        return True
    return not values and _plain(_own_words(item)) in queries | targets


def _before(prompt: str, query: str) -> str:
    if not query or not prompt.endswith(query):
        raise ConfigError(
            "The prompt should end with its query, which a user's items then take the place of; it does not. Give "
            "prompt and query of one sample, as its reader made them."
        )
    return prompt[: -len(query)]


def _values(item: HistoryItem) -> list[str]:
    """The item's values other than the answer, without blank ones."""
    return [value for name, value in item.fields if name != item.answer_name and value.strip()]


def _content(item: HistoryItem) -> str:
    return " ".join(_values(item))


def _answer(task: Task, item: HistoryItem) -> str:
    """What the user answered; empty where it is nothing that the task can be answered with."""
    try:
        return target_of(task, (item.answer or "").strip())
    except Flaw:
        return ""


def _own_words(item: HistoryItem) -> str:
    return next((value for value in (*_values(item), item.answer or "") if value.strip()), "")


def _plain(text: str) -> str:
    """A text as it is compared: letters and digits; a text that has none keeps its other signs."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, folded)) or "".join(folded.split())


# ---- the training


@dataclass(frozen=True)
class UserFit:
    """What the training of one user was.

    Attributes:
        steps: optimizer steps done; 0 where the user has no pairs, and the matrices change nothing.
        seconds: time of these steps.
    """

    steps: int
    seconds: float


def fit_user(
    adapters: LoraAdapters, llm: LanguageModel, pairs: Sequence[Pair], *, config: AdapterConfig, seed: int
) -> UserFit:
    """Train a user's matrices from fresh ones, on top of the task's, and leave them in `adapters`.

    AdamW without decay at a constant rate; the order of the pairs, like the first matrices, depends on the seed alone.
    The trained values are rounded to float16, in which they are stored: a user answers the same when loaded later.

    Args:
        adapters: attached to the backend's model; the task's matrices stay as they are.
        pairs: of this user only, oldest first; the latest `user_items` are used.
    Raises:
        TrainingDiverged: if a loss or a gradient is NaN or infinite; the user's matrices are fresh then.
    """
    adapters.reset(USER, seed=seed)
    used = list(pairs)[-config.user_items :]
    if not used:
        return UserFit(steps=0, seconds=0.0)
    with adapters.active(TASK, USER), adapters.trainable(USER):
        began = time.monotonic()
        try:
            steps = _train(adapters, llm, used, config=config, seed=seed)
        except TrainingDiverged:
            adapters.reset(USER, seed=seed)
            raise
        seconds = time.monotonic() - began
    adapters.load(USER, _rounded(adapters.state(USER)))
    return UserFit(steps=steps, seconds=seconds)


def _train(
    adapters: LoraAdapters, llm: LanguageModel, pairs: Sequence[Pair], *, config: AdapterConfig, seed: int
) -> int:
    parameters = list(adapters.module(USER).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lora_learning_rate, weight_decay=0.0)
    steps = 0
    for batch in _shuffled_batches(pairs, config=config, seed=seed):
        optimizer.zero_grad()
        with torch.enable_grad():
            losses, tokens = _losses(llm, batch)
            loss = losses.sum() / tokens.sum()
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
            raise TrainingDiverged(
                f"A user's matrices: the loss became {float(loss.detach())} and the gradient {float(norm)} in step "
                f"{steps + 1}. Use a lower lora_learning_rate (it is {config.lora_learning_rate:g}) or dtype=float32."
            )
        optimizer.step()
        steps += 1
    optimizer.zero_grad()
    return steps


def _shuffled_batches(pairs: Sequence[Pair], *, config: AdapterConfig, seed: int) -> Iterator[list[Pair]]:
    for epoch in range(config.user_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(pairs))
        for start in range(0, len(pairs), config.user_batch_size):
            yield [pairs[place] for place in order[start : start + config.user_batch_size]]


def _losses(llm: LanguageModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    return llm.loss(PromptBatch([asked for asked, _ in pairs]), [answered for _, answered in pairs])


def _rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: value.half().float() for path, value in state.items()}


# ---- the store


@dataclass(frozen=True)
class UserCosts:
    """What a user costs in the mean.

    Attributes:
        users: how many the means are over.
        seconds: of training.
        bytes: of the stored matrices.
    """

    users: int
    seconds: float
    bytes: float


@dataclass(frozen=True)
class _Facts:
    seconds: float
    items: int
    bytes: int


class UserLoraStore:
    """Trained matrices of users in a folder, so that no user is trained twice for the same thing.

    A key is a list of facts that JSON can hold: the user and all that the matrices depend on (the task's matrices,
    settings, seed, a fingerprint of the items). Only its hash is written: no name of a user is on disk. The matrices
    are stored in float16.

    Args:
        folder: where they are; made when the first one is stored.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._met: dict[str, _Facts] = {}

    def get(self, key: Sequence[Any]) -> dict[str, Tensor] | None:
        """Return a user's matrices in float32, or None if they are not there, or not readable as a whole."""
        name = _hash(key)
        try:
            facts = self._facts(name)
            state = load_file(self.folder / f"{name}.safetensors")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, SafetensorError):
            logger.warning("%s: the matrices of a user cannot be read, and are trained again", self.folder / name)
            return None
        self._met[name] = facts
        return {path: value.float() for path, value in state.items()}

    def meet(self, key: Sequence[Any]) -> None:
        """Count a user in `costs`, if they are stored, without reading their matrices."""
        name = _hash(key)
        if name not in self._met and (self.folder / f"{name}.safetensors").exists():
            with suppress(OSError, ValueError, TypeError):
                self._met[name] = self._facts(name)

    def _facts(self, name: str) -> _Facts:
        return _Facts(**json.loads((self.folder / f"{name}.json").read_bytes()))

    def put(self, key: Sequence[Any], state: dict[str, Tensor], *, seconds: float, items: int) -> None:
        """Store a user's matrices; those stored earlier under this key are replaced.

        Args:
            state: as `LoraAdapters.state` gives it.
            seconds: that the training took.
            items: that the user was trained on.
        Raises:
            StorageError: if the disk is full or not writable.
        """
        name, halves = _hash(key), {path: value.half().contiguous() for path, value in state.items()}
        facts = _Facts(seconds, items, bytes=sum(value.nbytes for value in halves.values()))
        atomic_write(self.folder / f"{name}.safetensors", lambda path: save_file(halves, path))
        # Last, because a user counts as stored once the facts are there.
        write_json(self.folder / f"{name}.json", asdict(facts))
        self._met[name] = facts

    def costs(self) -> UserCosts | None:
        """What a user costs in the mean, over those found or stored through this object; None without any."""
        met = list(self._met.values())
        if not met:
            return None
        return UserCosts(len(met), seconds=fmean(one.seconds for one in met), bytes=fmean(one.bytes for one in met))


def _hash(key: Sequence[Any]) -> str:
    """32 hex digits of a key."""
    return hashlib.blake2b(json.dumps(list(key), sort_keys=True).encode(), digest_size=16).hexdigest()
