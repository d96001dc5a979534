"""Frozen decoder-only models: prompt and answer are one sequence (Llama, GPT-NeoX, Qwen, Gemma, …)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch, Runner
from personaplug.llm.cached_prefix import CachedPrefixRunner
from personaplug.llm.chunked_cross_entropy import log_softmax
from personaplug.llm.generation import generate_with_transformers
from personaplug.llm.padding import pad, pad_with_mask
from personaplug.llm.prefix_probe import check_prefix_cache
from personaplug.llm.prompt_cache import Layout
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED, Spliced

_LABEL_ROWS = 64  # (sample, label) rows per pass; bounds the copies of the prompt's cache


class CausalLM(LanguageModel):
    """A frozen decoder-only model."""

    is_encoder_decoder = False

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        super().__init__(model, tokenizer, **settings)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_columns = "logits_to_keep" in accepted
        self.spliced, self.cached_prefix = SplicedRunner(self), CachedPrefixRunner(self)

    @cached_property
    def prompt_layout(self) -> Layout | None:
        """Shape of cached keys and values; the first access runs `check_prefix_cache`."""
        return check_prefix_cache(self)

    def choose_runner(self, batch: PromptBatch, *, num_beams: int = 1) -> Runner:
        """Return the cached-prefix runner for `suffix` soft tokens, unless the model or beam search rules it out."""
        if batch.has_soft("suffix") and num_beams == 1 and self.supports_prompt_cache:
            return self.cached_prefix
        return self.spliced

    def forward(
        self, embeds: Tensor, *, mask: Tensor, positions: Tensor, columns: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        """Run the model on (B, T, D) and return its logits (B, C, V) and its output.

        `mask` is (B, T or more), `positions` (B, T), `columns` (C,) the indices in T whose logits are needed.
        """
        if self._takes_positions:
            options["position_ids"] = positions
        if self._takes_columns:
            options |= self.only_columns(columns)
        output = self.model(inputs_embeds=embeds, attention_mask=mask, **options)
        logits: Tensor = output.logits
        return logits if self._takes_columns else logits[:, columns.to(logits.device)], output

    def only_columns(self, columns: Tensor) -> dict[str, Tensor]:
        """Return the argument that limits the logits to some columns, if the model has it."""
        # A tensor of indices, not a number: a number makes a strided slice, which torch multiplies row by row with a
        # copy of the whole output layer (measured: 1.1 s instead of 0.01 s per batch).
        return {"logits_to_keep": columns.to(self.device)} if self._takes_columns else {}

    @torch.no_grad()
    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return states as `compute_prompt_states` and the last logits (B, V) of left-padded rows (B, T, D)."""
        cache = DynamicCache()  # without a config it keeps all tokens, also those beyond a sliding window
        positions, last = (mask.cumsum(dim=1) - 1).clamp(min=0), torch.tensor([mask.shape[1] - 1])
        logits, _ = self.forward(
            embeds, mask=mask, positions=positions, columns=last, past_key_values=cache, use_cache=True
        )
        layers: list[Any] = cache.layers
        states = torch.stack([part for layer in layers for part in (layer.keys, layer.values)])
        starts = (mask.shape[1] - mask.sum(dim=1)).tolist()
        return [states[:, row, :, start:] for row, start in enumerate(starts)], logits[:, -1]

    def compute_prompt_states(self, prompts: Sequence[Ids]) -> list[Tensor]:
        """Return the keys and values of each prompt, (2 · layers, heads, n, head width)."""
        ids, mask = pad_with_mask(prompts, side="left", device=self.device)
        return self.prefill(self.embed(ids), mask)[0]


class SplicedRunner(Runner):
    """Prompt, soft tokens and answer in one sequence; for soft tokens at any position, or none."""

    def __init__(self, llm: CausalLM) -> None:
        self.llm = llm

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        spliced = self.llm.splice_prompts(batch, target_ids)
        targets = pad(target_ids, fill=IGNORED, side="left").to(self.llm.device)
        end = spliced.mask.shape[1] - 1
        # The logits at position t predict the token at t + 1.
        columns = torch.arange(end - targets.shape[1], end)
        return self._forward(spliced, columns=columns, use_cache=False)[0], targets

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        spliced = self.llm.splice_prompts(batch)
        longest, last = max(map(len, label_ids)), torch.tensor([spliced.embeds.shape[1] - 1])
        logits, output = self._forward(spliced, columns=last, use_cache=longest > 1)
        first = log_softmax(logits[:, -1])
        step = max(1, _LABEL_ROWS // len(batch.prompts))
        chunks = [label_ids[start : start + step] for start in range(0, len(label_ids), step)]
        return torch.cat([self._scores_after(output, first, spliced=spliced, label_ids=ids) for ids in chunks], dim=1)

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        spliced = self.llm.splice_prompts(batch)
        inputs = {"inputs_embeds": spliced.embeds, "attention_mask": spliced.mask}
        last = self.llm.only_columns(torch.tensor([-1]))
        return generate_with_transformers(self.llm, config, batch.ngrams, **inputs, **last)

    def _forward(self, spliced: Spliced, *, columns: Tensor, use_cache: bool) -> tuple[Tensor, Any]:
        return self.llm.forward(
            spliced.embeds, mask=spliced.mask, positions=spliced.positions, columns=columns, use_cache=use_cache
        )

    def _scores_after(self, output: Any, first: Tensor, *, spliced: Spliced, label_ids: Sequence[Ids]) -> Tensor:
        """Return the log-probability of labels, (B, len(label_ids)); `first` are those of all first tokens, (B, V)."""
        size, count = first.shape[0], len(label_ids)
        ids, mask = pad_with_mask(label_ids, side="right", device=self.llm.device)  # (count, L)
        total = first[:, ids[:, 0]]
        if ids.shape[1] == 1:
            return total
        repeated = copy.deepcopy(output.past_key_values)
        repeated.batch_repeat_interleave(count)
        inputs, columns = ids[:, :-1].repeat(size, 1), torch.arange(ids.shape[1] - 1, device=self.llm.device)
        prompt_mask = spliced.mask.repeat_interleave(count, dim=0)
        logits, _ = self.llm.forward(
            self.llm.embed(inputs),
            mask=torch.cat([prompt_mask, mask[:, :-1].repeat(size, 1)], dim=1),
            positions=prompt_mask.sum(dim=1, keepdim=True) + columns,
            columns=columns,
            past_key_values=repeated,
            use_cache=True,
        )
        targets = ids[:, 1:].repeat(size, 1).unsqueeze(-1)
        per_token = log_softmax(logits).gather(-1, targets).squeeze(-1) * mask[:, 1:].repeat(size, 1)
        return total + per_token.sum(dim=1).view(size, count)
