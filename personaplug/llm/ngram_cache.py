"""User n-gram cache: a cache language model of a user's past answers, interpolated with the frozen model.

Soft tokens do not make a small model spell names and fixed expressions; n-gram counts do. The model's distribution is
interpolated with the tokens that followed the last 0, 1 and 2 tokens in past answers, longest context last:

    p ← (1 − s) · p + s · count(context, token) / n        s = n / (n + discount · u)

n = occurrences of the context, u = distinct tokens that followed it. Source: Kuhn and De Mori, 1990. s is method C of
Witten and Bell, 1991, which has a discount of 1. The discounts here are larger, because a language model predicts
better than a shorter context.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from personaplug.data.task import Task
from personaplug.errors import ConfigError

# By context length. Chosen on training users that were held out (benchmarks/LOG.md, "a user's own phrases").
DISCOUNT = (100.0, 30.0, 10.0)
MAX_CHARACTERS = 2048  # counted per answer; a very long answer would block the server
_START = -1  # the context before the first token
_ENTRY_BYTES = 160  # memory of one (context, token) entry, its part of the dictionaries included


class UserNgramCache:
    """N-gram counts of one user's answers, given as token ids with the end-of-text token."""

    def __init__(self, answers: Iterable[Sequence[int]]) -> None:
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for answer in answers:
            for index, token in enumerate(answer):
                for context in _contexts(answer, index):
                    counts[context][token] += 1
        self._after = {context: _NextTokens(counter, DISCOUNT[len(context)]) for context, counter in counts.items()}

    @property
    def nbytes(self) -> int:
        return _ENTRY_BYTES * sum(1 + len(after.counts) for after in self._after.values())

    def interpolate(self, probs: Tensor, prefix: Sequence[int]) -> Tensor:
        """Interpolate the model's (V,) distribution of the next token after `prefix`, the answer so far."""
        probs = probs.clone()
        for after in self._matches(prefix, len(prefix)):
            tokens, counts = after.arrays
            probs *= 1 - after.weight
            probs[tokens.to(probs.device)] += after.weight * counts.to(probs.device, probs.dtype) / after.total
        return probs

    def coefficients(self, answer: Sequence[int]) -> list[tuple[float, float]]:
        """Return (a, b) per token of an answer: interpolation turns the model's p(token) into a · p + b."""
        pairs = []
        for index, token in enumerate(answer):
            scale, offset = 1.0, 0.0
            for after in self._matches(answer, index):
                scale *= 1 - after.weight
                offset = (1 - after.weight) * offset + after.weight * after.counts[token] / after.total
            pairs.append((scale, offset))
        return pairs

    def _matches(self, answer: Sequence[int], index: int) -> Iterator[_NextTokens]:
        """Yield the counts of each seen context of a position, shortest context first."""
        return (self._after[context] for context in _contexts(answer, index) if context in self._after)


class _NextTokens:
    """Counts of the tokens that followed one context: u = len(counts), n = total, s = weight."""

    def __init__(self, counts: Counter[int], discount: float) -> None:
        self.counts, self.total = counts, counts.total()
        self.weight = self.total / (self.total + discount * len(counts))

    @cached_property
    def arrays(self) -> tuple[Tensor, Tensor]:
        """Tokens and their counts; built at first use, because generation visits few contexts."""
        return torch.tensor(list(self.counts)), torch.tensor(list(self.counts.values()))


def interpolate_logits(logits: Tensor, ngrams: Sequence[UserNgramCache], prefixes: Sequence[Sequence[int]]) -> Tensor:
    """Interpolate the next-token logits of R answers that begin with `prefixes`.

    Returns log-probabilities, (R, V); −inf stays −inf.
    """
    probs = torch.softmax(logits.float(), dim=-1)
    rows = zip(probs, ngrams, prefixes, strict=True)
    mixed = torch.stack([cache.interpolate(row, prefix) for row, cache, prefix in rows]).log()
    return mixed.masked_fill(logits == -torch.inf, -torch.inf)


def interpolate_losses(losses: Tensor, labels: Tensor, ngrams: Sequence[UserNgramCache]) -> Tensor:
    """Interpolate (N,) values of −log p with B caches; `labels` (B, L) are the N targets, negative elsewhere."""
    rows = zip(labels.tolist(), ngrams, strict=True)
    pairs = [pair for row, cache in rows for pair in cache.coefficients([token for token in row if token >= 0])]
    scale, offset = torch.tensor(pairs, dtype=losses.dtype, device=losses.device).reshape(-1, 2).unbind(dim=1)
    return -torch.logaddexp(scale.log() - losses, offset.log())


def check_ngrams(task: Task) -> None:
    """Raise ConfigError unless history items of a task have free-text answers, so that n-grams can be counted."""
    if task.labels:
        raise ConfigError(
            f"Phrases need free-text answers, but task {task.name} has a closed set of labels. Leave phrases out; a "
            f"plug already reads the user's labels."
        )
    if task.answer_field is None:
        raise ConfigError(
            f"Phrases need history items with answers, but task {task.name} has no answer_field. Leave phrases out."
        )


def _contexts(answer: Sequence[int], index: int) -> list[tuple[int, ...]]:
    """Return the last 0, 1 and 2 tokens before a position; the start of the answer counts as a token."""
    longest = len(DISCOUNT) - 1
    before = tuple(answer[max(0, index - longest) : index])
    if index < longest:
        before = (_START, *before)
    return [before[len(before) - size :] for size in range(len(before) + 1)]
