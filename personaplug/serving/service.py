"""Service: replies, histories and erasure for live users, without HTTP."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from personaplug.data.parsing import Flaw, item_of, options_of, query_of
from personaplug.data.records import HistoryItem, Options
from personaplug.data.task import Task
from personaplug.errors import RequestError, UserErased
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, check_name
from personaplug.serving.persona_cache import Persona, PersonaCache
from personaplug.serving.recent_requests import RecentRequests, unknown_request
from personaplug.store.history_store import AddResult, StoredItem, Ticket
from personaplug.store.maintenance import Maintenance
from personaplug.store.receipts import Receipt

P = ParamSpec("P")
T = TypeVar("T")


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
        self._slow_pool = ThreadPoolExecutor(2, thread_name_prefix="personaplug-slow")
        self._store_pool = ThreadPoolExecutor(16, thread_name_prefix="personaplug-store")
        self._maintenance = Maintenance(self.store)

    async def respond(self, request: ChatRequest | CompletionRequest, *, tenant: str) -> ServiceReply:
        """Answer a request with its user's persona."""
        self.check_model(request.model)
        ticket = await self.admit(tenant, request.user) if request.user is not None else None
        query, options = self.parse(request.prompt_text), request.personaplug
        make_persona = partial(
            self.personas.persona,
            ticket,
            query=query.text,
            options=query.options,
            persona_scale=options.persona_scale if self.is_personal(query) else 0,
        )
        # Without a user, the store is not asked: threads that wait for it must not keep such requests waiting.
        persona = await (self.run_store(make_persona) if ticket else asyncio.to_thread(make_persona))
        choices = self.task.labels if query.is_on_task and not options.free else ()
        request_id = secrets.token_hex(12)
        reply = await self.engine.respond(EngineRequest(request, persona.soft, choices, request_id, persona.phrases))
        if ticket:
            await self._check_not_erased(ticket, reply)
            self.recent_requests.add(ticket, request_id=request_id, query=query.text)
        return ServiceReply(reply, persona, request_id)

    async def _check_not_erased(self, ticket: Ticket, reply: EngineReply) -> None:
        """Withhold a reply that was made with the persona of a user who has been erased meanwhile."""
        try:
            await self.run_store(self.store.check, ticket)
        except BaseException:
            if not isinstance(reply.body, bytes):
                await reply.body.aclose()
            raise

    async def add_records(self, tenant: str, user: str, *, records: Sequence[dict[str, Any]]) -> AddResult:
        """Add records with the task's fields to a user's history, all of them or none."""
        ticket = await self.admit(tenant, user)
        items = [self._item(record, number) for number, record in enumerate(records, 1)]
        return await self.run_slow(self.store.add, ticket, items)

    async def add_feedback(self, tenant: str, user: str, *, request_id: str, answer: str) -> AddResult:
        """Add an earlier request, with the answer that its user kept, to the user's history."""
        query, ticket = self.recent_requests.find(tenant, user, request_id=request_id)
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
        try:
            return await self.run_slow(self.store.add, ticket, [item])
        except UserErased:  # by another process, which has no access to what is kept here
            raise unknown_request() from None

    async def erase_user(self, tenant: str, user: str) -> Receipt:
        """Remove everything of a user, from memory and files."""
        self.recent_requests.forget(tenant, user)
        try:
            return await self.run_slow(self.store.erase_user, tenant, user)
        finally:
            self.personas.forget(tenant, user)
            self.recent_requests.forget(tenant, user)  # what was asked while the files were cleared

    async def admit(self, tenant: str, user: str) -> Ticket:
        """Return what a request that has just come needs to store something for a user."""
        return await self.run_store(self.store.admit, tenant, user)

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

    async def run_store(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that asks the store, in a thread for that alone: a database may hang."""
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, partial(work, *args, **kwargs))

    async def run_slow(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that takes long in a thread that no reply waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._slow_pool, partial(work, *args, **kwargs))

    async def close(self) -> None:
        """Finish the running replies, then close the engine and the store."""
        await self.engine.close()
        for pool in (self._slow_pool, self._store_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._maintenance.stop()
        self.store.close()

    def _item(self, record: dict[str, Any], number: int) -> HistoryItem:
        try:
            _, item = item_of(self.task, record)
            check_name(item.id)
        except ValueError as flaw:
            names = ", ".join(self.task.field_names)
            expected = f"An item has an id, {names} and, if it is known, a date."
            raise RequestError(f"item {number}: {flaw}. {expected}", code="item") from None
        return item
