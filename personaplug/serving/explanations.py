"""Explanations for live users: item weights, effects of items on an answer, and drift of a persona."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from personaplug.data.records import Prompt, characters, last_message
from personaplug.data.task import TaskKind
from personaplug.data.task_prompts import TaskQuery
from personaplug.encoders.encoded_sample import EncodedHistory, latest_items
from personaplug.errors import MissingData, RequestError
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.attribution import Drift, drift, item_weights, leave_one_out
from personaplug.plug.layers import ColdStart
from personaplug.serving.openai_protocol import check_json
from personaplug.serving.served_task import ServedPlug, ServedTask
from personaplug.serving.service import Service
from personaplug.serving.snapshots import snapshot
from personaplug.store.reads import StoredItem


class Explainer:
    """Explains the personas of one task, by default the first task of the service's first plug."""

    def __init__(self, service: Service, served: ServedTask | None = None) -> None:
        self.service, self.store, self.served = service, service.store, served or service.plugs[0].tasks[0]
        self.personas = self.served.personas
        self.personalizer, self.plug = self.personas.personalizer, self.personas.plug

    async def explain(
        self,
        tenant: str,
        user: str,
        *,
        prompt: Prompt,
        answer: str | None,
        most: int,
        persona_scale: float | None = None,
        plug: ServedPlug | None = None,
    ) -> dict[str, Any]:
        """Return the item weights of a user's persona for a prompt, and the items' effects on an answer, if given.

        List the `most` items with the largest effects or, without an answer, the largest weights. The effects depend on
        `persona_scale`; None = the service's scale. The prompt finds its task among those of `plug`; None = the first.
        """
        check_json([last_message(prompt), answer])
        self.service.engine.check_length(characters(prompt))  # before a regular expression reads it
        plug, find_task = plug or self.service.plugs[0], self.service.find_task
        served, query = await find_task(plug, tenant, last_message(prompt), can_ask=_can_ask(prompt))
        if not self.service.is_personal(query):
            names = " or ".join(other.task.name for other in plug.tasks)
            message = f"The prompt does not match {names}, so it gets no persona. GET /v1/task lists the wordings."
            raise RequestError(message, code="not_the_task")
        explainer = Explainer(self.service, served)
        measure = partial(explainer._explain, tenant, user, prompt=prompt, query=query)
        return await measure(answer=answer, most=most, persona_scale=persona_scale)

    async def _explain(
        self,
        tenant: str,
        user: str,
        *,
        prompt: Prompt,
        query: TaskQuery,
        answer: str | None,
        most: int,
        persona_scale: float | None,
    ) -> dict[str, Any]:
        labels = self.served.task.labels
        answer = answer.strip() if answer is not None and answer.strip() in labels else answer
        choices = labels if answer in labels else ()
        await self.service.engine.check_texts(prompt, answer or "", choices=choices)
        snapshot = partial(self._snapshot, tenant, user, latest=self.plug.config.max_history)
        items, history = await self.service.store_threads.run(tenant, user, snapshot)
        weights = await self.service.slow.run(tenant, user, self._weights, query, history)
        explanation: dict[str, Any] = {"items_used": len(history), "own_share": float(weights.sum())}
        columns, ranking = {"weight": weights.astype(np.float64)}, -weights
        if answer is not None:
            work = partial(self._leave_one_out_softs, query, history, persona_scale=persona_scale)
            make_softs = partial(self.service.slow.run_weighted, tenant, user, work, cost=len(history))
            measure = partial(self.service.engine.log_likelihoods, prompt, answer, choices=choices)
            likelihoods, effects = await _effects(measure, make_softs)
            explanation["log_likelihood"] = likelihoods
            columns["effect"], ranking = effects, -np.abs(effects)
        order = np.argsort(ranking, kind="stable")[:most]
        explanation["items"] = [
            self.service.item_fields(items[index]) | {name: float(values[index]) for name, values in columns.items()}
            for index in order
        ]
        return explanation

    async def drift(self, tenant: str, user: str, *, since: date, until: date) -> dict[str, Any]:
        """Measure how far a user's persona moved from the end of one day to the end of another."""
        if since > until:
            raise RequestError("`since` must not be after `until`.", code="invalid_value")
        result = await self.service.slow.run(tenant, user, self._drift, tenant, user, since=since, until=until)
        return {name: None if value != value else value for name, value in asdict(result).items()}  # JSON has no NaN

    def _snapshot(self, tenant: str, user: str, *, latest: int | None) -> tuple[list[StoredItem], EncodedHistory]:
        """Return the items that the plug uses, and their vectors, from one version of the history."""
        items, history = snapshot(self.store, tenant, user, latest=latest)
        if not items:
            raise MissingData("The tenant has no such user, or the user has no items.")
        used_rows = self.personas.plug.known_items(history.kind_ids)
        return [items[row] for row in used_rows], history.select(used_rows)

    def _weights(self, query: TaskQuery, history: EncodedHistory) -> npt.NDArray[np.float32]:
        with self.personas.plug_lock:
            return item_weights(self.personalizer, query.text, history)

    def _leave_one_out_softs(
        self, query: TaskQuery, history: EncodedHistory, *, persona_scale: float | None
    ) -> list[SoftPrompt]:
        """Return the personas of the whole history, of an empty history, and of the history without each item."""
        histories = [history, history.select(slice(0)), *leave_one_out(history)]
        return [self._soft(query, part, persona_scale=persona_scale) for part in histories]

    def _soft(self, query: TaskQuery, history: EncodedHistory, *, persona_scale: float | None = None) -> SoftPrompt:
        with self.personas.plug_lock:
            return self.personalizer.persona(query.text, history, options=query.options, persona_scale=persona_scale)

    def _drift(self, tenant: str, user: str, *, since: date, until: date) -> Drift:
        items, history = self._snapshot(tenant, user, latest=None)
        days = np.array([(item.date or item.arrived.date()).toordinal() for item in items])
        before, after = (self._used(history.select(np.flatnonzero(days <= day.toordinal()))) for day in (since, until))
        make_persona = partial(self._soft, TaskQuery("", None, is_on_task=False))
        is_cold = partial(_is_cold, self.plug.cold_start)
        return drift(make_persona, before, after, population=self.plug.population_prompt(), is_cold=is_cold)

    def _used(self, history: EncodedHistory) -> EncodedHistory:
        return history.select(latest_items(history.kind_ids, self.plug.config.max_history))


async def _effects(
    measure: Callable[..., Awaitable[list[float]]], make_softs: Callable[[], Awaitable[list[SoftPrompt]]]
) -> tuple[dict[str, float], npt.NDArray[np.float64]]:
    """Return log p of an answer with the persona, with the population's and plain, and the effect of each item."""
    (plain,) = await measure(softs=[None])  # first, because the engine may not support it
    persona, population, *without_item = await measure(softs=await make_softs())
    likelihoods = {"with_persona": persona, "with_population": population, "plain": plain}
    return likelihoods, persona - np.array(without_item)


def _can_ask(prompt: Prompt) -> Callable[[TaskKind], bool]:
    ends_with_user = isinstance(prompt, str) or prompt.turns[-1][0] == "user"
    return lambda kind: ends_with_user


def _is_cold(cold_start: ColdStart, history: EncodedHistory) -> bool:
    return cold_start.covers(history.kind_ids)
