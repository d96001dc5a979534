"""Continuous batching in llama.cpp: requests share each call, and join or leave between two tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplug.llm.continuous_batching import Slot, append_next
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.serving.engines.llamacpp_model import LlamaModel, Span

SCORING_SEQUENCES = 16  # labels that are scored at once; each has a sequence of its own
SCORED_TOKENS = 128  # maximum tokens of the labels that are scored at once; each needs a row of logits

Embeds = NDArray[np.float32]  # (n, D)
Part = Ids | Embeds


@dataclass(eq=False)
class _Row:
    """A slot and its sequence, which holds the first `length` tokens of prompt, soft tokens and response."""

    slot: Slot
    sequence: int
    length: int = 0


class LlamaBatch:
    """Slots that decode together.

    Args:
        end_ids: tokens that end a response.
        scale: factor from the plug's soft tokens to the file's embeddings; see `llamacpp_checks`.
        rows: maximum number of slots. Their sequences have the ids below it, and those for scoring the next ids.
    """

    def __init__(self, model: LlamaModel, *, end_ids: Sequence[int], scale: float, rows: int) -> None:
        self.model, self.end_ids, self.scale = model, end_ids, scale
        self._rows: list[_Row] = []
        self._row_sequences = range(rows)
        self._scoring_sequences = range(rows, rows + SCORING_SEQUENCES)
        self._is_new = True  # the model may still hold the sequences of an earlier batch

    def __len__(self) -> int:
        return sum(row.slot.ended is None for row in self._rows)

    def add(self, slots: Sequence[Slot]) -> None:
        """Run the prompts of slots and choose their first tokens; an error leaves the batch unchanged."""
        if self._is_new:
            self.model.clear()
            self._is_new = False
        self._remove_ended()
        taken = {row.sequence for row in self._rows}
        free = [sequence for sequence in self._row_sequences if sequence not in taken]
        rows = [_Row(slot, free[index]) for index, slot in enumerate(slots)]
        try:
            for row, logits in zip(rows, self._prefill(rows), strict=True):
                if row.slot.must_score:
                    row.slot.scores = self._scores(row, logits)
                row.slot.start(logits, end_ids=self.end_ids)
        except BaseException:
            self._remove(rows)
            raise
        self._rows += rows

    def step(self) -> None:
        """Choose the next token of each active slot."""
        self._remove_ended()
        if not self._rows:
            return
        spans = [Span(row.sequence, row.length, ids=row.slot.ids[-1:]) for row in self._rows]
        logits = torch.cat(self.model.decode(spans))
        for row in self._rows:
            row.length += 1
        append_next([row.slot for row in self._rows], logits, end_ids=self.end_ids)

    def _remove_ended(self) -> None:
        self._remove([row for row in self._rows if row.slot.ended is not None])
        self._rows = [row for row in self._rows if row.slot.ended is None]

    def _remove(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            self.model.remove(row.sequence)

    def _prefill(self, rows: Sequence[_Row]) -> list[Tensor]:
        """Run the prompts and soft tokens of rows; return the logits of each row's next token, (V,)."""
        first: dict[tuple[int, int], _Row] = {}  # answers to one request share the objects and the pass
        owners = [first.setdefault((id(row.slot.prompt), id(row.slot.soft)), row) for row in rows]
        logits = self._prefill_distinct(list(first.values()))
        for row, owner in zip(rows, owners, strict=True):
            self._share(owner, [row])
        return [logits[owner].clone() for owner in owners]

    def _prefill_distinct(self, rows: Sequence[_Row]) -> dict[_Row, Tensor]:
        parts = {row: self._parts(row.slot) for row in rows}
        logits = self._run_shared({row: before for row, (before, _, _) in parts.items() if before})
        logits |= self._run({row: soft for row, (_, soft, _) in parts.items() if len(soft)})
        return logits | self._run({row: after for row, (_, _, after) in parts.items() if after})

    def _parts(self, slot: Slot) -> tuple[Ids, Embeds, Ids]:
        """Return the ids before the soft tokens, the soft tokens in the file's scale, and the ids after them."""
        ids, soft = slot.prompt.ids, slot.soft
        if soft is None:
            return ids, np.empty((0, self.model.width), np.float32), ()
        position = len(ids) if soft.placement == "suffix" else slot.prompt.soft_position
        vectors = soft.vectors[0].detach().float().cpu() * self.scale
        return ids[:position], vectors.numpy(), ids[position:]

    def _run_shared(self, parts: Mapping[_Row, Ids]) -> dict[_Row, Tensor]:
        """Run the beginnings of prompts, once for all rows with the same beginning."""
        sharing: dict[Ids, list[_Row]] = {}
        for row, ids in parts.items():
            sharing.setdefault(ids, []).append(row)
        found = self._run({rows[0]: ids for ids, rows in sharing.items()})
        for rows in sharing.values():
            self._share(rows[0], rows)
        return {row: found[sharing[ids][0]] for row, ids in parts.items()}

    def _run(self, parts: Mapping[_Row, Part]) -> dict[_Row, Tensor]:
        """Append a part to each row's sequence; return the logits of each row's next token, (V,)."""
        if not parts:
            return {}
        found = self.model.decode([_span(row, part) for row, part in parts.items()])
        for row, part in parts.items():
            row.length += len(part)
        return {row: logits[0] for row, logits in zip(parts, found, strict=True)}

    def _share(self, owner: _Row, rows: Sequence[_Row]) -> None:
        """Give the other rows the tokens of their owner's sequence."""
        for row in rows:
            if row is not owner:
                self.model.copy(owner.sequence, row.sequence)
                row.length = owner.length

    def _scores(self, row: _Row, first: Tensor) -> list[float]:
        """Return the log-probability of each choice with its bias, given the logits of the first token, (V,)."""
        choices, bias = row.slot.choices, row.slot.label_bias
        scores = first.log_softmax(dim=-1)[[choice[0] for choice in choices]]
        for group in _groups(choices):
            scores[group] += self._scores_after_first(row, [choices[index] for index in group])
        return (scores if bias is None else scores + bias[0].to(scores)).tolist()

    def _scores_after_first(self, row: _Row, choices: Sequence[Ids]) -> Tensor:
        """Return the log-probability of each choice's tokens after the first one, (C,)."""
        with self._copies(row, len(choices)) as sequences:
            rows = zip(sequences, choices, strict=True)
            spans = [Span(sequence, row.length, ids=choice[:-1], logits="all") for sequence, choice in rows]
            found = self.model.decode(spans)
        targets = [torch.tensor(choice[1:])[:, None] for choice in choices]
        return torch.stack(
            [logits.log_softmax(dim=-1).gather(-1, ids).sum() for logits, ids in zip(found, targets, strict=True)]
        )

    @contextmanager
    def _copies(self, row: _Row, number: int) -> Iterator[Sequence[int]]:
        """Yield copies of a row's sequence, which end with the block."""
        sequences = self._scoring_sequences[:number]
        try:
            for sequence in sequences:
                self.model.copy(row.sequence, sequence)
            yield sequences
        finally:
            for sequence in sequences:
                self.model.remove(sequence)


def _span(row: _Row, part: Part) -> Span:
    if isinstance(part, np.ndarray):
        return Span(row.sequence, row.length, embeds=part)
    return Span(row.sequence, row.length, ids=part)


def _groups(choices: Sequence[Ids]) -> Iterator[list[int]]:
    """Yield the indices of choices with several tokens, in groups of limited size; a long choice is alone."""
    group, tokens = list[int](), 0
    for index, choice in enumerate(choices):
        if len(choice) == 1:
            continue
        if group and (len(group) == SCORING_SEQUENCES or tokens + len(choice) > SCORED_TOKENS):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += len(choice)
    if group:
        yield group
