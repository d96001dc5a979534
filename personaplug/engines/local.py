"""The embedded engine: a model of transformers in this process, whose passes requests of different users share.

One thread owns the model. Between any two tokens it lets new requests in and finished ones out, and does what else is
asked of the model, so that no request waits for another's end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personaplug.backends.base import GenerationConfig
from personaplug.backends.decoder_only import DecoderOnlyBackend
from personaplug.backends.rendering import Rendered
from personaplug.backends.running_rows import Row, RunningRows
from personaplug.engines.base import Question, Reply
from personaplug.errors import BadConfig, EngineFailure, PersonaPlugError, RequestError
from personaplug.soft_prompt import SoftPrompt
from personaplug.wire import DONE, ChatRequest, Usage, Writer, event

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_EFFECT_ROWS = 32  # soft prompts whose effect on an answer is measured in one pass


class Sampling(BaseModel):
    """The fields of a request that this engine goes by."""

    model_config = ConfigDict(extra="ignore", strict=True)

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer and are no part of it."""
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in listed if text)


REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
}
"""Fields that would change the answer and that this engine does not know, with the values that ask for nothing."""


@dataclass(eq=False, repr=False)
class _Job:
    """A request on its way through the thread that owns the model."""

    row: Row
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[tuple[list[int], str | None] | Exception] = field(default_factory=asyncio.Queue)
    told: int = 0

    def tell(self, news: tuple[list[int], str | None] | Exception) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)

    def tell_progress(self) -> None:
        if len(self.row.ids) > self.told or self.row.ended:
            self.tell((self.row.ids[self.told :], self.row.ended))
            self.told = len(self.row.ids)


class LocalEngine:
    """A decoder-only model in this process.

    Args:
        backend: the model.
        name: by what name requests call it.
        max_rows: answers that are written side by side.
        max_new_tokens: longest answer, also where a request says nothing.
        max_tokens: prompt, soft tokens and answer together; None = what the model was made for.
    Raises:
        BadConfig: if the model's prompts cannot be read apart from what follows them.
    """

    def __init__(
        self,
        backend: DecoderOnlyBackend,
        *,
        name: str,
        max_rows: int = 16,
        max_new_tokens: int = 512,
        max_tokens: int | None = None,
    ) -> None:
        if not isinstance(backend, DecoderOnlyBackend) or not backend.reads_apart():
            raise BadConfig(
                f"{backend.identity.name} cannot answer several requests side by side: that needs a model that reads "
                f"prompt and answer in one stream, with a cache of keys and values per token."
            )
        self.name = "local"
        self.models: tuple[str, ...] = (name,)
        self.backend, self.max_rows, self.max_new_tokens = backend, max_rows, max_new_tokens
        self.max_tokens = max_tokens or int(getattr(backend.model.config, "max_position_embeddings", 2048))
        self._waiting: queue.SimpleQueue[_Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="personaplug-model", daemon=True)

    async def start(self) -> None:
        """Start the thread that owns the model."""
        if self._thread.ident is None:
            self._thread.start()

    async def ready(self) -> bool:
        """Whether the thread that owns the model is there."""
        return self._thread.is_alive()

    async def close(self) -> None:
        """Finish the answers that were begun, then stop."""
        if self._thread.is_alive():
            self._waiting.put(None)
            await asyncio.to_thread(self._thread.join)

    async def answer(self, question: Question) -> Reply:
        """Answer one request; see `Engine.answer`."""
        sampling = _sampling(question.body)
        job = _Job(self._row(question, sampling), asyncio.get_running_loop())
        if not self._thread.is_alive():
            raise EngineFailure("The model is no longer running.")
        writer = Writer(question.kind, model=self.models[0], request=question.id)
        pieces = self._pieces(job, stops=sampling.stops)
        self._waiting.put(job)
        if sampling.stream:
            wanted = bool((sampling.stream_options or {}).get("include_usage"))
            return Reply(_events(pieces, job, writer=writer, with_usage=wanted))
        text = "".join([piece async for piece in pieces])
        whole = writer.whole(text, reason=job.row.ended or "stop", usage=_usage(job.row))
        return Reply(json.dumps(whole, ensure_ascii=False).encode())

    async def likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Return log p of an answer to a prompt under each of some soft prompts; see `Engine.likelihoods`."""

        @torch.no_grad()
        def measure() -> list[float]:
            found: list[float] = []
            for start in range(0, len(softs), _EFFECT_ROWS):
                several = softs[start : start + _EFFECT_ROWS]
                given = [soft for soft in several if soft is not None]
                soft = (
                    SoftPrompt(torch.cat([one.vectors for one in given]), placement=given[0].placement)
                    if given
                    else None
                )
                count = len(several)
                loss, _ = self.backend.loss([prompt] * count, [answer] * count, soft=soft, labels=choices)
                found += (-loss.float()).tolist()
            return found

        return await self._in_thread(measure)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do something with the model between two tokens."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as caught:
                error = caught
            done.get_loop().call_soon_threadsafe(settle, result, error)

        self._waiting.put(job)
        return await done

    def _row(self, question: Question, sampling: Sampling) -> Row:
        prompt, soft = self._rendered(question), question.soft
        size = len(prompt.ids) + (soft.vectors.shape[1] if soft else 0)
        if not size:
            raise RequestError("The prompt is empty.", code="empty_prompt")
        choices = self.backend.renderer.answers(question.choices) if question.choices else []
        room = self.max_tokens - size
        wanted = sampling.max_completion_tokens or sampling.max_tokens
        longest = max(map(len, choices)) if choices else wanted or min(self.max_new_tokens, room)
        if longest > self.max_new_tokens:
            raise RequestError(
                f"This server writes at most {self.max_new_tokens} tokens; {longest} were asked for.", code="max_tokens"
            )
        if longest > room or room < 1:
            raise RequestError(
                f"The prompt has {size} tokens and the answer may have {longest}: this model takes {self.max_tokens} "
                f"together.",
                code="context_length_exceeded",
            )
        temperature = 0.0 if question.choices and sampling.temperature is None else _or(sampling.temperature, 1.0)
        config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=_or(sampling.top_p, 1.0),
            seed=secrets.randbits(62) if sampling.seed is None else sampling.seed,
        )
        return Row(prompt, soft, config, choices)

    def _rendered(self, question: Question) -> Rendered:
        renderer, body = self.backend.renderer, question.body
        if question.kind == "completion":
            return renderer.bare(body["prompt"])
        request = ChatRequest.model_validate(body)
        try:
            return renderer.turns([(message.role, message.text) for message in request.messages])
        except PersonaPlugError:
            raise
        except Exception:  # a template refuses what it does not know by whatever its author raised
            raise RequestError(
                "The model's chat template does not take these roles in this order.", code="messages"
            ) from None

    async def _pieces(self, job: _Job, *, stops: tuple[str, ...]) -> AsyncGenerator[str]:
        """The answer as it comes, up to a stop text; whoever stops listening ends it."""
        renderer, row = self.backend.renderer, job.row
        ids: list[int] = []
        sent = 0
        try:
            ended: str | None = None
            while ended is None:
                news = await job.news.get()
                if isinstance(news, Exception):
                    raise EngineFailure("The model failed on this request.") from news
                ids += news[0]
                ended = news[1]
                text = renderer.raw(ids)
                stop = min((place for place in map(text.find, stops) if place >= 0), default=None)
                if stop is not None:
                    text, row.ended = text[:stop], "stop"
                    ended = "stop"
                # A text that may go on to become a stop, or half a character, is held back.
                safe = len(text) if ended else _safe(text, stops)
                if safe > sent:
                    yield text[sent:safe]
                    sent = safe
        finally:
            row.ended = row.ended or "stop"

    def _work(self) -> None:
        """Own the model: until told to stop, and then until all is answered."""
        running, jobs, waiting, open_ = RunningRows(self.backend), list[_Job](), list[_Job](), True
        while open_ or jobs or waiting:
            while open_ and (not self._waiting.empty() or not (jobs or waiting)):
                coming = self._waiting.get()
                if coming is None:
                    open_ = False
                elif isinstance(coming, _Job):
                    waiting.append(coming)
                else:
                    coming()
            try:
                room = self.max_rows - len(jobs)
                coming_in, waiting = waiting[:room], waiting[room:]
                jobs += coming_in
                alive = [job.row for job in coming_in if job.row.ended is None]
                if alive:
                    running.admit(alive)
                else:
                    running.step()
                for job in jobs:
                    job.tell_progress()
                jobs = [job for job in jobs if job.row.ended is None]
                if not jobs:
                    running.step()  # lets go of the last ones' states
            except (
                Exception
            ) as error:  # of the model or the machine; whoever waits must hear of it, later ones be served
                logger.error("the model failed on %d requests: %s", len(jobs), type(error).__name__)
                for job in jobs:
                    job.row.ended = "stop"
                    job.tell(error)
                running, jobs = RunningRows(self.backend), []


async def _events(pieces: AsyncGenerator[str], job: _Job, *, writer: Writer, with_usage: bool) -> AsyncGenerator[bytes]:
    if (first := writer.first()) is not None:
        yield event(first)
    async with aclosing(pieces):
        async for piece in pieces:
            yield event(writer.piece(piece))
    yield event(writer.last(job.row.ended or "stop"))
    if with_usage:
        yield event(writer.usage(_usage(job.row)))
    yield DONE


def _usage(row: Row) -> Usage:
    return Usage(len(row.prompt.ids) + (row.soft.vectors.shape[1] if row.soft else 0), len(row.ids))


def _sampling(body: dict[str, Any]) -> Sampling:
    try:
        sampling = Sampling.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RequestError(f"{place}: {first['msg']}", code="invalid_value") from None
    for name, nothing in REFUSED.items():
        if name in body and body[name] not in nothing:
            raise RequestError(f"The embedded engine does not know {name!r}; leave it out.", code="unsupported")
    return sampling


def _safe(text: str, stops: tuple[str, ...]) -> int:
    """How much of a text can no longer be taken back."""
    end = len(text) - (len(text) - len(text.rstrip(_BROKEN)))
    for stop in stops:
        overlap = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
        end = min(end, len(text) - overlap)
    return end


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
