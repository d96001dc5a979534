"""Run soft tokens and answers after cached prompts: the placement `suffix` of decoder-only models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from personaplug.data.records import Prompt
from personaplug.llm.base import Decoding, GenerationConfig, PromptBatch, Runner
from personaplug.llm.chunked_cross_entropy import log_softmax, token_loss, token_losses
from personaplug.llm.copy_head import Copying, CopyInputs
from personaplug.llm.generation import decode_tokens
from personaplug.llm.padding import pad
from personaplug.llm.prefix_attention import CachedPrefix, prefix_attention
from personaplug.llm.prompt_state import PromptState, StateBatch
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt

if TYPE_CHECKING:
    from personaplug.llm.causal_lm import CausalLM

_LABEL_LOGITS = 2**26  # logits of labels per pass; 256 MB in float32
_LABEL_STATES = 2**28  # bytes of recurrent states of labels per pass


class CachedPrefixRunner(Runner):
    """Runs only soft tokens and answers. The prompts' states come from the cache, without gradients.

    R rows share the states of P prompts. The rows of a prompt are adjacent, and R is a multiple of P.

    Args:
        joins: see `CachedPrefix`; True is slower and suits more families.
    """

    def __init__(self, llm: CausalLM, *, joins: bool = False) -> None:
        self.llm, self.joins = llm, joins

    def start(self, states: Sequence[PromptState]) -> CachedPrefix:
        """Return a cache that continues prompts."""
        return CachedPrefix(StateBatch.stack(states, device=self.llm.device), joins=self.joins)

    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        assert batch.soft is not None
        logits = self.answer_logits(self.load_prefix(batch.prompts, share=True), batch.soft, target_ids)
        return logits, pad(target_ids, fill=IGNORED, side="right").to(self.llm.device)

    def target_loss(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        if batch.copying is None:
            return super().target_loss(batch, target_ids)
        head, rows = batch.copying.head, self.copy_inputs(batch, target_ids, layer=batch.copying.head.layer)
        losses = [head.losses(inputs, own).sum() for inputs, own in zip(rows, batch.copying.own, strict=True)]
        return torch.stack(losses), torch.tensor([len(ids) for ids in target_ids], device=self.llm.device)

    @torch.no_grad()
    def copy_inputs(self, batch: PromptBatch, target_ids: Sequence[Ids], *, layer: int) -> list[CopyInputs]:
        """Return what a copy head with states of this layer reads of each row's answer."""
        assert batch.soft is not None
        prefix = self.load_prefix(batch.prompts, share=True)
        logits = self.answer_logits(prefix, batch.soft, target_ids)
        losses = token_losses(logits, pad(target_ids, fill=IGNORED, side="right").to(self.llm.device))
        prompts = self._prompt_states(batch.prompts, prefix, layer=layer)
        states = prefix.live_values(layer)[:, batch.soft.tokens - 1 :]
        return [
            CopyInputs(
                losses[row, : len(ids)], states[row, : len(ids)], torch.tensor(ids, device=losses.device), *prompt
            )
            for row, (ids, prompt) in enumerate(zip(target_ids, prompts, strict=True))
        ]

    def _prompt_states(
        self, prompts: Sequence[Prompt], prefix: CachedPrefix, *, layer: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each row's prompt tokens after the first, (n − 1,), after the states before them, (n − 1, W)."""
        rows, cached = self.llm.prompt_tokenizer.encode_prompts(prompts), prefix.batch.values(layer)
        repeats = len(rows) // len(cached)
        return [
            (cached[index // repeats, -len(row.ids) : -1], torch.tensor(row.ids[1:], device=cached.device))
            for index, row in enumerate(rows)
        ]

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        """Score labels with one pass over the soft tokens and one over all labels of two or more tokens.

        Very large label sets take more passes.
        """
        assert batch.soft is not None
        prefix, rows = self.load_prefix(batch.prompts), len(batch.prompts)
        logits = self.answer_logits(prefix, batch.soft, [(0,)] * rows)
        scores = log_softmax(logits[:, 0])[:, [ids[0] for ids in label_ids]]
        longer = [index for index, ids in enumerate(label_ids) if len(ids) > 1]
        if not longer:
            return scores
        states = prefix.all_states()
        del prefix  # frees the second copy of the prompts' states
        logits_per_label = max(len(label_ids[index]) for index in longer) * self.llm.embed.num_embeddings * rows
        state_bytes = rows * states.layout.recurrent_bytes  # each label takes a copy
        step = max(1, min(_LABEL_LOGITS // logits_per_label, _LABEL_STATES // max(1, state_bytes)))
        for start in range(0, len(longer), step):
            indices = longer[start : start + step]
            scores[:, indices] += self.scores_after_first(states, [label_ids[index] for index in indices])
        return scores

    def start_decoding(self, batch: PromptBatch) -> Decoding:
        assert batch.soft is not None
        prefix = self.load_prefix(batch.prompts, share=True)

        def last_logits(embeds: Tensor) -> Tensor:
            return self.logits(embeds, prefix, columns=torch.tensor([embeds.shape[1] - 1]))[:, 0]

        run: Callable[[Tensor], Tensor] = last_logits
        if batch.copying is not None:
            run = self._copying_logits(batch.copying, batch.prompts, prefix, last_logits=last_logits)
        return Decoding(run(self._cast(batch.soft)), lambda tokens: run(self.llm.embed(tokens)[:, None]))

    def _copying_logits(
        self,
        copying: Copying,
        prompts: Sequence[Prompt],
        prefix: CachedPrefix,
        *,
        last_logits: Callable[[Tensor], Tensor],
    ) -> Callable[[Tensor], Tensor]:
        """Return a function like `last_logits`, whose log-probabilities contain the copied tokens."""
        head, device = copying.head, self.llm.device
        sources = [head.prompt.source(*prompt) for prompt in self._prompt_states(prompts, prefix, layer=head.layer)]
        own = [source.expanded(device) for source in copying.own]

        def mixed(embeds: Tensor) -> Tensor:
            logits = last_logits(embeds)
            return head.mix(logits, prefix.live_values(head.layer)[:, -1], prompts=sources, own=own)

        return mixed

    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        return decode_tokens(self.llm, config, batch, decoding=self.start_decoding(batch))

    def logits(self, embeds: Tensor, prefix: CachedPrefix, *, columns: Tensor) -> Tensor:
        """Run more live tokens (R, L, D), append them to the cache and return the logits at C columns, (R, C, V)."""
        mask, positions = prefix.begin_pass(*embeds.shape[:2])
        with prefix_attention(self.llm.model, prefix) as options:
            return self.llm.forward(embeds, mask=mask, positions=positions, columns=columns, **options)[0]

    def answer_logits(self, prefix: CachedPrefix, soft: SoftPrompt, target_ids: Sequence[Ids]) -> Tensor:
        """Return the logits (R, L, V) of R answers after cached prompts and soft tokens; L is the longest answer."""
        # The last soft token predicts the first answer token. The last answer token predicts nothing, so leave it out.
        ids = pad([row[:-1] for row in target_ids], fill=0, side="right").to(self.llm.device)
        embeds = torch.cat([self._cast(soft), self.llm.embed(ids)], dim=1)
        # Padding comes after all predicted tokens, so it needs no mask.
        return self.logits(embeds, prefix, columns=torch.arange(soft.tokens - 1, embeds.shape[1]))

    def scores_after_first(self, states: StateBatch, label_ids: Sequence[Ids]) -> Tensor:
        """Return the log-probability of the labels' tokens after the first, given P cached prompts, (P, n labels)."""
        rows = list(label_ids) * len(states.lengths)
        ids = pad([row[:-1] for row in rows], fill=0, side="right").to(self.llm.device)
        prefix = CachedPrefix(states, joins=self.joins)
        logits = self.logits(self.llm.embed(ids), prefix, columns=torch.arange(ids.shape[1]))
        targets = pad([row[1:] for row in rows], fill=IGNORED, side="right").to(self.llm.device)
        return -token_loss(logits, targets)[0].view(-1, len(label_ids))

    @torch.no_grad()
    def compute_states(self, shared: PromptState, prompts: Sequence[Ids]) -> list[PromptState]:
        """Return the states of prompts; the model must have no recurrent layers.

        Args:
            shared: the state of the tokens with which all prompts begin; each prompt has further tokens.
        """
        suffixes = [ids[shared.tokens :] for ids in prompts]
        prefix = self.start([shared])
        # Padding comes after all tokens of a row, so it needs no mask.
        embeds = self.llm.embed(pad(suffixes, fill=0, side="right").to(self.llm.device))
        self.logits(embeds, prefix, columns=torch.tensor([0]))  # logits of one column, because a model returns some
        live = prefix.live_blocks()
        return [
            shared.followed_by([block[:, row, :, : len(ids)] for block in live], tokens=len(ids))
            for row, ids in enumerate(suffixes)
        ]

    def load_prefix(self, prompts: Sequence[Prompt], *, share: bool = False) -> CachedPrefix:
        """Return the states of prompts. With `share`, equal neighbors share states if all repeat equally often."""
        rows = [row.ids for row in self.llm.prompt_tokenizer.encode_prompts(prompts)]
        groups = [(ids, len(list(group))) for ids, group in itertools.groupby(rows)]
        if share and len({size for _, size in groups}) == 1:
            rows = [ids for ids, _ in groups]
        return self.start(self.llm.prompt_states.get(rows))

    def _cast(self, soft: SoftPrompt) -> Tensor:
        return self.llm.embed.complete(soft.vectors.to(self.llm.device, self.llm.model.dtype))
