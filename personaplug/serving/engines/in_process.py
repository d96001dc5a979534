"""The embedded engine: a transformers model in this process, which batches the requests of all users."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from personaplug.config import ModelConfig
from personaplug.data.records import Prompt, characters
from personaplug.errors import ConfigError, RequestError
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch
from personaplug.llm.copied_answers import answer_sources
from personaplug.llm.copy_head import CopyHead, CopySource
from personaplug.llm.loading import open_llm
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.run import Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.copied_answers import AnswerReader
from personaplug.serving.engines.base import Engine, LoadPlug, too_long
from personaplug.serving.engines.batching import BatchingEngine

# Limits of one forward pass that scores an answer for several soft prompts: rows, tokens of all answers (each takes a
# row of logits), tokens of all prompts and answers.
_SCORE_ROWS = 32
_SCORE_ANSWER_TOKENS = 512
_SCORE_TOKENS = 8192

_READ_CHARACTERS = 2048  # of past answers to read between two tokens, about 512 tokens
_MAX_HELD = 32_768  # maximum tokens of all running rows, with padding; limits the memory


class InProcessEngine(BatchingEngine):
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
        self.llm = llm
        max_tokens = llm.max_cached_tokens or 2048
        super().__init__(
            partial(ContinuousBatch, llm),
            llm.prompt_tokenizer,
            name=name,
            logits=llm.embed.num_embeddings,
            end_ids=llm.end_ids,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            max_rows=max_rows,
            max_held=max(_MAX_HELD, max_tokens),
        )

    @classmethod
    def open(cls, model: ModelConfig, config: ServingConfig, load_plug: LoadPlug) -> tuple[Engine, PersonaPlug]:
        """Open the engine; see `EngineOpener`."""
        llm = open_llm(model)
        name = config.model or model.llm
        engine = cls(llm, name=name, max_rows=config.max_rows, max_new_tokens=config.max_new_tokens)
        return engine, load_plug(llm.identity).compute_items_in(llm.dtype).to(llm.device)

    def load_copy_head(self, run: Run, *, seed: int) -> AnswerReader:
        head = run.load_copy_head(self.llm, seed=seed)
        return AnswerReader(head, partial(self._read, head))

    def _read(self, head: CopyHead, answers: Sequence[str]) -> list[CopySource]:
        """Read past answers in several passes, so that other requests can run in between."""
        read, groups = partial(answer_sources, self.llm, head), _groups_of_texts(answers)
        return [source for texts in groups for source in self._scheduler.run_and_wait(partial(read, texts))]

    async def check_texts(self, prompt: Prompt, answer: str, *, choices: Sequence[str]) -> None:
        self.check_length(characters(prompt) + len(answer))
        try:
            await asyncio.to_thread(self._rows_per_pass, prompt, answer, choices=choices)
        finally:
            self.prompt_tokenizer.clear_cache()

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
            self.prompt_tokenizer.clear_cache()  # user text in the cache must not outlive the request
        return log_likelihoods

    def _rows_per_pass(self, prompt: Prompt, answer: str, *, choices: Sequence[str]) -> int:
        """Return how many soft prompts fit in one pass; RequestError if the prompt or the answer is too long."""
        tokenizer = self.prompt_tokenizer
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
