"""Service: replies, histories and erasure for live users, without HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from personaplug.data.parsing import Flaw, item_of, options_of, query_of
from personaplug.data.records import HistoryItem, Options
from personaplug.data.task import Task
from personaplug.errors import RequestError
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.fair_executor import FairExecutor
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, check_name
from personaplug.serving.persona_cache import Persona, PersonaCache
from personaplug.serving.recent_requests import RecentRequests
from personaplug.store.history_store import AddResult, StoredItem
from personaplug.store.receipts import Receipt


@dataclass(frozen=True, repr=False)
class ServiceReply:
    """The engine's reply, the persona that it was given, and the id by which feedback refers to it."""

    reply: EngineReply
    persona: Persona
    id: str


@dataclass(frozen=True, repr=False)
class TaskQuery:
    """A prompt as the plug's task parses it."""

    text: str  # what the encoder reads
    options: Options | None  # what the prompt offers to choose from
    is_on_task: bool  # whether the prompt has the task's wording


class Service:
    """Answers users of tenants and keeps their histories.

    `apply_off_task` uses personas also for prompts without the wording of the plug's task, as in no training.
    """

    def __init__(self, personas: PersonaCache, engine: Engine, *, task: Task, apply_off_task: bool = False) -> None:
        self.personas, self.store, self.engine = personas, personas.store, engine
        self.task, self.apply_off_task = task, apply_off_task
        self.recent_requests = RecentRequests()
        # Encoding, erasing and explaining take long: replies must not wait for them.
        self.slow = FairExecutor(3, name="personaplug-slow")
        self.fast = FairExecutor(4, name="personaplug-fast")

    async def respond(self, request: ChatRequest | CompletionRequest, *, tenant: str) -> ServiceReply:
        """Answer a request with its user's persona."""
        self.check_model(request.model)
        arrived, query, options = time.monotonic(), self.parse(request.prompt_text), request.personaplug
        persona = await self.fast.run(
            tenant,
            request.user or "",
            self.personas.persona,
            tenant,
            request.user,
            query=query.text,
            options=query.options,
            persona_scale=options.persona_scale if self.is_personal(query) else 0,
        )
        choices = self.task.labels if query.is_on_task and not options.free else ()
        request_id = secrets.token_hex(12)
        reply = await self.engine.respond(EngineRequest(request, persona.soft, choices, request_id, persona.phrases))
        if request.user is not None:
            self.recent_requests.add(tenant, request.user, request_id=request_id, query=query.text, since=arrived)
        return ServiceReply(reply, persona, request_id)

    async def add_records(self, tenant: str, user: str, *, records: Sequence[dict[str, Any]]) -> AddResult:
        """Add records with the task's fields to a user's history, all of them or none."""
        return await self.slow.run_weighted(
            tenant, user, partial(self._add_records, tenant, user, records), cost=len(records)
        )

    async def add_feedback(self, tenant: str, user: str, *, request_id: str, answer: str) -> AddResult:
        """Add an earlier request, with the answer that its user kept, to the user's history."""
        erased_at = await self.fast.run(tenant, user, self.store.erased_at, tenant, user)
        query = self.recent_requests.query(tenant, user, request_id=request_id, erased_at=erased_at)
        task = self.task
        if task.labels and (answer := answer.strip()) not in task.labels:
            raise RequestError(f"The answer is none of the {len(task.labels)} that {task.name} has.", code="answer")
        if task.answer_field is None:
            fields = dict.fromkeys(task.field_names[:1], answer)  # an item is what the user wrote
        else:
            query_fields = [name for name in task.item_fields if name != task.answer_field]
            fields = dict.fromkeys(query_fields[:1], query) | {task.answer_field: answer}
        ordered = tuple((name, fields.get(name, "")) for name in task.field_names)
        item = HistoryItem(request_id, ordered, task.answer_field)
        return await self.slow.run(tenant, user, self.store.add, tenant, user, [item])

    async def erase_user(self, tenant: str, user: str) -> Receipt:
        """Remove everything of a user, from memory and files."""
        self.recent_requests.forget(tenant, user)
        try:
            return await self.slow.run(tenant, user, self.store.erase_user, tenant, user)
        finally:
            self.personas.forget(tenant, user)
            self.recent_requests.forget(tenant, user)  # what was asked while the files were cleared

    def item_fields(self, item: StoredItem) -> dict[str, Any]:
        """A stored item in the form in which it can be added again, with the time of its arrival."""
        fields = dict(item.fields)
        if not fields and self.task.answer_field and item.label_id >= 0:
            fields = {self.task.answer_field: self.store.settings.labels[item.label_id]}
        day = item.date.isoformat() if item.date else None
        return {"id": item.id, "date": day, "arrived": item.arrived.isoformat(), **fields}

    def parse(self, prompt: str) -> TaskQuery:
        """Parse a prompt as the task does; a prompt without the task's wording is the query as a whole."""
        try:
            return TaskQuery(query_of(self.task, prompt), options_of(self.task, prompt), is_on_task=True)
        except Flaw:
            return TaskQuery(prompt, None, is_on_task=False)

    def is_personal(self, query: TaskQuery) -> bool:
        return query.is_on_task or self.apply_off_task

    def check_model(self, name: str | None) -> None:
        """Check that the engine has a model of this name; None stands for the only one."""
        models = self.engine.models
        if name not in models and (name is not None or len(models) != 1):
            message = f"There is no model of this name here; there is: {', '.join(models)}."
            raise RequestError(message, http_status=404, code="model_not_found")

    async def close(self) -> None:
        """Finish the running replies, then close the engine and the store."""
        await self.engine.close()
        self.slow.shutdown()
        self.fast.shutdown()
        self.store.close()

    def _add_records(self, tenant: str, user: str, records: Sequence[dict[str, Any]]) -> AddResult:
        items = [self._item(record, number) for number, record in enumerate(records, 1)]
        return self.store.add(tenant, user, items)

    def _item(self, record: dict[str, Any], number: int) -> HistoryItem:
        try:
            _, item = item_of(self.task, record)
            check_name(item.id)
        except ValueError as flaw:
            names = ", ".join(self.task.field_names)
            expected = f"An item has an id, {names} and, if it is known, a date."
            raise RequestError(f"item {number}: {flaw}. {expected}", code="item") from None
        return item
