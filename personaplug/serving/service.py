"""Service: replies, histories and erasure for live users, without HTTP."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from personaplug.data.task import Task
from personaplug.data.task_prompts import TaskPrompts, TaskQuery
from personaplug.data.wording import Wording
from personaplug.errors import RequestError, UserErased
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.feedback import feedback_item, items_of_records
from personaplug.serving.openai_protocol import USER_HEADER, ChatRequest, CompletionRequest
from personaplug.serving.persona_cache import Persona, PersonaCache
from personaplug.serving.recent_requests import RecentRequests, unknown_request
from personaplug.store.history_store import AddResult, StoredItem, Ticket
from personaplug.store.maintenance import Maintenance
from personaplug.store.receipts import Receipt

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class ServiceReply:
    """The engine's reply, the persona that it was given, and the id by which feedback refers to it."""

    reply: EngineReply
    persona: Persona
    id: str
    reason: str = ""  # why the persona is not the user's own


class Service:
    """Answers users of tenants and keeps their histories.

    Args:
        wordings: of the task's prompts; without any, a prompt that holds the task's marker has its wording.
        apply_off_task: use personas also for prompts without the wording of the plug's task, as in no training.
    """

    def __init__(
        self,
        personas: PersonaCache,
        engine: Engine,
        *,
        task: Task,
        wordings: Sequence[Wording] = (),
        apply_off_task: bool = False,
    ) -> None:
        self.personas, self.store, self.engine = personas, personas.store, engine
        self.task, self.prompts, self.apply_off_task = task, TaskPrompts(task, wordings), apply_off_task
        self._has_named_nobody = False
        self.recent_requests = RecentRequests()
        # Encoding, erasing and explaining take long: replies must not wait for them.
        self._slow_pool = ThreadPoolExecutor(2, thread_name_prefix="personaplug-slow")
        self._store_pool = ThreadPoolExecutor(16, thread_name_prefix="personaplug-store")
        self._maintenance = Maintenance(self.store)

    async def respond(
        self, request: ChatRequest | CompletionRequest, *, tenant: str, user_header: str | None = None
    ) -> ServiceReply:
        """Answer a request with its user's persona. `user_header` names the user as the request's fields do."""
        self.check_model(request.model)
        user, options = request.named_user(user_header), request.personaplug
        if user is None:
            self._log_nobody()
        self.engine.check_length(request.characters)  # before a pattern, a tokenizer or an encoder reads it
        ticket = await self.admit(tenant, user) if user is not None else None
        query = await self.parse(request.prompt_text, can_be_task=request.can_be_task)
        choices = self.task.labels if query.is_on_task and not options.free else ()
        prepared = await self.engine.prepare(request, choices=choices)
        make_persona = partial(
            self.personas.persona,
            ticket,
            query=query.text,
            options=query.options,
            persona_scale=options.persona_scale if self.is_personal(query) else 0,
        )
        # Without a user, the store is not asked: threads that wait for it must not keep such requests waiting.
        persona = await (self.run_store(make_persona) if ticket else asyncio.to_thread(make_persona))
        request_id = secrets.token_hex(12)
        reply = await self.engine.respond(
            EngineRequest(request, persona.soft, choices, request_id, persona.phrases, tenant, prepared)
        )
        if ticket:
            await self._check_not_erased(ticket, reply)
            self.recent_requests.add(ticket, request_id=request_id, query=query.item_text)
        return ServiceReply(reply, persona, request_id, self._reason(persona, query, user=user))

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
        items = items_of_records(self.task, records)
        return await self.run_slow(self.store.add, ticket, items)

    async def add_feedback(self, tenant: str, user: str, *, request_id: str, answer: object) -> AddResult:
        """Add an earlier request, with the answer that its user kept, to the user's history."""
        query, ticket = self.recent_requests.find(tenant, user, request_id=request_id)
        item = feedback_item(self.task, request_id, query=query, answer=answer)
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

    async def parse(self, prompt: str, *, can_be_task: bool = True) -> TaskQuery:
        """Parse a prompt as the task does; a task's pattern may take long, so not in the event loop."""
        if not can_be_task:
            return TaskQuery(prompt, None, is_on_task=False)
        return await asyncio.to_thread(self.prompts.parse, prompt)

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

    def _log_nobody(self) -> None:
        if not self._has_named_nobody:
            self._has_named_nobody = True
            logger.warning(
                "A request names no user, so it gets what is common to all users (this is said once). A user is named "
                "by `user` or, if a proxy drops that field, by the header %s.",
                USER_HEADER,
            )

    def _reason(self, persona: Persona, query: TaskQuery, *, user: str | None) -> str:
        """Say in a word why a reply has not its user's own persona; empty = it has."""
        if persona.applied == "user":
            return ""
        if not self.is_personal(query):
            return "off-task"
        if persona.persona_scale == 0:
            return "persona-scale"
        if user is None:
            return "no-user"
        return "few-items" if persona.items else "no-history"
