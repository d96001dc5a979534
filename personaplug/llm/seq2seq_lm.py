"""Frozen models whose encoder reads the prompt and whose decoder writes the answer (T5, the paper's FlanT5).

With the placement `suffix` the encoder reads the plain prompt, which is a constant, and the soft tokens open the
decoder's side: [I; P; start; y]. Answers attend to them there as they do in a decoder-only model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from personaplug.llm.base import Generation, GenerationConfig, pad
from personaplug.llm.chunked_cross_entropy import log_softmax, token_loss
from personaplug.llm.hf import HFLanguageModel
from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.llm.prompt_cache import Layout, padded_states, real_columns
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt, is_behind


class Seq2SeqLM(HFLanguageModel):
    """Models whose encoder reads the prompt and whose decoder writes the answer."""

    encoder_decoder = True

    def loss(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
        labels: Sequence[str] = (),
        phrases: Sequence[UserNgramCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return −log p of each target and its number of tokens, both (B,); see `LanguageModel.loss`."""
        answers = self.prompt_tokenizer.targets(targets, labels=labels)
        wanted = pad(answers, fill=IGNORED, side="right").to(self.device)
        if is_behind(soft):
            states, mask = self._encoded([row.ids for row in self.prompt_tokenizer.prompts(prompts)])
            logits = self._decoded(states, mask, soft=soft, answers=answers)
        else:
            batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side=self.padding_side)
            logits = self.model(inputs_embeds=batch.embeds, attention_mask=batch.mask, labels=wanted).logits
        return token_loss(self._with_bias(logits, wanted, soft=soft, labels=labels), wanted, phrases)

    def _scores(
        self, prompts: Sequence[str], labels: Sequence[str], *, soft: SoftPrompt | None, soft_at: Sequence[int] | None
    ) -> Tensor:
        """Log-probabilities of labels; the encoder reads the prompt once (or not at all, if kept)."""
        behind = is_behind(soft)
        if behind:
            states, mask = self._encoded([row.ids for row in self.prompt_tokenizer.prompts(prompts)])
        else:
            batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side=self.padding_side)
            states = self.model.get_encoder()(inputs_embeds=batch.embeds, attention_mask=batch.mask).last_hidden_state
            mask = batch.mask
        answers, soft = self.prompt_tokenizer.answers(labels), soft if behind else None
        if all(len(answer) == 1 for answer in answers):
            logits = self._decoded(states, mask, soft=soft, answers=answers[:1] * len(prompts))
            return log_softmax(logits[:, 0])[:, [answer[0] for answer in answers]]
        columns = []
        for answer in answers:
            several = [answer] * len(prompts)
            wanted = torch.tensor(several, device=self.device)
            columns.append(-token_loss(self._decoded(states, mask, soft=soft, answers=several), wanted)[0])
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        soft: SoftPrompt | None,
        config: GenerationConfig,
        soft_at: Sequence[int] | None = None,
        phrases: Sequence[UserNgramCache] | None = None,
    ) -> list[Generation]:
        """Answer each prompt with new text only; see `LanguageModel.generate`."""
        if soft is None or not is_behind(soft):
            return super().generate(prompts, soft=soft, config=config, soft_at=soft_at, phrases=phrases)
        states, mask = self._encoded([row.ids for row in self.prompt_tokenizer.prompts(prompts)])
        # The decoder has read the soft tokens already: its mask counts them, its ids begin behind them.
        found = self._generated(
            config,
            phrases,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_attention_mask=mask.new_ones(len(prompts), soft.vectors.shape[1] + 1),
            past_key_values=self._opened(states, mask, soft=soft, beams=config.num_beams),
        )
        return [self._generation(row, end=self.end_ids()) for row in found]

    def _opened(self, states: Tensor, mask: Tensor, *, soft: SoftPrompt, beams: int) -> EncoderDecoderCache:
        """The decoder's cache once it has read the soft tokens, as many times as there are beams."""
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

    def _decoded(
        self, states: Tensor, mask: Tensor, *, soft: SoftPrompt | None, answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits of some answers, (B, L, V), L = the longest.

        Args:
            states: (B, T, D) what the encoder made of the prompts.
            mask: (B, T).
            soft: what the decoder reads before its start token; None = nothing.
        """
        # An answer's last token is never read.
        read = pad([[self._start(), *answer[:-1]] for answer in answers], fill=self._start(), side="right")
        ids, ahead = read.to(self.device), 0
        given = {"decoder_input_ids": ids}
        if soft is not None:
            embeds = self.model.get_decoder().get_input_embeddings()(ids)
            given = {"decoder_inputs_embeds": torch.cat([soft.vectors.to(embeds), embeds], dim=1)}
            ahead = soft.vectors.shape[1]
        outputs = BaseModelOutput(last_hidden_state=states)
        logits: Tensor = self.model(encoder_outputs=outputs, attention_mask=mask, use_cache=False, **given).logits
        return logits[:, ahead:]

    def _encoded(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """What the encoder makes of plain prompts, kept or read now: states (B, T, D) and mask (B, T)."""
        states = self._states(rows)
        padded = padded_states(states, device=self.device)[0, :, 0]
        lengths = torch.tensor([one.shape[2] for one in states], device=self.device)
        return padded, real_columns(lengths, padded.shape[1]).long()

    @torch.no_grad()
    def _read(self, rows: Sequence[Ids]) -> list[Tensor]:
        """The encoder's states of some prompts, each (1, 1, n, D)."""
        if not rows:
            return []
        ids = pad(rows, fill=0, side="right").to(self.device)
        mask = pad([[1] * len(row) for row in rows], fill=0, side="right").to(self.device)
        states = self.model.get_encoder()(inputs_embeds=self.embed(ids), attention_mask=mask).last_hidden_state
        return [states[place, : len(row)][None, None] for place, row in enumerate(rows)]

    def _layout(self) -> Layout:
        return Layout(parts=1, heads=1, width=self._width(), dtype=self.model.dtype)

    def _start(self) -> int:
        return int(self.model.config.decoder_start_token_id)
