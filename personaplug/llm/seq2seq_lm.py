"""Frozen encoder-decoder models: the encoder reads the prompt, the decoder writes the answer (T5, the paper's FlanT5).

With the placement `suffix` the encoder reads the plain prompt, which is constant, and the soft tokens come first in the
decoder: [I; P; start; y].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch, Runner
from personaplug.llm.chunked_cross_entropy import log_softmax, token_loss
from personaplug.llm.generation import generate_with_transformers
from personaplug.llm.padding import left_padding_mask, pad, pad_states, pad_with_mask
from personaplug.llm.prompt_cache import Layout
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt


class Seq2SeqLM(LanguageModel, Runner):
    """A frozen encoder-decoder model, and its own runner for both placements."""

    is_encoder_decoder = True

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        super().__init__(model, tokenizer, **settings)
        self.start_id = int(model.config.decoder_start_token_id)

    @property
    def prompt_layout(self) -> Layout:
        return Layout(parts=1, heads=1, width=self.identity.width, dtype=self.model.dtype)

    def choose_runner(self, batch: PromptBatch, *, num_beams: int = 1) -> Runner:
        """Return the model itself, because it runs both placements."""
        return self

    @torch.no_grad()
    def compute_prompt_states(self, prompts: Sequence[Ids]) -> list[Tensor]:
        """Return the encoder's output for each prompt, (1, 1, n, D)."""
        ids, mask = pad_with_mask(prompts, side="right", device=self.device)
        states = self._encode(self.embed(ids), mask)
        return [states[index, : len(row)][None, None] for index, row in enumerate(prompts)]

    def _encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return states

    def _decode_logits(
        self, states: Tensor, mask: Tensor, target_ids: Sequence[Ids], *, soft: SoftPrompt | None
    ) -> Tensor:
        """Return the logits of targets (B, L, V) behind encoder output (B, T, D), `soft`, and the start token."""
        # The last token of a target predicts nothing, so it is no input.
        rows = [[self.start_id, *ids[:-1]] for ids in target_ids]
        ids = pad(rows, fill=self.start_id, side="right").to(self.device)
        inputs, soft_tokens = {"decoder_input_ids": ids}, 0
        if soft is not None:
            embeds = self.model.get_decoder().get_input_embeddings()(ids)
            inputs = {"decoder_inputs_embeds": torch.cat([soft.vectors.to(embeds), embeds], dim=1)}
            soft_tokens = soft.tokens
        encoded = BaseModelOutput(last_hidden_state=states)
        logits: Tensor = self.model(encoder_outputs=encoded, attention_mask=mask, use_cache=False, **inputs).logits
        return logits[:, soft_tokens:]

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        states, mask, soft = self._encode_batch(batch)
        logits = self._decode_logits(states, mask, target_ids, soft=soft)
        return logits, pad(target_ids, fill=IGNORED, side="right").to(self.device)

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        states, mask, soft = self._encode_batch(batch)
        size = len(batch.prompts)
        if all(len(ids) == 1 for ids in label_ids):
            logits = self._decode_logits(states, mask, [label_ids[0]] * size, soft=soft)
            return log_softmax(logits[:, 0])[:, [ids[0] for ids in label_ids]]
        columns = []
        for ids in label_ids:
            logits = self._decode_logits(states, mask, [ids] * size, soft=soft)
            columns.append(-token_loss(logits, torch.tensor([ids] * size, device=self.device))[0])
        return torch.stack(columns, dim=1)

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        states, mask, soft = self._encode_batch(batch)
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}
        if soft is not None:
            # The cache holds the soft tokens already: the mask counts them, the ids begin after them.
            inputs["decoder_attention_mask"] = mask.new_ones(len(soft), soft.tokens + 1)
            inputs["past_key_values"] = self._soft_cache(states, mask, soft, beams=config.num_beams)
        return generate_with_transformers(self, config, batch.ngrams, **inputs)

    def _encode_batch(self, batch: PromptBatch) -> tuple[Tensor, Tensor, SoftPrompt | None]:
        """Return the encoder's output (B, T, D), its mask (B, T) and the soft tokens for the decoder."""
        if not batch.has_soft("suffix"):
            spliced = self.splice_prompts(batch)
            return self._encode(spliced.embeds, spliced.mask), spliced.mask, None
        prompts = [prompt.ids for prompt in self.prompt_tokenizer.encode_prompts(batch.prompts)]
        states, lengths = pad_states(self.prompt_states.get(prompts), device=self.device)
        return states[0, :, 0], left_padding_mask(lengths, states.shape[3]).long(), batch.soft

    def _soft_cache(self, states: Tensor, mask: Tensor, soft: SoftPrompt, *, beams: int) -> EncoderDecoderCache:
        """Return the decoder's cache after the soft tokens, repeated for each beam."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model.get_decoder()(
            inputs_embeds=soft.vectors.to(self.device, self.model.dtype),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        return cache
