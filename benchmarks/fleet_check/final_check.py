"""After the load: compare each answer with a reference, and the store with what the clients were told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fleet_check.clients import PROMPT, Clients, Given
from personaplug.analysis.point_estimates import label_distribution
from personaplug.data.records import HistoryItem
from personaplug.data.task_prompts import TaskPrompts
from personaplug.inference import load_plug
from personaplug.llm.base import PromptBatch
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run, open_models
from personaplug.store.history_store import HistoryStore, Receipt

_BATCH = 64
TOLERANCE = 1e-3
"""Largest difference of a probability from the reference; a batch's sums differ from those of one row."""


class References:
    """The probabilities of labels by the code that evaluation uses, without a server or a store."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self.models = open_models(next(iter(runs.values())).config)
        self._plugs = {name: Personalizer(load_plug(run, self.models)) for name, run in runs.items()}
        self._prompts = {name: TaskPrompts(run.task, run.wordings) for name, run in runs.items()}

    def probabilities(self, answers: Sequence[Given]) -> list[Mapping[str, float]]:
        """Return the probabilities that each answer must have, in order."""
        return [row for start in range(0, len(answers), _BATCH) for row in self._batch(answers[start : start + _BATCH])]

    def _batch(self, answers: Sequence[Given]) -> list[Mapping[str, float]]:
        batch = PromptBatch([PROMPT + given.film for given in answers], SoftPrompt.cat(list(map(self._soft, answers))))
        labels = self._prompts[answers[0].model].task.labels
        return [label_distribution(labels, row).probabilities for row in self.models.llm.score(batch, labels).tolist()]

    def _soft(self, given: Given) -> SoftPrompt:
        personalizer, query = self._plugs[given.model], self._prompts[given.model].parse(PROMPT + given.film)
        fields = [(("text", record["text"]), ("score", record["score"])) for record in given.history]
        items = [HistoryItem(record["id"], each, "score") for record, each in zip(given.history, fields, strict=True)]
        history = personalizer.encode(items, encoder=self.models.encoder)
        return personalizer.persona(query.text, history, options=query.options)


def check_answers(answers: Sequence[Given], references: References) -> list[str]:
    """Compare answers with their references; return the faults."""
    faults = []
    for given, expected in zip(answers, references.probabilities(answers), strict=True):
        if _difference(given.probabilities, expected) > TOLERANCE:
            faults.append(f"an answer of {given.model} is not that of its user: {given.probabilities}, not {expected}")
    return faults


def count_interchangeable(answers: Sequence[Given], references: References) -> int:
    """Return how many answers would also pass for the user of the next answer, if that user has other items."""
    others = [*answers[1:], *answers[:1]]
    mixed_up = [replace(given, history=other.history) for given, other in zip(answers, others, strict=True)]
    return sum(
        given.history != stranger.history and _difference(given.probabilities, probabilities) <= TOLERANCE
        for given, stranger, probabilities in zip(answers, mixed_up, references.probabilities(mixed_up), strict=True)
    )


def _difference(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    return max(abs(first[label] - second[label]) for label in second)


def check_store(clients: Clients, *, url: str, secret: Path) -> list[str]:
    """Compare the store with the acknowledged changes, read it without a server, and verify the receipts."""
    faults: list[str] = []
    store = HistoryStore.open(url, secret=secret)
    for user in clients.users:
        items = store.list_items(user.tenant, user.name)
        found = [{"id": item.id} | {name: str(value) for name, value in item.fields} for item in items]
        if found != user.items:
            faults.append(f"{user.tenant}/{user.name}: the store has {len(found)} items, expected {len(user.items)}")
        back = {(user.tenant, user.name, item["id"]) for item in found} & clients.log.erased
        if back:
            faults.append(f"{user.tenant}/{user.name}: {len(back)} erased items are back")
    for tenant, name, receipt in clients.log.receipts:
        if not store.has_issued(Receipt.from_dict(receipt), tenant=tenant, user=name):
            faults.append(f"{tenant}/{name}: a receipt is not valid")
    store.close()
    return faults
