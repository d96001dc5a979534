"""Frozen encoder-decoder models: the encoder reads the prompt, the decoder writes the answer (T5, the paper's FlanT5).

With the placement `suffix`, the encoder reads the plain prompt, which is constant. The soft tokens come first in the
decoder: [I; P; start; y]. The decoder inputs are built here, because families shift label tokens in different ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from personaplug.errors import UnsupportedModel
from personaplug.llm.base import Decoding, GenerationConfig, LanguageModel, PromptBatch, Runner
from personaplug.llm.chunked_cross_entropy import log_softmax, token_loss
from personaplug.llm.generation import decode_tokens, generate_with_transformers
from personaplug.llm.model_cache import cache_argument
from personaplug.llm.model_check import check_model
from personaplug.llm.padding import left_padding_mask, pad, pad_with_mask
from personaplug.llm.prompt_state import Layout, PromptState, StateBatch
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.row_by_row import RowByRowRunner
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt
from personaplug.llm.token_embedding import TokenEmbedding, find_factor


class Seq2SeqLM(LanguageModel, Runner):
    """A frozen encoder-decoder model, and its own runner for both placements."""

    is_encoder_decoder = True
    prefix_ways: Mapping[str, Runner] = {}

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        self.start_ids = find_start_ids(model, name=settings["name"])
        self.cache_name = cache_argument(model)
        with torch.no_grad():
            ids = torch.ones(1, 1, dtype=torch.int64, device=model.device)
            self._encoder_output = type(model.get_encoder()(input_ids=ids))  # each family has its own class
        super().__init__(model, tokenizer, **settings)
        decoder = model.get_decoder()
        self.decoder_embed = TokenEmbedding(decoder.get_input_embeddings())
        self.decoder_embed.factor = find_factor(
            decoder,
            self.decoder_embed.layer,
            read_ids=lambda ids: self._read_decoder(decoder_input_ids=ids),
            read_embeds=lambda embeds: self._read_decoder(decoder_inputs_embeds=embeds),
        )
        self.ways = {
            "batched": self,
            "batched by transformers": _ByTransformers(self),
            "row by row": RowByRowRunner(_ByTransformers(self)),
        }
        check_model(self)

    def choose_runner(self, batch: PromptBatch, *, new_tokens: int, num_beams: int = 1) -> Runner:
        """Return the runner for both placements."""
        return self.whole

    def model_logits(self, prompt: Ids, target: Ids, *, before: Ids = ()) -> Tensor:
        inputs = {"input_ids": prompt, "decoder_input_ids": [*before, *self.start_ids, *target[:-1]]}
        tensors = {name: torch.tensor([ids], device=self.device) for name, ids in inputs.items()}
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        logits: Tensor = self.model(**tensors).logits
        return logits[0, -len(target) :]

    def spell(self, ids: Ids) -> Tensor:
        embeds = self.decoder_embed(torch.tensor([ids], device=self.device))
        return embeds * (self.embed.factor / self.decoder_embed.factor)

    def read(self, **inputs: Tensor) -> Tensor:
        states: Tensor = self.model.get_encoder()(**inputs).last_hidden_state
        return states

    def _read_decoder(self, **inputs: Tensor) -> Tensor:
        states = self.embed.weight.new_ones(1, 1, self.identity.width)
        encoded = self._encoder_output(last_hidden_state=states)
        logits: Tensor = self.model(encoder_outputs=encoded, **inputs).logits
        return logits

    def soft_inputs(self, soft: SoftPrompt) -> Tensor:
        """Rescale `suffix` soft tokens from the encoder's embedding scale to the decoder's."""
        vectors = soft.vectors.to(self.device, self.model.dtype)
        factor = self.decoder_embed.factor / self.embed.factor
        return vectors if factor == 1 else vectors * factor

    @torch.no_grad()
    def compute_prompt_states(self, prompts: Sequence[Ids]) -> list[PromptState]:
        """Return the encoder's output for each prompt, one block (1, 1, n, D)."""
        ids, mask = pad_with_mask(prompts, side="right", device=self.device)
        states = self._encode(self.embed(ids), mask)
        layout = Layout.of_encoder(states.shape[2], states.dtype)
        return [
            PromptState(layout, (states[index, : len(row)][None, None],), len(row)) for index, row in enumerate(prompts)
        ]

    def _encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return states

    def _decode_logits(
        self, states: Tensor, mask: Tensor, target_ids: Sequence[Ids], *, soft: SoftPrompt | None
    ) -> Tensor:
        """Return the logits (B, L, V) of targets, given the encoder output (B, T, D) and the decoder's soft tokens."""
        # The last token of a target predicts nothing, so leave it out.
        rows = [[*self.start_ids, *ids[:-1]] for ids in target_ids]
        ids = pad(rows, fill=self.start_ids[0], side="right").to(self.device)
        inputs = {"decoder_input_ids": ids}
        if soft is not None:
            embeds = torch.cat([self.soft_inputs(soft), self.decoder_embed(ids)], dim=1)
            inputs = {"decoder_inputs_embeds": embeds}
        encoded = self._encoder_output(last_hidden_state=states)
        logits: Tensor = self.model(encoder_outputs=encoded, attention_mask=mask, use_cache=False, **inputs).logits
        return logits[:, -max(map(len, target_ids)) :]

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

    def start_decoding(self, batch: PromptBatch) -> Decoding:
        states, mask, soft = self._encode_batch(batch)
        encoded = self._encoder_output(last_hidden_state=states)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def last_logits(**inputs: Tensor) -> Tensor:
            options = {"use_cache": True, self.cache_name: cache}
            logits: Tensor = self.model(encoder_outputs=encoded, attention_mask=mask, **options, **inputs).logits
            return logits[:, -1]

        start = torch.tensor([self.start_ids], device=self.device).expand(len(states), -1)
        if soft is None:
            first = last_logits(decoder_input_ids=start)
        else:
            embeds = torch.cat([self.soft_inputs(soft), self.decoder_embed(start)], dim=1)
            first = last_logits(decoder_inputs_embeds=embeds)
        return Decoding(first, step=lambda tokens: last_logits(decoder_input_ids=tokens[:, None]))

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        if config.num_beams > 1:
            return self.generate_by_transformers(batch, config)
        return decode_tokens(self, config, batch, decoding=self.start_decoding(batch))

    def generate_by_transformers(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        """Return the token ids of B responses, with or without beams."""
        states, mask, soft = self._encode_batch(batch)
        inputs = {"encoder_outputs": self._encoder_output(last_hidden_state=states), "attention_mask": mask}
        start_ids = self.start_ids
        if soft is not None:
            # The cache holds the soft tokens and all start tokens except the last, so the mask counts them.
            inputs["decoder_attention_mask"] = mask.new_ones(len(soft), soft.tokens + len(start_ids))
            inputs[self.cache_name] = self._soft_cache(states, mask, soft, beams=config.num_beams)
            start_ids = start_ids[-1:]
        inputs["decoder_input_ids"] = torch.tensor([start_ids], device=self.device).expand(len(states), -1)
        return generate_with_transformers(self, config, batch, **inputs)

    def _encode_batch(self, batch: PromptBatch) -> tuple[Tensor, Tensor, SoftPrompt | None]:
        """Return the encoder's output (B, T, D), its mask (B, T) and the soft tokens for the decoder."""
        if not batch.has_soft("suffix"):
            spliced = self.splice_prompts(batch)
            return self._encode(spliced.embeds, spliced.mask), spliced.mask, None
        prompts = [prompt.ids for prompt in self.prompt_tokenizer.encode_prompts(batch.prompts)]
        states = StateBatch.stack(self.prompt_states.get(prompts), device=self.device)
        mask = left_padding_mask(states.lengths, states.width).long()
        return states.blocks[0][0, :, 0], mask, batch.soft

    def _soft_cache(self, states: Tensor, mask: Tensor, soft: SoftPrompt, *, beams: int) -> EncoderDecoderCache:
        """Return the decoder's cache after the soft tokens, repeated for each beam."""
        cache, decoder = EncoderDecoderCache(DynamicCache(), DynamicCache()), self.model.get_decoder()
        before = torch.tensor([self.start_ids[:-1]], dtype=torch.int64, device=self.device).expand(len(soft), -1)
        decoder(
            inputs_embeds=torch.cat([self.soft_inputs(soft), self.decoder_embed(before)], dim=1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=True,
            **{cache_argument(decoder): cache},
        )
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        return cache


class _ByTransformers(Runner):
    """Runs a model as its own runner, but generates with transformers."""

    def __init__(self, llm: Seq2SeqLM) -> None:
        self.llm = llm

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        return self.llm.target_logits(batch, target_ids)

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        return self.llm.label_scores(batch, label_ids)

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        return self.llm.generate_by_transformers(batch, config)


def find_start_ids(model: Any, *, name: str) -> tuple[int, ...]:
    """Return the tokens that a decoder begins with: the start token, and the forced BOS token if there is one."""
    configs = (model.generation_config, model.config)

    def first(key: str) -> Any:
        return next((value for config in configs if (value := getattr(config, key, None)) is not None), None)

    start, forced = first("decoder_start_token_id"), first("forced_bos_token_id")
    start = first("bos_token_id") if start is None else start
    if not isinstance(start, int):
        raise UnsupportedModel(name, "its config has neither decoder_start_token_id nor bos_token_id")
    return (start,) if forced is None else (start, int(forced))
