"""ContinuousBatch: answers that are written side by side, where rows come and go between any two tokens.

Each row has a prompt, soft tokens and a way of choosing of its own. Requests of different users so share every pass
over the model's weights, which is most of what a token costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from personaplug.llm.base import GenerationConfig, pad
from personaplug.llm.causal_lm import CausalLM, chosen
from personaplug.llm.hf import by_length
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.ngram_cache import UserNgramCache, interpolate_logits
from personaplug.llm.prefix_attention import CachedPrefix
from personaplug.llm.prompt_cache import padded_states, real_columns
from personaplug.llm.prompt_tokenizer import Ids, TokenizedPrompt
from personaplug.llm.soft_prompt import SoftPrompt, splice


@dataclass(eq=False, repr=False)
class Row:
    """An answer in the making.

    Attributes:
        prompt: what is asked, in tokens.
        soft: (1, S, D), or None.
        config: how its tokens are chosen; beams are not known here.
        choices: if given, the tokens of the only answers allowed; none may begin another.
        phrases: mixed into what the model says where it writes freely; None = nothing is.
        ids: the tokens so far, an end-of-text token never among them.
        ended: why it is over: `stop` = it came to its end, `length` = it is as long as was allowed, `failed` = its
            tokens could not be chosen; None = it goes on. Written by the thread that runs the rows alone.
    """

    prompt: TokenizedPrompt
    soft: SoftPrompt | None
    config: GenerationConfig
    choices: Sequence[Ids] = ()
    phrases: UserNgramCache | None = None
    ids: list[int] = field(default_factory=list)
    ended: str | None = None

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.config.seed)

    def take(self, logits: Tensor, *, end: frozenset[int]) -> None:
        """Choose the next token from (V,) logits on the CPU; whatever keeps it from that ends this row alone."""
        try:
            self._take(logits, end=end)
        except (RuntimeError, ValueError):
            self.ended = "failed"

    def _take(self, logits: Tensor, *, end: frozenset[int]) -> None:
        if self.choices:
            logits = self._among_choices(logits)
        elif self.phrases is not None:
            logits = interpolate_logits(logits[None], [self.phrases], [self.ids])[0]
        if not bool(torch.isfinite(logits.max())):
            raise ValueError("the model's answer is no number")
        token = int(chosen(logits[None], self.config, draw=self.draw)[0])
        if token in end and not self.choices:
            self.ended = "stop"
            return
        self.ids.append(token)
        if tuple(self.ids) in self.choices:
            self.ended = "stop"
        elif len(self.ids) >= self.config.max_new_tokens:
            self.ended = "length"

    def _among_choices(self, logits: Tensor) -> Tensor:
        """The logits of tokens that go on with one of the choices; nothing of the others."""
        open_ = [choice for choice in self.choices if list(choice[: len(self.ids)]) == self.ids]
        allowed = torch.tensor(sorted({choice[len(self.ids)] for choice in open_}))
        only = torch.full_like(logits, -torch.inf)
        only[allowed] = logits[allowed]
        if self.label_bias is not None:
            tokens, bias = LabelBias(self.choices, self.label_bias).behind(self.ids)
            only[tokens] += bias[0].to(only)
        return only

    @property
    def label_bias(self) -> Tensor | None:
        """(1, C) what its persona says of each choice."""
        return None if self.soft is None else self.soft.label_bias

    @property
    def wants_likeliest(self) -> bool:
        """Whether the likeliest of its choices is asked for, and token by token might miss it."""
        return not self.config.do_sample and any(len(choice) > 1 for choice in self.choices)


class ContinuousBatch:
    """Rows of one model that take their next tokens together; for one thread.

    Args:
        backend: a model whose prompts can be read apart (`supports_prompt_cache`).
    """

    def __init__(self, llm: CausalLM) -> None:
        self.llm = llm
        self._end = frozenset(llm.end_ids())
        self._rows: list[Row] = []
        self._lengths: list[int] = []  # of each row, as far as it is in `_kept`
        self._kept: CachedPrefix | None = None
        self._behind = 0  # tokens of every row that stand behind the kept ones

    def __len__(self) -> int:
        """Rows that go on."""
        return len(self._going())

    @torch.no_grad()
    def admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of some rows and choose their first tokens; then they go on with the others.

        If that fails, the others are as they were.
        """
        going = self._going()
        states = self._states(going)
        for group in _alike(rows):
            found, logits = self._read(group)
            for row, own, last in zip(group, found, logits.float(), strict=True):
                if row.wants_likeliest:
                    row.ids, row.ended = list(row.choices[self._likeliest(row, own, last)]), "stop"
                else:
                    row.take(last.cpu(), end=self._end)
                if row.ended is None:
                    states.append(own)
                    going.append(row)
        self._set(going, states)

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of every row that goes on."""
        going = self._going()
        if not going:
            self._set([], [])
            return
        if 2 * len(going) < len(self._rows):  # rows that have ended are left in the pass while they are few
            self._set(going, self._states(going))
        assert self._kept is not None
        device = self.llm.device
        # A row that has ended repeats its last token, which nobody reads.
        last = torch.tensor([row.ids[-1] if row.ids else 0 for row in self._rows], device=device)
        lengths = torch.tensor(self._lengths, device=device)
        self._behind += 1
        mask = torch.cat([real_columns(lengths, self._longest), lengths.new_ones(len(self._rows), self._behind)], dim=1)
        logits = self.llm.logits_behind(
            self.llm.embed(last)[:, None],
            mask=mask,
            positions=lengths[:, None] + self._behind - 1,
            columns=torch.tensor([0]),
            kept=self._kept,
        )
        for row, own in zip(self._rows, logits[:, 0].float().cpu(), strict=True):
            if row.ended is None:
                row.take(own, end=self._end)

    def _likeliest(self, row: Row, states: Tensor, first: Tensor) -> int:
        """The place of the choice that is likeliest as a whole, behind a row's prompt and its (V,) last logits."""
        choices = list(row.choices)
        lengths = torch.tensor([states.shape[2]], device=self.llm.device)
        behind = self.llm.going_on(states[:, None], lengths, answers=choices)[0]
        whole = torch.log_softmax(first, dim=-1)[[choice[0] for choice in choices]] + behind
        if row.label_bias is not None:
            whole = whole + row.label_bias[0].to(whole)
        return int(whole.argmax())

    def _going(self) -> list[Row]:
        return [row for row in self._rows if row.ended is None]

    @property
    def _longest(self) -> int:
        return max(self._lengths)

    def _set(self, rows: list[Row], states: list[Tensor]) -> None:
        """Go on with some rows, given the states of all their tokens but the last."""
        self._rows, self._lengths, self._behind = rows, [own.shape[2] for own in states], 0
        self._kept = CachedPrefix(padded_states(states, device=self.llm.device)) if states else None

    def _states(self, going: Sequence[Row]) -> list[Tensor]:
        """Keys and values of some of the rows, (2 · layers, heads, n, width) each."""
        if self._kept is None:
            return []
        kept, behind = self._kept.states, self._kept.live_states()
        whole = kept if behind is None else torch.cat([kept, behind], dim=3)
        places = {id(row): place for place, row in enumerate(self._rows)}
        return [whole[:, place, :, self._longest - self._lengths[place] :] for place in (places[id(r)] for r in going)]

    def _read(self, rows: Sequence[Row]) -> tuple[list[Tensor], Tensor]:
        """States of prompts with their soft tokens, and the logits behind; rows have soft tokens of one shape."""
        llm = self.llm
        ids = pad([row.prompt.ids for row in rows], fill=0, side="left").to(llm.device)
        mask = pad([[1] * len(row.prompt.ids) for row in rows], fill=0, side="left").to(llm.device)
        soft, at = rows[0].soft, torch.tensor([row.prompt.at for row in rows])
        if soft is not None:
            soft = SoftPrompt.joined([row.soft for row in rows if row.soft is not None])
            at = mask.sum(dim=1) if soft.placement == "suffix" else at
        batch = splice(llm.embed(ids), mask, soft=soft, at=at)
        return llm.read(batch.embeds, batch.mask)


def _alike(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows whose soft tokens are alike in shape, and whose prompts are of like length."""
    for _, group in groupby(sorted(rows, key=_shape), key=_shape):
        yield from by_length(list(group), lambda row: len(row.prompt.ids))


def _shape(row: Row) -> tuple[str, int]:
    return (row.soft.placement, row.soft.vectors.shape[1]) if row.soft is not None else ("", 0)
