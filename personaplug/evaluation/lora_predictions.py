"""The rows `lora`, `plug+lora` and `lora-per-user`: answers of a model that carries the task's matrices, and for the
last a user's own on top.

Every user is trained once, on the history of the one question of theirs whose history ends earliest: what was asked
later is not in it. Items that hold what any of the user's evaluated questions asks are left out all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property

from personaplug.baselines.lora import TASK, USER, LoraAdapters
from personaplug.baselines.user_lora import Pair, UserLoraStore, fit_user, history_pairs, without_evaluated_items
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.evaluation.predictions import Answers, all_or_none
from personaplug.evaluation.user_costs import Cost
from personaplug.infra.progress import Progress
from personaplug.run import Models, Run
from personaplug.training.recipes import ADAPTER, task_matrices

Ask = Callable[[Sequence[EncodedSample], str], Answers]


class LoraPredictor:
    """The matrices of one seed, and the users they are asked for.

    Args:
        run: with the task's matrices trained.
        texts: the evaluated samples with their histories' texts; only needed for users' own matrices.
        latest: train on so many of the latest items only; -1 = all (`user_items` holds in any case).
        seed: of the task's matrices and of the users' trainings.
    """

    def __init__(self, run: Run, models: Models, *, texts: Sequence[Sample], latest: int, seed: int) -> None:
        self.run, self.models, self.latest, self.seed = run, models, latest, seed
        self.owners = [text.owner for text in texts]
        self.by_owner: dict[str, list[Sample]] = {}
        for text in texts:
            self.by_owner.setdefault(text.owner, []).append(text)
        self._known: dict[str, list[Pair]] = {}
        self.store = UserLoraStore(run.folder / "users")
        self.weights = run.check_trained("lora", seed=seed) / ADAPTER

    def answers(
        self,
        samples: Sequence[EncodedSample],
        lenders: Sequence[int | None],
        *,
        ask: Ask,
        per_user: bool,
        title: str,
    ) -> Answers:
        """Answer samples with the task's matrices, or each with those of its lender's user on top.

        Args:
            samples: as they are shown.
            lenders: (n,) the sample whose user's matrices answer it; None = nobody's.
            ask: answers some samples.
        """
        with task_matrices(self.run, self.models, seed=self.seed) as adapters:
            if per_user:
                return self._by_user(samples, lenders, adapters, ask=ask, title=title)
            return ask(samples, title)

    def cost(self) -> Cost | None:
        """Bytes of a user's matrices and seconds of their training, in the mean; None if nobody's are stored."""
        for owner in self.by_owner:
            self.store.count_stored(self._key(owner, self._pairs(owner)))
        costs = self.store.costs()
        return None if costs is None else Cost(costs.bytes, costs.seconds)

    def learned(self, sample: int) -> int:
        """How many items the matrices of a sample's user are trained on."""
        return len(self._pairs(self.owners[sample]))

    def left_out(self) -> float:
        """Share of the items in users' longest histories that their matrices are not trained on."""
        held = {owner: max(len(text.history) for text in texts) for owner, texts in self.by_owner.items()}
        used = sum(len(self._pairs(owner)) for owner in held)
        return 1 - used / sum(held.values()) if any(held.values()) else 0.0

    def _by_user(
        self,
        samples: Sequence[EncodedSample],
        lenders: Sequence[int | None],
        adapters: LoraAdapters,
        *,
        ask: Ask,
        title: str,
    ) -> Answers:
        places: dict[str | None, list[int]] = {}
        for place, lender in enumerate(lenders):
            places.setdefault(None if lender is None else self.owners[lender], []).append(place)
        parts: list[tuple[list[int], Answers]] = []
        with Progress(title, total=len(places), unit="users") as progress:
            for owner, held in places.items():
                self._load(owner, adapters)
                with adapters.active(TASK, USER):
                    parts.append((held, ask([samples[place] for place in held], title)))
                progress.advance()
        return _joined(parts, len(samples))

    def _load(self, owner: str | None, adapters: LoraAdapters) -> None:
        """Put a user's matrices in place, training them if that has not been done."""
        if owner is None:
            adapters.reset(USER, seed=self.seed)
            return
        pairs = self._pairs(owner)
        key = self._key(owner, pairs)
        state = self.store.get(key)
        if state is None:
            fitted = fit_user(adapters, self.models.llm, pairs, config=self.run.config.adapter, seed=self.seed)
            self.store.put(key, adapters.state(USER), seconds=fitted.seconds, items=len(pairs))
            state = adapters.state(USER)
        adapters.load(USER, state)

    def _pairs(self, owner: str) -> list[Pair]:
        if owner not in self._known:
            text = self.by_owner[owner][0]
            self._known[owner] = history_pairs(self.run.task, text.prompt, text.query, self._items(owner))
        return self._known[owner]

    def _items(self, owner: str) -> list[HistoryItem]:
        samples = self.by_owner[owner]
        some = [sample for sample in samples if sample.history] or samples
        earliest = min(some, key=lambda sample: (_ends(sample), len(sample.history)))
        items = without_evaluated_items(earliest.history, samples)
        limit = self.run.config.adapter.user_items
        limit = limit if self.latest < 0 else min(limit, self.latest)
        return items[-limit:] if limit else []

    @cached_property
    def _task_weights(self) -> str:
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def _key(self, owner: str, pairs: Sequence[Pair]) -> list[object]:
        llm, settings = self.models.llm, self.run.config.adapter
        texts = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        about = [settings.lora_learning_rate, settings.user_epochs, settings.user_batch_size, self.seed]
        return [owner, texts, self._task_weights, llm.identity.fingerprint, llm.dtype, *about]


def _ends(sample: Sample) -> date:
    dates = [item.date for item in sample.history if item.date is not None]
    return max(dates) if dates else date.min


def _joined(parts: Sequence[tuple[list[int], Answers]], count: int) -> Answers:
    """Answers of groups of samples, in the samples' order."""
    texts, unfinished = [""] * count, [False] * count
    for places, made in parts:
        for place, text, cut in zip(places, made.texts, made.unfinished, strict=True):
            texts[place], unfinished[place] = text, cut
    seconds, peak = sum(made.seconds for _, made in parts), max(made.peak_memory_bytes for _, made in parts)
    probabilities = _lines_joined([(places, made.probabilities) for places, made in parts], count)
    reference_nll = _lines_joined([(places, made.reference_nll) for places, made in parts], count)
    return Answers(texts, unfinished, seconds, peak, probabilities=probabilities, reference_nll=reference_nll)


def _lines_joined(parts: Sequence[tuple[list[int], list[list[float]] | None]], count: int) -> list[list[float]] | None:
    """Lines of numbers of groups of samples, in the samples' order; None if a group has none."""
    joined: list[list[float] | None] = [None] * count
    for places, lines in parts:
        if lines is not None:
            for place, line in zip(places, lines, strict=True):
                joined[place] = line
    return all_or_none(joined)
