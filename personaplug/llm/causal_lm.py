"""Frozen decoder-only models: prompt and answer are one sequence (Llama, GPT-NeoX, Qwen, Gemma, …)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personaplug.errors import ConfigError
from personaplug.llm.base import Decoding, GenerationConfig, LanguageModel, PromptBatch, Runner
from personaplug.llm.cached_prefix import CachedPrefixRunner
from personaplug.llm.check_results import ModelCheck
from personaplug.llm.chunked_cross_entropy import log_softmax
from personaplug.llm.copy_head import CopyHead
from personaplug.llm.generation import decode_tokens, generate_with_transformers
from personaplug.llm.model_cache import cache_argument, cache_of, empty_cache
from personaplug.llm.model_check import check_model
from personaplug.llm.padding import common_prefix, pad, pad_with_mask
from personaplug.llm.prompt_state import PromptState, StateBatch
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.row_by_row import RowByRowRunner, UncachedRunner
from personaplug.llm.soft_prompt import IGNORED, Spliced

_LABEL_ROWS = 64  # (sample, label) rows per pass; limits the copies of the prompt's cache
_MIN_SHARED_TOKENS = 256  # a separate pass over a common prefix must save this many tokens, and an eighth of the rest


class CausalLM(LanguageModel):
    """A frozen decoder-only model."""

    is_encoder_decoder = False
    prefix_ways: dict[str, CachedPrefixRunner]

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        self.cache_name = cache_argument(model)
        self._ropes = [module for module in model.modules() if is_switching_rope(module)]
        self.rope_switch = min((_rope_limit(rope.config) for rope in self._ropes), default=None)
        super().__init__(model, tokenizer, **settings)
        self.prefix_ways = {"apart": CachedPrefixRunner(self), "joined": CachedPrefixRunner(self, joins=True)}
        self.cached_prefix = self.prefix_ways["apart"]
        self.row_by_row = RowByRowRunner(UncachedRunner(self))
        self.ways = {
            "batched": SplicedRunner(self),
            "batched, each label in full": SplicedRunner(self, repeats_cache=False),
            "batched by transformers": SplicedRunner(self, repeats_cache=False, decodes=False),
            "row by row": self.row_by_row,
        }
        check_model(self)

    def apply_check(self, check: ModelCheck) -> None:
        super().apply_check(check)
        self.cached_prefix = self.prefix_ways[check.prefix_way or "apart"]

    def choose_runner(self, batch: PromptBatch, *, new_tokens: int, num_beams: int = 1) -> Runner:
        """Return the cached-prefix runner for `suffix` soft tokens, unless the model or beam search rules it out.

        Raises:
            ConfigError: if a batch with a copy head needs another runner.
        """
        if self._reaches_rope_switch(batch, new_tokens=new_tokens):
            runner: Runner = self.row_by_row
        elif batch.has_soft("suffix") and num_beams == 1 and self.supports_prompt_cache:
            return self.cached_prefix
        else:
            runner = self.whole
        if batch.copying is not None:
            raise ConfigError(
                "A copy head needs placement=suffix, num_beams=1, a model with a prompt cache, and prompts within the "
                "length of its usual positions. Leave the copy head out."
            )
        return runner

    def new_copy_head(self, *, seed: int) -> CopyHead:
        """Return an untrained copy head for this model, which must support the prompt cache."""
        assert self.prompt_layout is not None
        return CopyHead.for_layout(self.prompt_layout, seed=seed).to(self.device)

    def load_copy_head(self, folder: Path) -> CopyHead:
        """Load a copy head that was trained for this model; see `CopyHead.load`."""
        assert self.prompt_layout is not None
        return CopyHead.load(folder, layout=self.prompt_layout).to(self.device)

    @property
    def max_cached_tokens(self) -> int | None:
        """Longest sequence whose cached states stay valid; None if the config sets no limit."""
        limits = [length for length in (self.max_positions, self.rope_switch) if length is not None]
        return min(limits, default=None)

    def _reaches_rope_switch(self, batch: PromptBatch, *, new_tokens: int) -> bool:
        """Return True if a row may exceed the length at which the model recomputes all rotary positions."""
        if self.rope_switch is None:
            return False
        prompts = [len(row.ids) for row in self.prompt_tokenizer.encode_prompts(batch.prompts, batch.soft_at)]
        soft_tokens = 0 if batch.soft is None else batch.soft.tokens
        return max(prompts, default=0) + soft_tokens + new_tokens > self.rope_switch

    def reset_ropes(self) -> None:
        """Reset dynamic rotary positions, which otherwise depend on the length of earlier texts."""
        for rope in self._ropes:
            if "dynamic" in str(rope.rope_type) and hasattr(rope, "original_inv_freq"):
                rope.inv_freq = rope.original_inv_freq.to(self.device)
                rope.max_seq_len_cached = rope.original_max_seq_len

    def model_logits(self, prompt: Ids, target: Ids, *, before: Ids = ()) -> Tensor:
        ids = torch.tensor([[*prompt, *before, *target]], device=self.device)
        logits: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits[0, -len(target) - 1 : -1]

    def spell(self, ids: Ids) -> Tensor:
        return self.embed(torch.tensor([ids], device=self.device))

    def read(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits

    def forward(
        self, embeds: Tensor, *, mask: Tensor, positions: Tensor, columns: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        """Run the model on (B, T, D) and return its logits (B, C, V) and its output.

        `mask` is (B, T or more), `positions` (B, T). `columns` (C,) are the indices in T whose logits are needed.
        """
        self.reset_ropes()
        if "position_ids" in self.accepted:
            options["position_ids"] = positions
        options |= self.only_columns(columns)
        output = self.model(**self.embed.model_inputs(embeds), attention_mask=mask, **options)
        logits: Tensor = output.logits
        return logits if "logits_to_keep" in self.accepted else logits[:, columns.to(logits.device)], output

    def only_columns(self, columns: Tensor) -> dict[str, Tensor]:
        """Return the argument that limits the logits to these columns, if the model takes it."""
        # Pass a tensor of indices. A number gives a strided slice, which torch multiplies row by row with a copy of the
        # whole output layer (1.1 s instead of 0.01 s per batch).
        return {"logits_to_keep": columns.to(self.device)} if "logits_to_keep" in self.accepted else {}

    @torch.no_grad()
    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[list[PromptState], Tensor]:
        """Run left-padded rows (B, T, D); return the state of each row and the last logits (B, V)."""
        cache = empty_cache(self.model.config.get_text_config())
        positions, last = (mask.cumsum(dim=1) - 1).clamp(min=0), torch.tensor([mask.shape[1] - 1])
        logits, _ = self.forward(
            embeds, mask=mask, positions=positions, columns=last, use_cache=True, **{self.cache_name: cache}
        )
        batch = StateBatch.of_cache(cache.layers, lengths=mask.sum(dim=1), width=mask.shape[1])
        return batch.rows(), logits[:, -1]

    def compute_prompt_states(self, prompts: Sequence[Ids]) -> list[PromptState]:
        """Return the state of each prompt.

        The tokens with which all prompts begin (system message, instruction of the task) are computed once, unless the
        model has recurrent layers, whose states cannot be continued with padding.
        """
        if self.prompt_layout is None or self.prompt_layout.recurrent_bytes:
            return self.compute_whole_prompts(prompts)
        shared = common_prefix(prompts)
        saved, others = (len(prompts) - 1) * len(shared), sum(map(len, prompts)) - len(prompts) * len(shared)
        if saved >= max(_MIN_SHARED_TOKENS, others // 8):
            return self.cached_prefix.compute_states(self.compute_whole_prompts([shared])[0], prompts)
        return self.compute_whole_prompts(prompts)

    def compute_whole_prompts(self, prompts: Sequence[Ids]) -> list[PromptState]:
        """Return the same as `compute_prompt_states`, without a common beginning."""
        ids, mask = pad_with_mask(prompts, side="left", device=self.device)
        return self.prefill(self.embed(ids), mask)[0]


class SplicedRunner(Runner):
    """Runs prompt, soft tokens and answer as one sequence. Soft tokens may be at any position or absent.

    Args:
        repeats_cache: True = score labels with copies of the prompt's cache; False = with a full pass per label.
        decodes: True = decode token by token here, except with beams; False = let transformers generate.
    """

    def __init__(self, llm: CausalLM, *, repeats_cache: bool = True, decodes: bool = True) -> None:
        self.llm, self.repeats_cache, self.decodes = llm, repeats_cache, decodes

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        spliced = self.llm.splice_prompts(batch, target_ids)
        targets = pad(target_ids, fill=IGNORED, side="left").to(self.llm.device)
        end = spliced.mask.shape[1] - 1
        # The logits at position t predict the token at t + 1.
        columns = torch.arange(end - targets.shape[1], end)
        return self._forward(spliced, columns=columns, use_cache=False)[0], targets

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        if not self.repeats_cache:
            return super().label_scores(batch, label_ids)
        spliced = self.llm.splice_prompts(batch)
        longest, last = max(map(len, label_ids)), torch.tensor([spliced.embeds.shape[1] - 1])
        logits, output = self._forward(spliced, columns=last, use_cache=longest > 1)
        first = log_softmax(logits[:, -1])
        step = max(1, _LABEL_ROWS // len(batch.prompts))
        chunks = [label_ids[start : start + step] for start in range(0, len(label_ids), step)]
        return torch.cat([self._scores_after(output, first, spliced=spliced, label_ids=ids) for ids in chunks], dim=1)

    def start_decoding(self, batch: PromptBatch) -> Decoding | None:
        if not self.decodes:
            return None
        spliced = self.llm.splice_prompts(batch)
        last = torch.tensor([spliced.embeds.shape[1] - 1])
        logits, output = self._forward(spliced, columns=last, use_cache=True)
        return Decoding(logits[:, -1], _Sequence(self.llm, spliced.mask, cache_of(output)).step)

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        decoding = self.start_decoding(batch) if config.num_beams == 1 else None
        if decoding is not None:
            return decode_tokens(self.llm, config, batch, decoding=decoding)
        spliced = self.llm.splice_prompts(batch)
        inputs = {**self.llm.embed.model_inputs(spliced.embeds), "attention_mask": spliced.mask}
        return generate_with_transformers(self.llm, config, batch, **inputs)

    def _forward(self, spliced: Spliced, *, columns: Tensor, use_cache: bool) -> tuple[Tensor, Any]:
        return self.llm.forward(
            spliced.embeds, mask=spliced.mask, positions=spliced.positions, columns=columns, use_cache=use_cache
        )

    def _scores_after(self, output: Any, first: Tensor, *, spliced: Spliced, label_ids: Sequence[Ids]) -> Tensor:
        """Return the log-probability of labels, (B, len(label_ids)), given those of the first tokens, `first`."""
        size, count = first.shape[0], len(label_ids)
        ids, mask = pad_with_mask(label_ids, side="right", device=self.llm.device)  # (count, L)
        total = first[:, ids[:, 0]]
        if ids.shape[1] == 1:
            return total
        repeated = copy.deepcopy(cache_of(output))
        # Recurrent layers cannot repeat rows, but they can reorder them.
        repeated.reorder_cache(torch.arange(size, device=self.llm.device).repeat_interleave(count))
        inputs, columns = ids[:, :-1].repeat(size, 1), torch.arange(ids.shape[1] - 1, device=self.llm.device)
        prompt_mask = spliced.mask.repeat_interleave(count, dim=0)
        logits, _ = self.llm.forward(
            self.llm.embed(inputs),
            mask=torch.cat([prompt_mask, mask[:, :-1].repeat(size, 1)], dim=1),
            positions=prompt_mask.sum(dim=1, keepdim=True) + columns,
            columns=columns,
            use_cache=True,
            **{self.llm.cache_name: repeated},
        )
        targets = ids[:, 1:].repeat(size, 1).unsqueeze(-1)
        per_token = log_softmax(logits).gather(-1, targets).squeeze(-1) * mask[:, 1:].repeat(size, 1)
        return total + per_token.sum(dim=1).view(size, count)


class _Sequence:
    """Rows in the model's own cache; `mask` (B, T) is 1 at real tokens."""

    def __init__(self, llm: CausalLM, mask: Tensor, cache: Any) -> None:
        self.llm, self.mask, self.cache = llm, mask, cache

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, (B,), and return the next logits, (B, V)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        logits, output = self.llm.forward(
            self.llm.embed(tokens)[:, None],
            mask=self.mask,
            positions=self.mask.sum(dim=1, keepdim=True) - 1,
            columns=torch.tensor([0]),
            use_cache=True,
            **{self.llm.cache_name: self.cache},
        )
        self.cache = cache_of(output)
        return logits[:, 0]


def is_switching_rope(module: Any) -> bool:
    """Return True for rotary positions that change in texts beyond some length (longrope, dynamic)."""
    kinds = getattr(module, "rope_type", None)
    names = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    return any(name == "longrope" or "dynamic" in str(name) for name in names)


def _rope_limit(config: Any) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    lengths = [config.max_position_embeddings, *(value.get("original_max_position_embeddings") for value in nested)]
    return int(min(length for length in lengths if length))
