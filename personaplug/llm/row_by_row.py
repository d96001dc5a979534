"""Slow runners for models that need rows without padding, positions and cache: each row runs alone and in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from torch.nn.utils.rnn import pad_sequence

from personaplug.errors import ConfigError
from personaplug.llm.base import Decoding, GenerationConfig, PromptBatch, Runner
from personaplug.llm.generation import decode_tokens
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED

if TYPE_CHECKING:
    from personaplug.llm.causal_lm import CausalLM


class RowByRowRunner(Runner):
    """Passes each row of a batch separately to another runner, so that no row is padded."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        pairs = [self.runner.target_logits(row, [ids]) for row, ids in zip(batch.rows(), target_ids, strict=True)]
        longest = max(logits.shape[1] for logits, _ in pairs)
        logits = [pad_tensor(logits[0], (0, 0, 0, longest - logits.shape[1])) for logits, _ in pairs]
        targets = pad_sequence([ids[0] for _, ids in pairs], batch_first=True, padding_value=IGNORED)
        return torch.stack(logits), targets

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        return torch.cat([self.runner.label_scores(row, label_ids) for row in batch.rows()])

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        return [ids for row in batch.rows() for ids in self.runner.generate_ids(row, config)]


class UncachedRunner(Runner):
    """Runs one row of a decoder-only model as a sequence of embeddings, without mask, positions and cache."""

    def __init__(self, llm: CausalLM) -> None:
        self.llm = llm

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        embeds = self.llm.splice_prompts(batch, target_ids).embeds
        logits = self._logits(embeds)[:, -len(target_ids[0]) - 1 : -1]
        return logits, torch.tensor([target_ids[0]], device=logits.device)

    def start_decoding(self, batch: PromptBatch) -> Decoding:
        rows = [self.llm.splice_prompts(batch).embeds]

        def step(tokens: Tensor) -> Tensor:
            rows.append(self.llm.embed(tokens)[:, None])
            return self._logits(torch.cat(rows, dim=1))[:, -1]

        return Decoding(self._logits(rows[0])[:, -1], step)

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        if config.num_beams > 1:
            raise ConfigError(
                f"{self.llm.identity.name} runs without a cache, so num_beams must be 1; found {config.num_beams}."
            )
        return decode_tokens(self.llm, config, batch, decoding=self.start_decoding(batch))

    def _logits(self, embeds: Tensor) -> Tensor:
        self.llm.reset_ropes()
        options = {"use_cache": False} if "use_cache" in self.llm.accepted else {}
        logits: Tensor = self.llm.model(**self.llm.embed.model_inputs(embeds), **options).logits
        return logits
