"""Base of the engines in this process: turns requests into rows of one batch, and rows into replies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.llm.base import GenerationConfig
from personaplug.llm.continuous_batching import Slot, SlotCopying
from personaplug.llm.json_grammar import JsonGrammar, JsonGrammars
from personaplug.llm.prompt_tokenizer import PromptTokenizer, TokenizedPrompt
from personaplug.llm.token_bytes import TokenBytes
from personaplug.serving.engines.base import (
    Engine,
    EngineReply,
    EngineRequest,
    EventStream,
    longest_token,
    too_long,
)
from personaplug.serving.engines.job import ClosedSet, Job
from personaplug.serving.engines.job_replies import JobReply
from personaplug.serving.engines.response_format import build_grammar, requested_schema
from personaplug.serving.engines.sampling import Sampling
from personaplug.serving.engines.scheduler import ModelScheduler, SlotBatch
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, Message, ReplyFormatter

_MIN_TEMPERATURE = 1e-4  # below it, decoding is greedy
_MESSAGE_FIELDS = ("name", "annotations", "reasoning_content")  # replies have these fields, and no template writes them
_PART_FIELDS = {"type", "text", "cache_control", "prompt_cache_breakpoint"}  # the last two do not affect the answer
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, repr=False)
class Prepared:
    """A request that passed the checks."""

    sampling: Sampling
    prompt: TokenizedPrompt
    bias: dict[int, float]  # of tokens
    grammar: JsonGrammar | None  # of free text, in its first state


class BatchingEngine(Engine):
    """A language model in this process whose requests share each forward pass.

    Args:
        new_batch: returns an empty batch of the model.
        logits: number of logits of the model.
        end_ids: tokens that end an answer.
        max_tokens: maximum tokens of a prompt, its soft tokens and its answer.
        max_new_tokens: maximum tokens of an answer.
        max_rows: maximum number of concurrent answers.
        max_held: maximum tokens of all running rows, with padding.
    """

    def __init__(
        self,
        new_batch: Callable[[], SlotBatch],
        prompt_tokenizer: PromptTokenizer,
        *,
        name: str,
        logits: int,
        end_ids: Sequence[int],
        max_tokens: int,
        max_new_tokens: int,
        max_rows: int,
        max_held: int,
    ) -> None:
        self.models = (name,)
        self.prompt_tokenizer, self.max_tokens, self.max_new_tokens = prompt_tokenizer, max_tokens, max_new_tokens
        self._logits, self._end_ids = logits, end_ids
        self._longest_token = longest_token(prompt_tokenizer.tokenizer)
        self._token_bytes = TokenBytes(prompt_tokenizer.tokenizer)
        self._vocabulary = min(len(prompt_tokenizer.tokenizer), logits)
        self._open_grammars = cache(self._grammars)
        self._scheduler = ModelScheduler(new_batch, max_rows=max_rows, max_held=max_held)

    async def start(self) -> None:
        self._scheduler.start()

    async def is_ready(self) -> bool:
        return self._scheduler.is_alive

    async def close(self) -> None:
        await self._scheduler.close()

    def check_length(self, characters: int) -> None:
        if characters > self.max_tokens * self._longest_token:
            raise too_long(self.max_tokens)

    async def prepare(self, body: ChatRequest | CompletionRequest, *, choices: Sequence[str] = ()) -> Prepared:
        sampling = Sampling.from_fields(body.model_extra, kind=body.kind)
        if choices:
            sampling.check_closed_set()
        elif body.personaplug.probabilities:
            message = "Only labels have probabilities, but this prompt is answered with free text. GET /v1/task lists"
            raise RequestError(f"{message} the prompts with labels. Or use logprobs.", code="unsupported")
        bias, schema = sampling.token_bias(self._vocabulary), requested_schema(sampling.response_format)
        turns = None if isinstance(body, CompletionRequest) else [_turn(message) for message in body.messages]
        self.check_length(body.characters)
        prompt = await asyncio.to_thread(self._tokenize, body, turns)
        if len(prompt.ids) >= self.max_tokens:
            raise too_long(self.max_tokens)
        grammar = None if schema is None else await asyncio.to_thread(self._grammar, schema)
        return Prepared(sampling, prompt, bias, grammar)

    async def respond(self, request: EngineRequest) -> EngineReply:
        prepared = request.prepared
        if not isinstance(prepared, Prepared):
            prepared = await self.prepare(request.body, choices=request.choices)
        sampling, body, headers = prepared.sampling, request.body, dict[str, str]()
        jobs = await asyncio.to_thread(self._jobs, request, prepared)
        row = jobs[0].row
        if not row.choices and (sampling.max_new_tokens or 0) > row.config.max_new_tokens:
            headers["X-Personaplug-Max-Tokens"] = str(row.config.max_new_tokens)
        if row.copying is not None:
            headers["X-Personaplug-Copy-Head"] = "true"
        reply = JobReply(jobs, ReplyFormatter(body.kind, model=request.model or self.models[0], request_id=request.id))
        self._scheduler.submit(jobs)
        if body.stream:
            include_usage = bool(sampling.stream_options and sampling.stream_options.include_usage)
            events = EventStream(reply.events(include_usage=include_usage), on_close=reply.cancel)
            return EngineReply(events, headers=headers)
        try:
            return EngineReply(await reply.whole(), headers=headers)
        finally:
            reply.cancel()  # no effect on answers that have ended

    def _grammars(self) -> JsonGrammars:
        tokenizer = self.prompt_tokenizer.tokenizer
        return JsonGrammars(tokenizer, vocabulary=self._logits, end_ids=self._end_ids)

    def _grammar(self, schema: dict[str, Any]) -> JsonGrammar:
        try:
            grammars = self._open_grammars()
        except ConfigError as error:
            raise RequestError(f"response_format: {error}", code="unsupported") from None
        return build_grammar(grammars, schema)

    def _jobs(self, request: EngineRequest, prepared: Prepared) -> list[Job]:
        """Return a job for each answer."""
        closed_set, sampling, body = None, prepared.sampling, request.body
        if request.choices:
            top, with_distribution = sampling.logprob_count(body.kind), body.personaplug.probabilities
            closed_set = ClosedSet(request.choices, top, with_distribution)
        return [
            Job(
                row,
                decode=self.prompt_tokenizer.decode_raw,
                token_bytes=self._token_bytes.of,
                stop_texts=sampling.stop_texts,
                closed_set=closed_set,
                tenant=request.tenant,
            )
            for row in self._rows(request, prepared, closed_set)
        ]

    def _rows(self, request: EngineRequest, prepared: Prepared, closed_set: ClosedSet | None) -> list[Slot]:
        """Return a row for each answer. Rows with the same prompt object share one pass over the prompt."""
        prompt, sampling, soft = prepared.prompt, prepared.sampling, request.soft
        if soft is not None and not soft.is_finite():
            raise EngineFailure("The persona has values that are not finite.")
        prompt_tokens = len(prompt.ids) + (soft.tokens if soft else 0)
        if not prompt_tokens:
            raise RequestError("The prompt is empty.", code="empty_prompt")
        room = self.max_tokens - prompt_tokens
        choices = self.prompt_tokenizer.encode_labels(request.choices) if request.choices else []
        # Labels are never truncated; max_tokens does not apply to them.
        needed = max(map(len, choices)) if choices else 1
        if needed > room:
            raise too_long(self.max_tokens)
        max_new_tokens = needed if choices else min(sampling.max_new_tokens or room, self.max_new_tokens, room)
        default = 0.0 if request.choices else 1.0
        temperature = default if sampling.temperature is None else sampling.temperature
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature >= _MIN_TEMPERATURE,
            temperature=max(temperature, _MIN_TEMPERATURE),
            top_p=1.0 if sampling.top_p is None else max(sampling.top_p, _MIN_TEMPERATURE),
        )
        needs_scores = closed_set is not None and closed_set.needs_scores
        top_logprobs = None if choices else sampling.logprob_count(request.body.kind)
        return [
            Slot(
                prompt,
                soft,
                replace(config, seed=seed),
                choices,
                _slot_copying(request),
                needs_scores=needs_scores,
                shift=sampling.token_shift(prepared.bias),
                grammar=None if prepared.grammar is None else prepared.grammar.copy(),
                top_logprobs=top_logprobs,
            )
            for seed in sampling.seeds
        ]

    def _tokenize(
        self, body: ChatRequest | CompletionRequest, turns: Sequence[tuple[str, str]] | None
    ) -> TokenizedPrompt:
        tokenizer = self.prompt_tokenizer
        if turns is None:
            return tokenizer.encode_plain(body.prompt_text)
        try:
            return tokenizer.encode_chat(turns)
        except ConfigError as error:  # the template refuses these roles
            raise RequestError(str(error), code="messages") from None


def _slot_copying(request: EngineRequest) -> SlotCopying | None:
    """Return the copy head of a request; None for a closed set, and without soft tokens right before the answer."""
    copying, soft = request.copying, request.soft
    if copying is None or request.choices or soft is None or soft.placement != "suffix":
        return None
    return SlotCopying(copying.head, copying.own[0])


def _turn(message: Message) -> tuple[str, str]:
    """Return a message's role and text; RequestError if the message has content that this engine does not support."""
    role = _ROLES.get(message.role)
    if role is None:
        raise RequestError(f"This engine supports the roles {', '.join(_ROLES)}.", code="messages")
    parts = message.content if isinstance(message.content, list) else []
    unknown = {name for name, value in (message.model_extra or {}).items() if value and name not in _MESSAGE_FIELDS}
    if unknown or any(part.get("type") != "text" or part.keys() - _PART_FIELDS for part in parts):
        raise RequestError(
            "This engine supports text only: no images, files or calls. The last message may have pictures if the task "
            "has a 'name_field' and the encoder a part +pictures:NAME.",
            code="messages",
        )
    return role, message.text
