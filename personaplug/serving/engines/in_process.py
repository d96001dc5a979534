"""The embedded engine: a transformers model in this process, which runs requests of all users in shared batches."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial

import torch

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import Slot
from personaplug.llm.loading import open_llm
from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.llm.prompt_tokenizer import TokenizedPrompt
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.base import (
    MAX_CHARACTERS_PER_TOKEN,
    Engine,
    EngineReply,
    EngineRequest,
    EventStream,
    LoadPlug,
)
from personaplug.serving.engines.job import Job
from personaplug.serving.engines.sampling import Sampling
from personaplug.serving.engines.scheduler import ModelScheduler
from personaplug.serving.openai_protocol import CompletionRequest, Message, ReplyFormatter, to_json

# Bounds of one pass that measures an answer under several soft prompts: rows, tokens of all answers (each takes a row
# of logits), tokens of all prompts and answers.
_SCORE_ROWS = 32
_SCORE_ANSWER_TOKENS = 512
_SCORE_TOKENS = 8192

_MAX_HELD = 32_768  # tokens, padding included, that all running answers may come to hold; bounds the memory
_MIN_TEMPERATURE = 1e-4  # below it the likeliest token is taken
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class InProcessEngine(Engine):
    """A decoder-only model in this process.

    Args:
        max_rows: answers that are generated at once.
        max_new_tokens: longest answer.
    """

    def __init__(self, llm: LanguageModel, *, name: str, max_rows: int = 16, max_new_tokens: int = 512) -> None:
        if not isinstance(llm, CausalLM) or not llm.supports_prompt_cache:
            raise ConfigError(
                f"{llm.identity.name} cannot answer several requests side by side: that needs a model that reads "
                f"prompt and answer in one stream, with a cache of keys and values per token."
            )
        self.models = (name,)
        self.llm, self.max_new_tokens = llm, max_new_tokens
        # Tokens of a prompt, its soft tokens and its answer.
        self.max_tokens = llm.max_cached_tokens or 2048
        self._scheduler = ModelScheduler(llm, max_rows=max_rows, max_held=max(_MAX_HELD, self.max_tokens))

    @classmethod
    def open(cls, model: ModelConfig, config: ServingConfig, load_plug: LoadPlug) -> tuple[Engine, PersonaPlug]:
        """Open the engine as `EngineOpener` says."""
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

    def build_phrases(self, answers: Sequence[str]) -> UserNgramCache:
        return self.llm.build_ngram_cache(answers)

    async def respond(self, request: EngineRequest) -> EngineReply:
        sampling = Sampling.from_fields(request.body.model_extra)
        row = await asyncio.to_thread(self._row, request, sampling)
        job = Job(row, decode=self.llm.prompt_tokenizer.decode_raw, stop_texts=sampling.stop_texts)
        formatter = ReplyFormatter(request.body.kind, model=self.models[0], request_id=request.id)
        self._scheduler.submit(job)
        if request.body.stream:
            include_usage = bool((sampling.stream_options or {}).get("include_usage"))
            return EngineReply(EventStream(job.events(formatter, include_usage=include_usage), on_close=job.cancel))
        try:
            text = "".join([piece async for piece in job.text()])
        finally:
            job.cancel()  # has no effect on a job that has ended
        return EngineReply(to_json(formatter.whole(text, reason=job.finish_reason, usage=job.usage)))

    async def log_likelihoods(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str] = ()
    ) -> list[float]:
        """Measure in passes, between which other requests go on."""
        self._check_characters(prompt + answer)
        log_likelihoods: list[float] = []
        try:
            rows = await self._scheduler.run(partial(self._rows_per_pass, prompt, answer, choices=choices))
            for start in range(0, len(softs), rows):
                part = softs[start : start + rows]
                score = partial(self._score, prompt, answer, softs=part, choices=choices)
                log_likelihoods += await self._scheduler.run(score)
        finally:
            self.llm.prompt_tokenizer.clear_cache()  # its cache holds the user's words, which must not outlast the user
        return log_likelihoods

    def _rows_per_pass(self, prompt: str, answer: str, *, choices: Sequence[str]) -> int:
        """How many soft prompts fit in one pass; RequestError if the prompt or the answer is too long."""
        tokenizer = self.llm.prompt_tokenizer
        prompt_tokens = tokenizer.encode_prompt(prompt)
        (answer_ids,) = tokenizer.encode_targets([answer], labels=choices)
        if prompt_tokens.truncated:
            raise _too_long(tokenizer.max_tokens)
        if len(answer_ids) > self.max_new_tokens:
            message = f"Answers of at most {self.max_new_tokens} tokens are explained; this one has {len(answer_ids)}."
            raise RequestError(message, code="max_tokens")
        total = len(prompt_tokens.ids) + len(answer_ids)
        return max(1, min(_SCORE_ROWS, _SCORE_ANSWER_TOKENS // len(answer_ids), _SCORE_TOKENS // total))

    @torch.no_grad()
    def _score(
        self, prompt: str, answer: str, *, softs: Sequence[SoftPrompt | None], choices: Sequence[str]
    ) -> list[float]:
        personas = [soft for soft in softs if soft is not None]
        batch = PromptBatch([prompt] * len(softs), SoftPrompt.cat(personas) if personas else None)
        loss, _ = self.llm.loss(batch, [answer] * len(softs), labels=choices)
        return (-loss.float()).tolist()

    def _row(self, request: EngineRequest, sampling: Sampling) -> Slot:
        prompt, soft = self._tokenize(request), request.soft
        if soft is not None and not soft.is_finite():
            raise EngineFailure("The persona holds values that are no numbers.")
        prompt_tokens = len(prompt.ids) + (soft.tokens if soft else 0)
        if not prompt_tokens:
            raise RequestError("The prompt is empty.", code="empty_prompt")
        room = self.max_tokens - prompt_tokens
        choices = self.llm.prompt_tokenizer.encode_labels(request.choices) if request.choices else []
        max_new_tokens = max(map(len, choices)) if choices else self._max_new_tokens(sampling, room)
        if max_new_tokens > room:
            raise _too_long(self.max_tokens)
        default = 0.0 if request.choices else 1.0
        temperature = default if sampling.temperature is None else sampling.temperature
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature >= _MIN_TEMPERATURE,
            temperature=max(temperature, _MIN_TEMPERATURE),
            top_p=1.0 if sampling.top_p is None else max(sampling.top_p, _MIN_TEMPERATURE),
            seed=secrets.randbits(62) if sampling.seed is None else sampling.seed,
        )
        return Slot(prompt, soft, config, choices, request.phrases)

    def _max_new_tokens(self, sampling: Sampling, room: int) -> int:
        limit = sampling.max_completion_tokens or sampling.max_tokens
        if limit is not None and limit > self.max_new_tokens:
            raise RequestError(f"This server writes at most {self.max_new_tokens} tokens.", code="max_tokens")
        if room < 1:
            raise _too_long(self.max_tokens)
        return limit or min(self.max_new_tokens, room)

    def _tokenize(self, request: EngineRequest) -> TokenizedPrompt:
        body, tokenizer = request.body, self.llm.prompt_tokenizer
        if isinstance(body, CompletionRequest):
            self._check_characters(body.prompt)
            return tokenizer.encode_plain(body.prompt)
        turns = [_turn(message) for message in body.messages]
        self._check_characters("".join(text for _, text in turns))
        try:
            return tokenizer.encode_chat(turns)
        except ConfigError as error:  # the template refuses these roles
            raise RequestError(str(error), code="messages") from None

    def _check_characters(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS_PER_TOKEN * self.max_tokens:
            raise _too_long(self.max_tokens)


def _too_long(max_tokens: int) -> RequestError:
    return RequestError(
        f"Prompt and answer may have {max_tokens} tokens together in this model; these have more.",
        code="context_length_exceeded",
    )


def _turn(message: Message) -> tuple[str, str]:
    """Return a message's role and text; RequestError if it holds what this engine does not support."""
    role = _ROLES.get(message.role)
    if role is None:
        raise RequestError(f"The embedded engine knows the roles {', '.join(_ROLES)}.", code="messages")
    parts = message.content if isinstance(message.content, list) else []
    if any(part.get("type") != "text" for part in parts) or (message.model_extra or {}).get("tool_calls"):
        raise RequestError("The embedded engine reads text alone: no images, files or calls.", code="messages")
    return role, message.text
