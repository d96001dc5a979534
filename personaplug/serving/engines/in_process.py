"""The embedded engine: a model of transformers in this process, whose passes requests of different users share."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personaplug.errors import ConfigError, EngineFailure, PersonaPlugError, RequestError
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import Slot
from personaplug.llm.prompt_tokenizer import TokenizedPrompt
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import CHARACTERS, EngineReply, EngineRequest, Events
from personaplug.serving.engines.scheduler import Job, ModelScheduler
from personaplug.serving.openai_protocol import DONE, ChatRequest, Message, Usage, Writer, event, first_flaw

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_EFFECT_ROWS = 32  # soft prompts whose effect on an answer is measured in one pass …
_EFFECT_TOKENS = 512  # … or fewer, of so many tokens of answers together, each of which takes a row of logits …
_EFFECT_CONTEXT = 8192  # … and so many of prompts and answers
_STOPS = 4  # texts that may end an answer, as OpenAI has it
_COLD = 1e-4  # a temperature below it takes the likeliest token
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Sampling(BaseModel):
    """The fields of a request that this engine goes by."""

    model_config = ConfigDict(extra="ignore", strict=True)

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
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
    "prompt_logprobs": (None,),
    "tools": (None, []),
    "functions": (None, []),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None, {}),
    "continue_final_message": (None, False),
    "prompt_embeds": (None,),
}
"""Fields that would change the answer and that this engine does not know, with the values that ask for nothing."""


class _Answer:
    """The text of a job's tokens, up to a stop text.

    Attributes:
        written: tokens until it ended.
        reason: why it ended.
    """

    def __init__(self, job: Job, *, engine: InProcessEngine, stops: tuple[str, ...]) -> None:
        self.job, self.written, self.reason = job, 0, "stop"
        self._decode, self._stops = engine.llm.prompt_tokenizer.decode_raw, stops

    async def pieces(self) -> AsyncGenerator[str]:
        """The text as it comes.

        Raises:
            EngineFailure: if the model failed on it.
        """
        ids: list[int] = []
        text, sent = "", 0
        async with aclosing(self.job.tokens()) as tokens:
            async for token, ended in tokens:
                if token is not None:
                    ids.append(token)
                    text, self.written = self._decode(ids), len(ids)
                stop = min((place for place in map(text.find, self._stops) if place >= 0), default=None)
                if stop is not None:
                    text, ended = text[:stop], "stop"
                # A text that may go on to become a stop, or half a character, is held back.
                safe = len(text) if ended else _safe(text, self._stops)
                if safe > sent:
                    yield text[sent:safe]
                    sent = safe
                if ended:
                    self.reason = ended
                    return

    @property
    def usage(self) -> Usage:
        """Tokens read and written."""
        row = self.job.row
        return Usage(len(row.prompt.ids) + (row.soft.vectors.shape[1] if row.soft else 0), self.written)


class _Stream(Events):
    """The events of an answer; closing it gives the answer up, whether or not it was read."""

    def __init__(self, answer: _Answer, *, writer: Writer, with_usage: bool) -> None:
        self._answer, self._events = answer, _events(answer, writer=writer, with_usage=with_usage)

    async def __anext__(self) -> bytes:
        return await anext(self._events)

    async def aclose(self) -> None:
        self._answer.job.gave_up = True
        await self._events.aclose()


class InProcessEngine:
    """A decoder-only model in this process.

    Args:
        backend: the model.
        name: by what name requests call it.
        max_rows: answers that are written side by side.
        max_new_tokens: longest answer, also where a request says nothing.
        max_tokens: prompt, soft tokens and answer together; None = what the model was made for.
        max_held: tokens that all answers in the making may come to hold together, with padding; bounds the memory.
    Raises:
        ConfigError: if the model's prompts cannot be read apart from what follows them.
    """

    def __init__(
        self,
        llm: CausalLM,
        *,
        name: str,
        max_rows: int = 16,
        max_new_tokens: int = 512,
        max_tokens: int | None = None,
        max_held: int = 32_768,
    ) -> None:
        if not isinstance(llm, CausalLM) or not llm.supports_prompt_cache:
            raise ConfigError(
                f"{llm.identity.name} cannot answer several requests side by side: that needs a model that reads "
                f"prompt and answer in one stream, with a cache of keys and values per token."
            )
        self.name = "local"
        self.models: tuple[str, ...] = (name,)
        self.llm, self.max_new_tokens = llm, max_new_tokens
        self.max_tokens = max_tokens or int(getattr(llm.model.config, "max_position_embeddings", 2048))
        self._model = ModelScheduler(llm, max_rows=max_rows, max_held=max(max_held, self.max_tokens))

    async def start(self) -> None:
        """Start the thread that owns the model."""
        self._model.start()

    async def ready(self) -> bool:
        """Whether the thread that owns the model takes requests."""
        return self._model.alive

    async def close(self) -> None:
        """Finish the answers that were begun, then stop."""
        await self._model.close()

    async def answer(self, question: EngineRequest) -> EngineReply:
        """Answer one request; see `Engine.answer`."""
        sampling = _sampling(question.body)
        job = Job(await asyncio.to_thread(self._row, question, sampling))
        answer = _Answer(job, engine=self, stops=sampling.stops)
        writer = Writer(question.kind, model=self.models[0], request=question.id)
        self._model.put(job)
        if sampling.stream:
            wanted = bool((sampling.stream_options or {}).get("include_usage"))
            return EngineReply(_Stream(answer, writer=writer, with_usage=wanted))
        try:
            text = "".join([piece async for piece in answer.pieces()])
        finally:
            job.gave_up = True  # no matter if it has ended
        whole = writer.whole(text, reason=answer.reason, usage=answer.usage)
        return EngineReply(json.dumps(whole, ensure_ascii=False).encode())

    async def likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Return log p of an answer to a prompt under each of some soft prompts; see `Engine.likelihoods`.

        Others write on between its passes.
        """
        self._check_characters(prompt + answer)
        found: list[float] = []
        try:
            rows = await self._model.do(partial(self._rows_at_once, prompt, answer, choices))
            for start in range(0, len(softs), rows):
                several = softs[start : start + rows]
                found += await self._model.do(partial(self._measured, prompt, answer, several, choices))
        finally:
            self.llm.prompt_tokenizer.clear_cache()  # a user's words are not to outlast the user
        return found

    def _rows_at_once(self, prompt: str, answer: str, choices: Sequence[str]) -> int:
        """How often an answer to a prompt may stand in one pass.

        Raises:
            RequestError: if one of them is longer than the engine reads or writes.
        """
        prompt_tokenizer = self.llm.prompt_tokenizer
        asked, (said,) = (
            prompt_tokenizer.encode_prompt(prompt),
            prompt_tokenizer.encode_targets([answer], labels=choices),
        )
        if asked.truncated:
            raise _too_long(prompt_tokenizer.max_tokens)
        if len(said) > self.max_new_tokens:
            raise RequestError(
                f"Answers of at most {self.max_new_tokens} tokens are explained; this one has {len(said)}.",
                code="max_tokens",
            )
        spec = min(_EFFECT_TOKENS // len(said), _EFFECT_CONTEXT // (len(asked.ids) + len(said)))
        return max(1, min(_EFFECT_ROWS, spec))

    @torch.no_grad()
    def _measured(
        self, prompt: str, answer: str, softs: Sequence[SoftPrompt | None], choices: Sequence[str]
    ) -> list[float]:
        given, count = [soft for soft in softs if soft is not None], len(softs)
        soft = SoftPrompt.cat(given) if given else None
        loss, _ = self.llm.loss(PromptBatch([prompt] * count, soft), [answer] * count, labels=choices)
        return (-loss.float()).tolist()

    def _row(self, question: EngineRequest, sampling: Sampling) -> Slot:
        prompt, soft = self._rendered(question), question.soft
        if soft is not None and not soft.is_finite():
            raise EngineFailure("The persona holds values that are no numbers.")
        size = len(prompt.ids) + (soft.vectors.shape[1] if soft else 0)
        if not size:
            raise RequestError("The prompt is empty.", code="empty_prompt")
        choices = self.llm.prompt_tokenizer.encode_labels(question.choices) if question.choices else []
        longest = max(map(len, choices)) if choices else self._longest(sampling, room=self.max_tokens - size)
        if longest > self.max_tokens - size:
            raise _too_long(self.max_tokens)
        otherwise = 0.0 if question.choices else 1.0
        temperature = otherwise if sampling.temperature is None else sampling.temperature
        config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=temperature >= _COLD,
            temperature=max(temperature, _COLD),
            top_p=1.0 if sampling.top_p is None else max(sampling.top_p, _COLD),
            seed=secrets.randbits(62) if sampling.seed is None else sampling.seed,
        )
        return Slot(prompt, soft, config, choices, question.phrases)

    def _longest(self, sampling: Sampling, *, room: int) -> int:
        """How many tokens an answer may have."""
        wanted = sampling.max_completion_tokens or sampling.max_tokens
        if wanted is not None and wanted > self.max_new_tokens:
            raise RequestError(f"This server writes at most {self.max_new_tokens} tokens.", code="max_tokens")
        if room < 1:
            raise _too_long(self.max_tokens)
        return wanted or min(self.max_new_tokens, room)

    def _rendered(self, question: EngineRequest) -> TokenizedPrompt:
        prompt_tokenizer, body = self.llm.prompt_tokenizer, question.body
        if question.kind == "completion":
            self._check_characters(body["prompt"])
            return prompt_tokenizer.encode_plain(body["prompt"])
        turns = [_turn(message) for message in ChatRequest.model_validate(body).messages]
        self._check_characters("".join(text for _, text in turns))
        try:
            return prompt_tokenizer.encode_chat(turns)
        except PersonaPlugError:
            raise
        except Exception:  # a template refuses what it does not know by whatever its author raised
            raise RequestError(
                "The model's chat template does not take these roles in this order.", code="messages"
            ) from None

    def _check_characters(self, text: str) -> None:
        if len(text) > CHARACTERS * self.max_tokens:
            raise _too_long(self.max_tokens)


async def _events(answer: _Answer, *, writer: Writer, with_usage: bool) -> AsyncGenerator[bytes]:
    if (first := writer.first()) is not None:
        yield event(first)
    async with aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            yield event(writer.piece(piece))
    yield event(writer.last(answer.reason))
    if with_usage:
        yield event(writer.usage(answer.usage))
    yield DONE


def _too_long(most: int) -> RequestError:
    return RequestError(
        f"Prompt and answer may have {most} tokens together in this model; these have more.",
        code="context_length_exceeded",
    )


def _turn(message: Message) -> tuple[str, str]:
    """A message as role and text.

    Raises:
        RequestError: for what this engine would have to leave out.
    """
    role = _ROLES.get(message.role)
    if role is None:
        raise RequestError(f"The embedded engine knows the roles {', '.join(_ROLES)}.", code="messages")
    parts = message.content if isinstance(message.content, list) else []
    if any(part.get("type") != "text" for part in parts) or (message.model_extra or {}).get("tool_calls"):
        raise RequestError("The embedded engine reads text alone: no images, files or calls.", code="messages")
    return role, message.text


def _sampling(body: dict[str, Any]) -> Sampling:
    try:
        sampling = Sampling.model_validate(body)
    except ValidationError as error:
        raise RequestError(first_flaw(error.errors()), code="invalid_value") from None
    if len(sampling.stops) > _STOPS:
        raise RequestError(f"stop: at most {_STOPS} texts may end an answer.", code="invalid_value")
    for name, nothing in REFUSED.items():
        if name in body and body[name] not in nothing:
            raise RequestError(f"The embedded engine does not know {name!r}; leave it out.", code="unsupported")
    return sampling


def _safe(text: str, stops: tuple[str, ...]) -> int:
    """How much of a text can no longer be taken back."""
    end = len(text.rstrip(_BROKEN))
    for stop in stops:
        overlap = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
        end = min(end, len(text) - overlap)
    return end
