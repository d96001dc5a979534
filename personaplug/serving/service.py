"""Service: replies, histories and erasure for live users, independent of HTTP."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from personaplug.data.task import Task, TaskKind
from personaplug.data.task_prompts import TaskQuery, find_task
from personaplug.data.wording import Wording
from personaplug.encoders.concepts import Concept, FoundConcepts
from personaplug.encoders.item_parts import index_of_part
from personaplug.errors import ConfigError, PartError, RequestError, UserErased
from personaplug.serving.concepts import ConceptFinder, read_pictures
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.fair_executor import FairExecutor
from personaplug.serving.feedback import (
    Feedback,
    feedback_ids,
    feedback_items,
    items_of_records,
    preference_items,
)
from personaplug.serving.item_fields import item_fields
from personaplug.serving.openai_protocol import USER_HEADER, ChatRequest, CompletionRequest
from personaplug.serving.persona_cache import Persona, PersonaCache
from personaplug.serving.recent_requests import RecentRequests, unknown_request
from personaplug.serving.reply_texts import WatchedStream, text_of_reply
from personaplug.serving.served_task import ServedPlug, ServedTask
from personaplug.serving.spans import AnswerSpan, PersonaSpan
from personaplug.store.history_store import AddResult, ReplaceResult, StoredItem, Ticket
from personaplug.store.maintenance import Maintenance
from personaplug.store.receipts import Receipt

logger = logging.getLogger(__name__)

_PICTURE_COST = 10  # encoding a picture takes 6 to 20 times as long as a text


@dataclass(frozen=True, repr=False)
class ServiceReply:
    """The engine's reply, the persona behind it, and the request id that feedback refers to."""

    reply: EngineReply
    persona: Persona
    id: str
    model: str  # the name of the model that answered
    reason: str = ""  # why the reply does not use the user's own persona
    concepts: Sequence[Concept] = ()  # whose texts stand before the question


class Service:
    """Answers the users of tenants and stores their histories.

    Args:
        wordings: wordings of the task's prompts; if empty, any prompt with the task's marker is on task.
        apply_off_task: use personas also for prompts that match no task, although training had no such prompts.
        others: further tasks. Their plugs share the first plug's persona head, and their personas its store.
        plugs: further plugs for the engine's model, with their names. Their personas share the first plug's store.
        picture_threshold: the smallest cosine at which a picture in a question shows a concept of its user; None = that
            of the picture encoder.
    Raises:
        StoreConflict: if the items of a task are concepts and the store keeps no texts.
    """

    def __init__(
        self,
        personas: PersonaCache,
        engine: Engine,
        *,
        task: Task,
        wordings: Sequence[Wording] = (),
        apply_off_task: bool = False,
        others: Sequence[ServedTask] = (),
        plugs: Sequence[ServedPlug] = (),
        picture_threshold: float | None = None,
    ) -> None:
        tasks = (ServedTask.of(task, personas, wordings=wordings), *others)
        self.plugs = (ServedPlug(tasks), *plugs)
        self.personas, self.store, self.engine = personas, personas.store, engine
        self.apply_off_task = apply_off_task
        self.concepts = ConceptFinder(self.store, picture_threshold)
        for served in (served for plug in self.plugs for served in plug.tasks):
            self.concepts.check(served.task)
        self._has_warned_of_no_user = False
        self.recent_requests = RecentRequests()
        # Replies must not wait for encoding, erasing or explaining, which take long.
        self.slow = FairExecutor(3, name="personaplug-slow")
        # Requests without a user must not wait for a database that hangs.
        self.store_threads = FairExecutor(16, name="personaplug-store")
        self.persona_threads = FairExecutor(4, name="personaplug-persona")
        # Admissions, checks and users with a cached persona must not wait for the model, which reads past answers.
        self.reading_threads = FairExecutor(16, name="personaplug-reading")
        self._maintenance = Maintenance(self.store)

    async def start(self) -> None:
        """Start the engine. ConfigError if a plug has the name of another one."""
        await self.engine.start()
        if len(set(self.models)) < len(self.models):
            raise ConfigError(
                f"Each plug needs its own name in requests; found {', '.join(self.models)}. Choose other names in "
                f"--model and --run-for."
            )

    async def respond(
        self,
        request: ChatRequest | CompletionRequest,
        *,
        tenant: str,
        user_header: str | None = None,
        key_user: str | None = None,
    ) -> ServiceReply:
        """Answer a request with its user's persona. `user_header` or `key_user` may name the user, like the body."""
        plug = self.find_plug(request.model)
        user, options = request.named_user(user_header, key_user=key_user), request.personaplug
        if user is None and options.persona_scale != 0:  # a request of the plain model needs no user
            self._warn_of_no_user()
        self.engine.check_length(request.characters)  # before a regular expression, a tokenizer or an encoder reads it
        ticket = await self.admit(tenant, user) if user is not None else None
        served, query = await self.find_task(plug, tenant, request.prompt_text, can_ask=request.can_ask)
        choices = served.task.labels if query.is_on_task and not options.free else ()
        found, request = await self._with_concepts(request, ticket, plug=plug)
        prepared = await self.engine.prepare(request, choices=choices)
        make_persona = partial(
            served.personas.persona,
            ticket,
            query=query.text,
            options=query.options,
            persona_scale=options.persona_scale if self.is_personal(query) else 0,
        )
        threads = self.persona_threads if ticket is None else self.store_threads
        if ticket is not None and served.personas.reads_history(ticket):
            threads = self.reading_threads
        with PersonaSpan.open() as span:
            persona = await threads.run(tenant, user or "", make_persona)
            span.describe(persona)
        request_id, copying = secrets.token_hex(12), persona.copying
        reply = await self._answer(
            EngineRequest(request, persona.soft, choices, request_id, copying, tenant, prepared, plug.name), plug
        )
        if ticket:
            await self._check_not_erased(ticket, reply)
            reply = self._remember(ticket, reply, request_id=request_id, query=query, task=served.task)
        reason = self._reason(persona, query, user=user)
        return ServiceReply(reply, persona, request_id, self.name_of(plug), reason, found.concepts)

    async def _with_concepts(
        self, request: ChatRequest | CompletionRequest, ticket: Ticket | None, *, plug: ServedPlug
    ) -> tuple[FoundConcepts, ChatRequest | CompletionRequest]:
        """Return the concepts that a request mentions or shows, and the request with their texts before its question.

        Without a picture encoder, pictures stay in the request, and the engine decides whether it supports them.
        """
        task, scale = plug.concept_task, request.personaplug.persona_scale
        is_plain = (plug.personas.personalizer.persona_scale if scale is None else scale) == 0
        if task is None or (is_plain and not request.picture_urls):
            return FoundConcepts(), request
        sees_pictures = self.concepts.sees_pictures(task)
        pictures = read_pictures(request.picture_urls) if sees_pictures else []
        if ticket is None or is_plain:
            if pictures:
                message = "A picture is compared with a user's concepts. Name the user, and set no persona_scale of 0."
                raise RequestError(message, code="picture")
            return FoundConcepts(), request
        threads = self.slow if pictures else self.store_threads
        find = partial(self.concepts.find, task, ticket, question=request.prompt_text, pictures=pictures)
        cost = 1 + _PICTURE_COST * len(pictures)
        found = await threads.run_weighted(ticket.tenant, ticket.user, find, cost=cost)
        if not found.text:
            return found, request
        return found, request.with_text_before(found.text + "\n", keeps_pictures=not sees_pictures)

    async def _answer(self, request: EngineRequest, plug: ServedPlug) -> EngineReply:
        span = AnswerSpan(request.body.kind, model=self.name_of(plug))
        with span.current():
            return span.end_with(await self.engine.respond(request))

    async def _check_not_erased(self, ticket: Ticket, reply: EngineReply) -> None:
        """Withhold a reply if its user has been erased meanwhile."""
        try:
            await self.store_threads.run(ticket.tenant, ticket.user, self.store.check, ticket)
        except BaseException:
            if not isinstance(reply.body, bytes):
                await reply.body.aclose()
            raise

    def _remember(
        self, ticket: Ticket, reply: EngineReply, *, request_id: str, query: TaskQuery, task: Task
    ) -> EngineReply:
        """Store a request for feedback, and its answer once it is complete; return the reply."""
        body = reply.body
        add_request = partial(self.recent_requests.add, ticket, request_id=request_id, query=query.item_text, task=task)
        if isinstance(body, bytes):
            add_request(answer=text_of_reply(body))
            return reply
        add_request()
        on_text = partial(self.recent_requests.set_answer, ticket, request_id=request_id)
        return replace(reply, body=WatchedStream(body, on_text=lambda text: on_text(answer=text)))

    async def add_records(
        self, tenant: str, user: str, *, records: Sequence[dict[str, Any]], plug: ServedPlug | None = None
    ) -> AddResult:
        """Add records with the fields of a plug's tasks to a user's history: all records or, after an error, none."""
        ticket = await self.admit(tenant, user)
        tasks = [served.task for served in (plug or self.plugs[0]).tasks]
        add = partial(self._add_records, ticket, records, tasks=tasks)
        cost = sum(_cost_of(record, tasks) for record in records)
        return await self.slow.run_weighted(tenant, user, add, cost=cost)

    async def add_feedback(self, tenant: str, user: str, *, request_id: str, feedback: Feedback) -> ReplaceResult:
        """Add feedback on an earlier request to the user's history. It replaces earlier feedback on that request."""
        request = self.recent_requests.find(tenant, user, request_id=request_id)
        items = feedback_items(request.task, request_id, request=request, feedback=feedback)
        replace_items = partial(self.store.replace_items, request.ticket, items, ids=feedback_ids(request_id))
        try:
            return await self.slow.run(tenant, user, replace_items)
        except UserErased:  # by another process, which cannot clear the recent requests of this one
            raise unknown_request() from None

    async def state_preferences(self, tenant: str, user: str, *, preferences: Sequence[str]) -> ReplaceResult:
        """Replace the preferences of a user."""
        ticket = await self.admit(tenant, user)
        work = partial(self._state_preferences, ticket, preferences)
        return await self.slow.run_weighted(tenant, user, work, cost=1 + len(preferences))

    async def erase_user(self, tenant: str, user: str) -> Receipt:
        """Erase all data of a user from memory and files."""
        self.recent_requests.forget(tenant, user)
        try:
            return await self.store_threads.run(tenant, user, self.store.erase_user, tenant, user)
        finally:
            for plug in self.plugs:
                plug.forget(tenant, user)
            self.recent_requests.forget(tenant, user)  # requests that arrived during the erasure

    async def admit(self, tenant: str, user: str) -> Ticket:
        """Return a ticket, which a new request needs to read or write a user's data."""
        return await self.store_threads.run(tenant, user, self.store.admit, tenant, user)

    def item_fields(self, item: StoredItem) -> dict[str, Any]:
        """Return a stored item as fields that can be added again, with its kind and arrival time.

        A picture or a vector is only described, and must be sent again with the item.
        """
        tasks = [served.task for plug in self.plugs for served in plug.tasks]
        return item_fields(item, tasks, labels=self.store.settings.labels)

    async def find_task(
        self, plug: ServedPlug, tenant: str, prompt: str, *, can_ask: Callable[[TaskKind], bool]
    ) -> tuple[ServedTask, TaskQuery]:
        """Return the task of a prompt, and the parsed prompt; see `data.task_prompts.find_task`.

        A task's regular expression may take long, so it runs outside the event loop.
        """
        work = partial(find_task, [served.prompts for served in plug.tasks], prompt, can_ask=can_ask)
        index, query = await self.persona_threads.run(tenant, "", work)
        return plug.tasks[index], query

    def is_personal(self, query: TaskQuery) -> bool:
        return query.is_on_task or self.apply_off_task

    @property
    def models(self) -> tuple[str, ...]:
        """The names that requests may use: those of the engine's model, with the first plug, then one for each plug."""
        return (*self.engine.models, *(plug.name for plug in self.plugs[1:]))

    def name_of(self, plug: ServedPlug) -> str:
        """Return the name of a plug in requests; empty if the engine has none until it starts."""
        return plug.name or next(iter(self.engine.models), "")

    def find_plug(self, model: str | None) -> ServedPlug:
        """Return the plug with this name; RequestError if there is none. None = the first plug of an only model."""
        first, *others = self.plugs
        if model in self.engine.models or (model is None and len(self.engine.models) == 1):
            return first
        for plug in others:
            if plug.name == model:
                return plug
        message = f"There is no model with this name. Use one of {', '.join(self.models)}."
        raise RequestError(message, http_status=404, code="model_not_found")

    async def close(self) -> None:
        """Finish the running replies, then close the engine and the store."""
        await self.engine.close()
        for threads in (self.slow, self.store_threads, self.persona_threads, self.reading_threads):
            threads.shutdown()
        self._maintenance.stop()
        self.store.close()

    def _add_records(self, ticket: Ticket, records: Sequence[dict[str, Any]], *, tasks: Sequence[Task]) -> AddResult:
        items = items_of_records(tasks, records, content_id=self.store.content_id)
        try:
            return self.store.add(ticket, items)
        except PartError as error:
            index = index_of_part(error, items)
            place = "" if index is None else f"item {index + 1}: "
            raise RequestError(f"{place}{error}", code=error.code) from None

    def _state_preferences(self, ticket: Ticket, preferences: Sequence[str]) -> ReplaceResult:
        items = preference_items(preferences, content_id=self.store.content_id)
        return self.store.replace_preferences(ticket, items)

    def _warn_of_no_user(self) -> None:
        if not self._has_warned_of_no_user:
            self._has_warned_of_no_user = True
            logger.warning(
                "A request names no user, so it gets the population persona (logged once). Name the user with `user`, "
                "with a key of that user or, if a proxy drops the field, with the header %s.",
                USER_HEADER,
            )

    def _reason(self, persona: Persona, query: TaskQuery, *, user: str | None) -> str:
        """Return why a reply does not use its user's own persona; empty if it does."""
        if persona.applied == "user":
            return ""
        if not self.is_personal(query):
            return "off-task"
        if persona.persona_scale == 0:
            return "persona-scale"
        if user is None:
            return "no-user"
        return "few-items" if persona.items else "no-history"


def _cost_of(record: dict[str, Any], tasks: Sequence[Task]) -> int:
    """Return the cost of encoding a record; a text costs 1."""
    has_picture = any(task.image_field and record.get(task.image_field) for task in tasks)
    return 1 + _PICTURE_COST * has_picture
