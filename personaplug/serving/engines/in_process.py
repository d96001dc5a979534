"""The embedded engine: a transformers model in this process, which batches the requests of all users."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from personaplug.config import ModelConfig
from personaplug.data.records import Prompt, characters
from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import Slot, SlotCopying
from personaplug.llm.copied_answers import answer_sources
from personaplug.llm.copy_head import CopyHead, CopySource
from personaplug.llm.json_grammar import JsonGrammar, JsonGrammars
from personaplug.llm.loading import open_llm
from personaplug.llm.prompt_tokenizer import TokenizedPrompt
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.token_bytes import TokenBytes
from personaplug.plug.model import PersonaPlug
from personaplug.run import Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.copied_answers import AnswerReader
from personaplug.serving.engines.base import (
    Engine,
    EngineReply,
    EngineRequest,
    EventStream,
    LoadPlug,
    longest_token,
    too_long,
)
from personaplug.serving.engines.job import ClosedSet, Job
from personaplug.serving.engines.job_replies import JobReply
from personaplug.serving.engines.response_format import build_grammar, requested_schema
from personaplug.serving.engines.sampling import Sampling
from personaplug.serving.engines.scheduler import ModelScheduler
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, Message, ReplyFormatter

# Limits of one forward pass that scores an answer for several soft prompts: rows, tokens of all answers (each takes a
# row of logits), tokens of all prompts and answers.
_SCORE_ROWS = 32
_SCORE_ANSWER_TOKENS = 512
_SCORE_TOKENS = 8192

_READ_CHARACTERS = 2048  # of past answers to read between two tokens, about 512 tokens
_MAX_HELD = 32_768  # maximum tokens of all running rows, with padding; limits the memory
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


class InProcessEngine(Engine):
    """A decoder-only model in this process.

    Args:
        max_rows: maximum number of concurrent answers.
        max_new_tokens: maximum tokens of an answer.
    """

    def __init__(self, llm: LanguageModel, *, name: str, max_rows: int = 16, max_new_tokens: int = 512) -> None:
        if not isinstance(llm, CausalLM) or not llm.supports_prompt_cache:
            reason = llm.check.why_no_prompt_cache or "it is an encoder-decoder"
            raise ConfigError(
                f"{llm.identity.name} cannot serve concurrent requests: {reason}. Use another model; docs/families.md "
                f"lists those with cached prompts."
            )
        self.models = (name,)
        self.llm, self.max_new_tokens = llm, max_new_tokens
        # Maximum tokens of a prompt, its soft tokens and its answer.
        self.max_tokens = llm.max_cached_tokens or 2048
        self._longest_token = longest_token(llm.prompt_tokenizer.tokenizer)
        self._token_bytes = TokenBytes(llm.prompt_tokenizer.tokenizer)
        self._vocabulary = min(len(llm.prompt_tokenizer.tokenizer), llm.embed.num_embeddings)
        self._open_grammars = cache(self._grammars)
        self._scheduler = ModelScheduler(llm, max_rows=max_rows, max_held=max(_MAX_HELD, self.max_tokens))

    @classmethod
    def open(cls, model: ModelConfig, config: ServingConfig, load_plug: LoadPlug) -> tuple[Engine, PersonaPlug]:
        """Open the engine; see `EngineOpener`."""
        llm = open_llm(model)
        name = config.model or model.llm
        engine = cls(llm, name=name, max_rows=config.max_rows, max_new_tokens=config.max_new_tokens)
        return engine, load_plug(llm.identity).compute_items_in(llm.dtype).to(llm.device)

    async def start(self) -> None:
        self._scheduler.start()

    async def is_ready(self) -> bool:
        return self._scheduler.is_alive

    async def close(self) -> None:
        await self._scheduler.close()

    def load_copy_head(self, run: Run, *, seed: int) -> AnswerReader:
        head = run.load_copy_head(self.llm, seed=seed)
        return AnswerReader(head, partial(self._read, head))

    def _read(self, head: CopyHead, answers: Sequence[str]) -> list[CopySource]:
        """Read past answers in several passes, so that other requests can run in between."""
        read, groups = partial(answer_sources, self.llm, head), _groups_of_texts(answers)
        return [source for texts in groups for source in self._scheduler.run_and_wait(partial(read, texts))]

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

    async def check_texts(self, prompt: Prompt, answer: str, *, choices: Sequence[str]) -> None:
        self.check_length(characters(prompt) + len(answer))
        try:
            await asyncio.to_thread(self._rows_per_pass, prompt, answer, choices=choices)
        finally:
            self.llm.prompt_tokenizer.clear_cache()

    async def log_likelihoods(
        self, prompt: Prompt, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Measure in several passes, so that other requests can run in between."""
        log_likelihoods: list[float] = []
        try:
            rows = await asyncio.to_thread(self._rows_per_pass, prompt, answer, choices=choices)
            for start in range(0, len(softs), rows):
                part = softs[start : start + rows]
                score = partial(self._score, prompt, answer, softs=part, choices=choices)
                log_likelihoods += await self._scheduler.run(score)
        finally:
            self.llm.prompt_tokenizer.clear_cache()  # user text in the cache must not outlive the request
        return log_likelihoods

    def _rows_per_pass(self, prompt: Prompt, answer: str, *, choices: Sequence[str]) -> int:
        """Return how many soft prompts fit in one pass; RequestError if the prompt or the answer is too long."""
        tokenizer = self.llm.prompt_tokenizer
        try:
            prompt_tokens = tokenizer.encode_prompt(prompt)
        except ConfigError as error:  # the template refuses these roles
            raise RequestError(str(error), code="messages") from None
        (answer_ids,) = tokenizer.encode_targets([answer], labels=choices)
        if prompt_tokens.truncated:
            raise too_long(tokenizer.max_tokens)
        if len(answer_ids) > self.max_new_tokens:
            message = f"An answer to explain may have at most {self.max_new_tokens} tokens; found {len(answer_ids)}."
            raise RequestError(message, code="max_tokens")
        total = len(prompt_tokens.ids) + len(answer_ids)
        return max(1, min(_SCORE_ROWS, _SCORE_ANSWER_TOKENS // max(1, len(answer_ids)), _SCORE_TOKENS // total))

    @torch.no_grad()
    def _score(
        self, prompt: Prompt, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str]
    ) -> list[float]:
        personas = [soft for soft in softs if soft is not None]
        batch = PromptBatch([prompt] * len(softs), SoftPrompt.cat(personas) if personas else None)
        loss, _ = self.llm.loss(batch, [answer] * len(softs), labels=choices)
        return (-loss.float()).tolist()

    def _grammars(self) -> JsonGrammars:
        tokenizer, vocabulary = self.llm.prompt_tokenizer.tokenizer, self.llm.embed.num_embeddings
        return JsonGrammars(tokenizer, vocabulary=vocabulary, end_ids=self.llm.end_ids)

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
                decode=self.llm.prompt_tokenizer.decode_raw,
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
        choices = self.llm.prompt_tokenizer.encode_labels(request.choices) if request.choices else []
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
        tokenizer = self.llm.prompt_tokenizer
        if turns is None:
            return tokenizer.encode_plain(body.prompt_text)
        try:
            return tokenizer.encode_chat(turns)
        except ConfigError as error:  # the template refuses these roles
            raise RequestError(str(error), code="messages") from None


def _groups_of_texts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts in order, with a limited number of characters; a longer text is alone."""
    group: list[str] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > _READ_CHARACTERS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


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
        raise RequestError(f"The embedded engine supports the roles {', '.join(_ROLES)}.", code="messages")
    parts = message.content if isinstance(message.content, list) else []
    unknown = {name for name, value in (message.model_extra or {}).items() if value and name not in _MESSAGE_FIELDS}
    if unknown or any(part.get("type") != "text" or part.keys() - _PART_FIELDS for part in parts):
        raise RequestError("The embedded engine supports text only: no images, files or calls.", code="messages")
    return role, message.text
