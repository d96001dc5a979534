"""Continuous batching: requests share each forward pass, and join or leave between two tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copy_head import CopyHead, CopySource
from personaplug.llm.generation import sample_tokens
from personaplug.llm.json_grammar import GrammarLimit, JsonGrammar
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.padding import group_by_length, pad_with_mask
from personaplug.llm.prefix_attention import CachedPrefix
from personaplug.llm.prompt_state import PromptState, StateBatch
from personaplug.llm.prompt_tokenizer import Ids, TokenizedPrompt
from personaplug.llm.soft_prompt import SoftPrompt, splice
from personaplug.llm.token_logprobs import NextLogprobs, TokenLogprob, next_logprobs
from personaplug.llm.token_shift import TokenShift, shift_logits


@dataclass(eq=False, repr=False)
class SlotCopying:
    """A copy head, the past answers of the slot's user and, after the prompt has run, the tokens of the prompt."""

    head: CopyHead
    own: CopySource
    prompt: CopySource | None = None

    def start(self, slot: Slot, state: PromptState, logits: Tensor) -> Tensor:
        """Keep the tokens of the prompt, and return the log-probabilities of the first token, (V,).

        Args:
            state: of the prompt and the soft tokens.
            logits: (V,) of the first token.
        """
        values, ids = state.values(self.head.layer), slot.prompt.ids
        self.own = self.own.expanded(values.device)
        self.prompt = self.head.prompt.source(values[: len(ids) - 1], torch.tensor(ids[1:], device=values.device))
        return self.head.mix(logits[None], values[-1:], prompts=[self.prompt], own=[self.own])[0]


@dataclass(eq=False, repr=False)
class Slot:
    """One response in progress; only the thread that runs the batch changes it."""

    prompt: TokenizedPrompt
    soft: SoftPrompt | None  # one row
    config: GenerationConfig  # without beams
    choices: Sequence[Ids] = ()  # allowed responses, () = any; no choice is a prefix of another
    copying: SlotCopying | None = None  # mixed with the model if there are no choices; needs `suffix` soft tokens
    needs_scores: bool = False  # True = compute `scores` in any case
    shift: TokenShift | None = None  # changes the logits of free text
    grammar: JsonGrammar | None = None  # limits free text
    top_logprobs: int | None = None  # number of likeliest tokens in `logprobs` of free text; None = no `logprobs`
    scores: list[float] = field(default_factory=list)  # log-probability of each choice, label bias included
    ids: list[int] = field(default_factory=list)  # the tokens so far, without an end-of-text token
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of each token, before any change of the logits
    ended: str | None = None  # None = active; stop, length (at max_new_tokens), grammar (its limit) or failed

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self.label_bias = None if self.soft is None else self.soft.label_bias  # (1, C), of each choice

    @property
    def is_likeliest_choice(self) -> bool:
        """True if the response is the likeliest choice."""
        return bool(self.choices) and not self.config.do_sample

    @property
    def must_score(self) -> bool:
        """True if `scores` are needed. Token-by-token decoding could miss the likeliest choice."""
        return self.needs_scores or (self.is_likeliest_choice and any(len(choice) > 1 for choice in self.choices))

    def start(self, logits: Tensor, *, end_ids: Sequence[int]) -> None:
        """Choose the likeliest choice by `scores` if they were needed for it, else the first token from (V,) logits."""
        if self.is_likeliest_choice and self.scores:
            self.choose(max(range(len(self.scores)), key=self.scores.__getitem__))
        else:
            append_next([self], logits[None], end_ids=end_ids)

    def choose(self, index: int) -> None:
        """End the slot with a choice, or as failed if a score is NaN or the choice's score is −inf."""
        is_finite = all(score == score for score in self.scores) and self.scores[index] > -torch.inf
        self.ids, self.ended = (list(self.choices[index]), "stop") if is_finite else ([], "failed")

    def append_next(self, logits: Tensor, *, end_ids: Sequence[int], logprobs: NextLogprobs | None = None) -> None:
        """Choose the next token from (V,) logits on the CPU; an error ends only this slot."""
        try:
            self._append_next(logits, end_ids=end_ids, logprobs=logprobs)
        except GrammarLimit:
            self.ended = "grammar"
        except (RuntimeError, ValueError):
            self.ended = "failed"

    def _append_next(self, logits: Tensor, *, end_ids: Sequence[int], logprobs: NextLogprobs | None) -> None:
        if self.choices:
            logits = self._mask_choices(logits)
        elif self.grammar is not None:
            logits = self.grammar.masked(logits)
        if not bool(torch.isfinite(logits.max())):
            raise ValueError("the largest logit is not finite")
        token = int(sample_tokens(logits[None], self.config, generator=self._generator)[0])
        is_end = token in end_ids and not self.choices
        if not is_end:
            self._append(token, logprobs)
        if is_end or tuple(self.ids) in self.choices or (self.grammar is not None and self.grammar.is_complete):
            self.ended = "stop"
        elif len(self.ids) >= self.config.max_new_tokens:
            self.ended = "length"

    def _append(self, token: int, logprobs: NextLogprobs | None) -> None:
        if self.grammar is not None:
            self.grammar.accept(token)
        if self.shift is not None:
            self.shift.count(token)
        if logprobs is not None:
            self.logprobs.append(logprobs.of(token))
        self.ids.append(token)

    def _mask_choices(self, logits: Tensor) -> Tensor:
        """Set logits to −inf, except at tokens that continue a choice, and add the label bias."""
        count = len(self.ids)
        allowed = sorted({choice[count] for choice in self.choices if list(choice[:count]) == self.ids})
        masked = torch.full_like(logits, -torch.inf)
        masked[allowed] = logits[allowed]
        if self.label_bias is not None:
            tokens, bias = LabelBias(self.choices, self.label_bias).next_token_bias(self.ids)
            masked[tokens] += bias[0].to(masked)
        return masked


def append_next(slots: Sequence[Slot], logits: Tensor, *, end_ids: Sequence[int]) -> None:
    """Choose the next token of each active slot from (R, V) logits, which this changes."""
    active = [slot if slot.ended is None else None for slot in slots]
    logprobs = next_logprobs(logits, [None if slot is None else slot.top_logprobs for slot in active])
    shift_logits(logits, [None if slot is None else slot.shift for slot in active])
    for slot, own_logits, own_logprobs in zip(active, logits.cpu(), logprobs, strict=True):
        if slot is not None:
            slot.append_next(own_logits, end_ids=end_ids, logprobs=own_logprobs)


class ContinuousBatch:
    """Slots that decode together. Not thread-safe; the model must support the prompt cache."""

    def __init__(self, llm: CausalLM) -> None:
        self.llm = llm
        self._slots: list[Slot] = []
        self._prefix: CachedPrefix | None = None  # states of the slots' tokens, except the last one

    def __len__(self) -> int:
        return sum(slot.ended is None for slot in self._slots)

    @torch.no_grad()
    def add(self, slots: Sequence[Slot]) -> None:
        """Run the prompts of slots and choose their first tokens; an error leaves the batch unchanged."""
        active, states = self._active()
        for group in _group_similar(slots):
            group_states, logits = self._prefill(group)
            for slot, state, own_logits in zip(group, group_states, logits.float(), strict=True):
                if slot.must_score:
                    slot.scores = self._scores(slot, state, own_logits)
                mixed = own_logits if slot.copying is None else slot.copying.start(slot, state, own_logits)
                slot.start(mixed, end_ids=self.llm.end_ids)
                if slot.ended is None:
                    active.append(slot)
                    states.append(state)
        self._set(active, states)

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of each active slot."""
        # Ended slots stay in the batch while they are the minority: removing them copies all states.
        if 2 * len(self) < len(self._slots):
            self._set(*self._active())
        if self._prefix is None:
            return
        # An ended slot repeats its last token; nobody reads the result.
        last = torch.tensor([slot.ids[-1] if slot.ids else 0 for slot in self._slots], device=self.llm.device)
        embeds = self.llm.embed(last)[:, None]
        logits = self.llm.cached_prefix.logits(embeds, self._prefix, columns=torch.tensor([0]))
        logits = logits[:, 0].float()
        self._mix_copied(logits)
        append_next(self._slots, logits, end_ids=self.llm.end_ids)

    def _mix_copied(self, logits: Tensor) -> None:
        """Replace the logits (R, V) of active slots that have a copy head, in place."""
        assert self._prefix is not None
        rows_by_head: dict[CopyHead, list[int]] = {}
        for row, slot in enumerate(self._slots):
            if slot.ended is None and slot.copying is not None:
                rows_by_head.setdefault(slot.copying.head, []).append(row)
        for head, rows in rows_by_head.items():
            copying = [one for row in rows if (one := self._slots[row].copying) is not None]
            logits[rows] = head.mix(
                logits[rows],
                self._prefix.live_values(head.layer)[rows, -1],
                prompts=[one.prompt for one in copying if one.prompt is not None],
                own=[one.own for one in copying],
            )

    def _scores(self, slot: Slot, state: PromptState, first: Tensor) -> list[float]:
        """Return the log-probability of each choice with its bias, given a slot's state and last logits (V,)."""
        scores = torch.log_softmax(first, dim=-1)[[choice[0] for choice in slot.choices]]
        if any(len(choice) > 1 for choice in slot.choices):
            states = StateBatch.stack([state], device=self.llm.device)
            scores = scores + self.llm.cached_prefix.scores_after_first(states, slot.choices)[0]
        if slot.label_bias is not None:
            scores = scores + slot.label_bias[0].to(scores)
        return scores.float().tolist()

    def _active(self) -> tuple[list[Slot], list[PromptState]]:
        """Return the active slots and the state of each."""
        if self._prefix is None:
            return [], []
        states = self._prefix.all_states().rows()
        active = [index for index, slot in enumerate(self._slots) if slot.ended is None]
        return [self._slots[index] for index in active], [states[index] for index in active]

    def _set(self, slots: list[Slot], states: list[PromptState]) -> None:
        self._slots = slots
        self._prefix = self.llm.cached_prefix.start(states) if states else None

    def _prefill(self, slots: Sequence[Slot]) -> tuple[list[PromptState], Tensor]:
        """Run prompts whose soft tokens have one shape; return their states and last logits."""
        places: dict[tuple[int, int], int] = {}  # several answers to one request share the objects and the pass
        rows = [places.setdefault((id(slot.prompt), id(slot.soft)), len(places)) for slot in slots]
        states, logits = self._prefill_distinct([slots[rows.index(row)] for row in places.values()])
        return [states[row] for row in rows], logits[rows]

    def _prefill_distinct(self, slots: Sequence[Slot]) -> tuple[list[PromptState], Tensor]:
        llm = self.llm
        ids, mask = pad_with_mask([slot.prompt.ids for slot in slots], side="left", device=llm.device)
        at = torch.tensor([slot.prompt.soft_position for slot in slots])
        soft_prompts = [slot.soft for slot in slots if slot.soft is not None]
        soft = SoftPrompt.cat(soft_prompts) if soft_prompts else None
        if soft is not None and soft.placement == "suffix":
            at = mask.sum(dim=1)
        spliced = splice(llm.embed(ids), mask, soft=llm.complete(soft), at=at)
        return llm.prefill(spliced.embeds, spliced.mask)


def _group_similar(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """Group slots by the shape of their soft tokens and by the length of their prompts."""
    for _, group in groupby(sorted(slots, key=_soft_shape), key=_soft_shape):
        yield from group_by_length(list(group), lambda slot: len(slot.prompt.ids))


def _soft_shape(slot: Slot) -> tuple[str, int]:
    return ("", 0) if slot.soft is None else (slot.soft.placement, slot.soft.tokens)
