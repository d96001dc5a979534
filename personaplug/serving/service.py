"""Service: everything a server does for live users, without HTTP. Personas, histories, explanations, erasure."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from personaplug.data.parsing import Flaw, item_of, options_of, query_of
from personaplug.data.records import HistoryItem, Options
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.errors import MissingData, RequestError
from personaplug.plug.attribution import drift, left_out
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, as_json, check_name
from personaplug.serving.persona_cache import Persona, PersonaCache
from personaplug.serving.recent_requests import RecentRequests
from personaplug.store.history_store import AddResult, StoredItem

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class ServiceReply:
    """An answer, and what was applied to get it.

    Attributes:
        reply: the engine's.
        persona: whose soft tokens it was given.
        id: of the request, by which its outcome may be told later.
    """

    reply: EngineReply
    persona: Persona
    id: str


@dataclass(frozen=True, repr=False)
class _Asked:
    """What a text asks, as the task cuts it.

    Attributes:
        query: what the encoder reads.
        options: what it lets choose from.
        worded: whether it has the task's wording.
    """

    query: str
    options: Options | None
    worded: bool


class Service:
    """Answers users of tenants and keeps their histories.

    Args:
        personas: makes soft tokens of histories.
        engine: the language model.
        task: what the plug was trained on: how an item looks, and where a prompt's query is.
        elsewhere: use personas also for prompts without the task's wording, for which the plug was not trained.
        remembered: where requests wait for what users made of the answers.
    """

    def __init__(
        self,
        personas: PersonaCache,
        engine: Engine,
        *,
        task: Task,
        elsewhere: bool = False,
        remembered: RecentRequests | None = None,
    ) -> None:
        self.personas, self.engine, self.task, self.elsewhere = personas, engine, task, elsewhere
        self.store = personas.store
        self.remembered = remembered or RecentRequests()
        # Encoding, erasing and explaining take long: answers are not to wait behind them.
        self._slow = ThreadPoolExecutor(2, thread_name_prefix="personaplug-slow")

    async def answer(self, request: ChatRequest | CompletionRequest, *, tenant: str) -> ServiceReply:
        """Answer a request with its user's persona.

        Raises:
            RequestError: if it cannot be answered as it is.
            EngineFailure: if the model does not answer.
        """
        self.check_model(request.model)
        body, came = request.passed_on, time.monotonic()
        as_json(body)  # before anything reads its texts
        asked, extras, user = self._asked(request.asked), request.personaplug, request.user
        persona_scale = extras.persona_scale if asked.worded or self.elsewhere else 0
        persona = await asyncio.to_thread(
            self.personas.persona, tenant, user, asked.query, options=asked.options, persona_scale=persona_scale
        )
        question = EngineRequest(
            "chat" if isinstance(request, ChatRequest) else "completion",
            body,
            persona.soft,
            self.task.labels if asked.worded and not extras.free else (),
            id=secrets.token_hex(12),
            phrases=persona.phrases,
        )
        reply = await self.engine.answer(question)
        if user is not None:
            self.remembered.add(tenant, user, request=question.id, query=asked.query, since=came)
        return ServiceReply(reply, persona, question.id)

    async def add(self, tenant: str, user: str, records: Sequence[dict[str, Any]]) -> AddResult:
        """Add items to a user's history, all of them or none.

        Raises:
            RequestError: if one is no item of the task.
        """
        items = [self._item(record, number) for number, record in enumerate(records, 1)]
        return await self._added(tenant, user, items)

    async def keep(self, tenant: str, user: str, *, request: str, answer: str) -> AddResult:
        """Make history of an earlier request and the text that its user kept for an answer.

        Raises:
            RequestError: if the request is not remembered, or the answer is none of the task's.
        """
        erased, task = await asyncio.to_thread(self.store.erased_at, tenant, user), self.task
        query = self.remembered.query(tenant, user, request=request, erased=erased)
        if task.labels and (answer := answer.strip()) not in task.labels:
            raise RequestError(f"The answer is none of the {len(task.labels)} that {task.name} has.", code="answer")
        asked = next((name for name in task.item_fields if name != task.answer_field), None)
        if task.answer_field is None:
            fields = dict.fromkeys(task.field_names[:1], answer)  # an item is what the user wrote
        else:
            fields = {asked: query, task.answer_field: answer} if asked else {task.answer_field: answer}
        ordered = tuple((name, fields.get(name, "")) for name in task.field_names)
        return await self._added(tenant, user, [HistoryItem(request, ordered, task.answer_field)])

    async def history(self, tenant: str, user: str) -> list[dict[str, Any]]:
        """A user's items, oldest first."""
        return [self._told(item) for item in await asyncio.to_thread(self.store.list_items, tenant, user)]

    async def export(self, tenant: str, user: str) -> dict[str, Any]:
        """Everything that is known of a user.

        Raises:
            MissingData: if there is no such user.
        """
        return await self._slowly(self.store.export, tenant, user)

    async def delete_item(self, tenant: str, user: str, item: str) -> None:
        """Remove one item of a history.

        Raises:
            MissingData: if there is no such item.
        """
        await asyncio.to_thread(self.store.delete_item, tenant, user, item)
        self.personas.forget(tenant, user)

    async def erase(self, tenant: str, user: str) -> dict[str, Any]:
        """Remove everything of a user, from memory and files, and return the receipt.

        Raises:
            MissingData: if there is no such user.
        """
        self.remembered.forget(tenant, user)
        try:
            receipt = await self._slowly(self.store.erase_user, tenant, user)
        finally:
            self.personas.forget(tenant, user)
            self.remembered.forget(tenant, user)  # what was asked while the files were cleared
        return receipt.to_dict()

    async def explain(self, tenant: str, user: str, *, prompt: str, answer: str | None, most: int) -> dict[str, Any]:
        """Say which items made a user's persona for a prompt and, given an answer, what it owes to each.

        Args:
            answer: whose likelihood is compared; None = weights alone.
            most: so many items are told, those that weigh or do most.
        Raises:
            MissingData: if the user has no items.
            RequestError: if the prompt is answered without a persona, or the engine cannot measure likelihoods.
        """
        asked = self._asked(prompt)
        if not (asked.worded or self.elsewhere):
            raise RequestError(
                f"A prompt without the wording of {self.task.name} is answered without a persona.", code="not_the_task"
            )
        items, history = await asyncio.to_thread(self._known, tenant, user, self.personas.plug.config.max_history)
        used = await self._slowly(self.personas.selected, asked.query, history)
        items, history = [items[place] for place in used], history.only(used)
        weights = await self._slowly(self.personas.weights, asked.query, history)
        told: dict[str, Any] = {"items_used": len(history), "own_share": float(weights.sum())}
        effects = np.full(len(history), np.nan)
        if answer is not None:
            told["log_likelihood"], effects = await self._effects(asked, history, prompt=prompt, answer=answer)
        order = np.argsort(-weights if answer is None else -np.abs(effects), kind="stable")[:most]
        told["items"] = [
            self._told(items[place])
            | {"weight": float(weights[place])}
            | ({} if answer is None else {"effect": float(effects[place])})
            for place in order
        ]
        return told

    async def _effects(
        self, asked: _Asked, history: EncodedHistory, *, prompt: str, answer: str
    ) -> tuple[dict[str, float], npt.NDArray[np.float64]]:
        """log p of an answer with the persona, the population's and none, and what it loses without each item."""
        answer = answer.strip() if answer.strip() in self.task.labels else answer
        choices = self.task.labels if answer in self.task.labels else ()
        measured = partial(self.engine.likelihoods, prompt, answer, choices=choices)
        make = partial(self.personas.made, asked.query, options=asked.options)
        (plain,) = await measured(softs=[None])  # first, since not every engine can
        parts = [history, history.only(slice(0)), *left_out(history)]
        softs = await self._slowly(lambda: [make(part) for part in parts])
        whole, common, *without = await measured(softs=softs)
        return {"with_persona": whole, "with_population": common, "plain": plain}, whole - np.array(without)

    async def drift(self, tenant: str, user: str, *, since: date, until: date) -> dict[str, Any]:
        """Say how far a user's persona moved between the evenings of two days.

        Raises:
            MissingData: if the user has no items.
            RequestError: if the days are in the wrong order.
        """
        if since > until:
            raise RequestError("`since` is a day before `until`.", code="invalid_value")
        items, history = await asyncio.to_thread(self._known, tenant, user, None)
        days = [item.date or item.arrived.date() for item in items]
        latest = self.personas.plug.config.max_history
        parts = [history.only(np.flatnonzero([day <= limit for day in days])[-latest:]) for limit in (since, until)]
        plug = self.personas.plug
        moved = partial(drift, partial(self.personas.made, ""), *parts, common=plug.common(), few=plug.few)
        found = asdict(await self._slowly(moved))
        return {name: None if value != value else value for name, value in found.items()}  # JSON has no NaN

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model than the one there is; it may be left out.

        Raises:
            RequestError: if there is none of that name.
        """
        known = self.engine.models
        if name is None and len(known) == 1:
            return
        if name not in known:
            raise RequestError(
                f"There is no model of this name here; there is: {', '.join(known)}.",
                status=404,
                code="model_not_found",
            )

    async def close(self) -> None:
        """Finish the answers that were begun, then let go of engine and store."""
        await self.engine.close()
        self._slow.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def _known(self, tenant: str, user: str, latest: int | None) -> tuple[list[StoredItem], EncodedHistory]:
        """A user's latest items and their vectors, of one moment."""
        for _ in range(3):
            before = self.store.version(tenant, user)
            items = self.store.list_items(tenant, user, latest=latest)
            history = self.store.load_history(tenant, user, latest=latest)
            if not before or not items:
                raise MissingData("The tenant has no such user, or the user no items.")
            if history.version == before == self.store.version(tenant, user):
                return items, history
        raise RequestError("The user's history is being changed; try again.", status=409, code="busy")

    def _told(self, item: StoredItem) -> dict[str, Any]:
        """An item as it may be given again, beside when it came."""
        answer = self.store.settings.labels[item.label_id] if item.label_id >= 0 else None
        kept = dict(item.fields) or ({self.task.answer_field: answer} if self.task.answer_field and answer else {})
        day = item.date.isoformat() if item.date else None
        return {"id": item.id, "date": day, "arrived": item.arrived.isoformat(), **kept}

    async def _added(self, tenant: str, user: str, items: Sequence[HistoryItem]) -> AddResult:
        done = await self._slowly(self.store.add, tenant, user, items)
        self.personas.forget(tenant, user)
        return done

    async def _slowly(self, work: Callable[..., T], *given: Any) -> T:
        """Do something that takes long in a thread of its own kind."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, partial(work, *given))

    def _item(self, record: dict[str, Any], number: int) -> HistoryItem:
        try:
            item = item_of(self.task, record)[1]
            check_name(item.id)
            return item
        except (Flaw, ValueError) as flaw:
            names = ", ".join(self.task.field_names)
            raise RequestError(
                f"item {number}: {flaw}. An item has an id, {names} and, if it is known, a date.", code="item"
            ) from None

    def _asked(self, text: str) -> _Asked:
        try:
            return _Asked(query_of(self.task, text), options_of(self.task, text), worded=True)
        except Flaw:  # another question than the task's
            return _Asked(text, None, worded=False)
