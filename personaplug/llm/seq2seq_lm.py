"""Frozen encoder-decoder models: the encoder reads the prompt, the decoder writes the answer (T5, the paper's FlanT5).

With the placement `suffix` the encoder reads the plain prompt, which is constant, and the soft tokens come first in the
decoder: [I; P; start; y]. The answer attends to them there as in a decoder-only model.
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


class Seq2SeqLM(LanguageModel):
    """A frozen encoder-decoder model."""

    is_encoder_decoder = True

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        super().__init__(model, tokenizer, **settings)
        self.start_id = int(model.config.decoder_start_token_id)
        self._encoder_runner, self._decoder_runner = EncoderRunner(self), DecoderRunner(self)

    @property
    def prompt_layout(self) -> Layout:
        """Shape of the encoder's output."""
        return Layout(parts=1, heads=1, width=self.identity.width, dtype=self.model.dtype)

    def choose_runner(self, batch: PromptBatch, *, num_beams: int = 1) -> Runner:
        """Return the runner that puts soft tokens into the encoder (`prefix`) or the decoder (`suffix`)."""
        return self._decoder_runner if batch.has_soft("suffix") else self._encoder_runner

    @torch.no_grad()
    def compute_prompt_states(self, prompts: Sequence[Ids]) -> list[Tensor]:
        """Return the encoder's output for each prompt, (1, 1, n, D)."""
        ids, mask = pad_with_mask(prompts, side="right", device=self.device)
        states = self.encode(self.embed(ids), mask)
        return [states[index, : len(row)][None, None] for index, row in enumerate(prompts)]

    def encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the encoder's output (B, T, D)."""
        states: Tensor = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return states

    def decode_logits(
        self, states: Tensor, mask: Tensor, target_ids: Sequence[Ids], *, soft: SoftPrompt | None
    ) -> Tensor:
        """Return the logits of targets, (B, L, V), L = the longest.

        Args:
            states, mask: the encoder's output (B, T, D) and its mask (B, T).
            soft: comes before the start token in the decoder.
        """
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


class EncoderRunner(Runner):
    """Soft tokens of the placement `prefix`, or none: they are part of what the encoder reads."""

    def __init__(self, llm: Seq2SeqLM) -> None:
        self.llm = llm

    def encode(self, batch: PromptBatch, *, side: str) -> tuple[Tensor, Tensor]:
        """Return the encoder's output (B, T, D) and its mask (B, T)."""
        spliced = self.llm.splice_prompts(batch, side=side)
        return self.llm.encode(spliced.embeds, spliced.mask), spliced.mask

    def decoder_soft(self, batch: PromptBatch) -> SoftPrompt | None:
        """Return the soft tokens that the decoder reads."""
        return None

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        states, mask = self.encode(batch, side=self.llm.padding_side)
        logits = self.llm.decode_logits(states, mask, target_ids, soft=self.decoder_soft(batch))
        return logits, pad(target_ids, fill=IGNORED, side="right").to(self.llm.device)

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        states, mask = self.encode(batch, side=self.llm.padding_side)
        soft, size = self.decoder_soft(batch), len(batch.prompts)
        if all(len(ids) == 1 for ids in label_ids):
            logits = self.llm.decode_logits(states, mask, [label_ids[0]] * size, soft=soft)
            return log_softmax(logits[:, 0])[:, [ids[0] for ids in label_ids]]
        columns = []
        for ids in label_ids:
            logits = self.llm.decode_logits(states, mask, [ids] * size, soft=soft)
            columns.append(-token_loss(logits, torch.tensor([ids] * size, device=self.llm.device))[0])
        return torch.stack(columns, dim=1)

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        states, mask = self.encode(batch, side="left")
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}
        soft = self.decoder_soft(batch)
        if soft is not None:
            # The cache holds the soft tokens already: the mask counts them, the ids begin after them.
            inputs["decoder_attention_mask"] = mask.new_ones(len(soft), soft.tokens + 1)
            inputs["past_key_values"] = self._soft_cache(states, mask, soft, beams=config.num_beams)
        return generate_with_transformers(self.llm, config, batch.ngrams, **inputs)

    def _soft_cache(self, states: Tensor, mask: Tensor, soft: SoftPrompt, *, beams: int) -> EncoderDecoderCache:
        """Return the decoder's cache after the soft tokens, repeated for each beam."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.llm.model.get_decoder()(
            inputs_embeds=soft.vectors.to(self.llm.device, self.llm.model.dtype),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        return cache


class DecoderRunner(EncoderRunner):
    """Soft tokens of the placement `suffix`: the decoder reads them, and the encoder's output can be cached."""

    def encode(self, batch: PromptBatch, *, side: str) -> tuple[Tensor, Tensor]:
        prompts = self.llm.prompt_tokenizer.encode_prompts(batch.prompts)
        states, lengths = pad_states(
            self.llm.prompt_states.get([prompt.ids for prompt in prompts]), device=self.llm.device
        )
        return states[0, :, 0], left_padding_mask(lengths, states.shape[3]).long()

    def decoder_soft(self, batch: PromptBatch) -> SoftPrompt | None:
        return batch.soft
