"""Phrases: what a user's own answers go on with, mixed into what the frozen model would say next.

Soft tokens tell a model who is asking; a small one does not spell out of them the names, series and turns of phrase
that come again in somebody's titles. Counting does: a cache language model (Kuhn and De Mori, 1990) of their answers.
The model's distribution is mixed with what followed the last 0, 1 and 2 tokens there, the longest context last,

    p ← (1 − s) · p + s · count(context, token) / n        s = n / (n + doubt · u)

n being how often the context was seen and u how many different tokens followed it (Witten and Bell, 1991, method C, has
a doubt of 1: a language model is worth more than shorter contexts). Nothing is trained, no prompt grows, and without
answers the model's words stay as they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from personaplug.data.task import Task
from personaplug.errors import ConfigError

Ids = Sequence[int]

DISCOUNT = (100.0, 30.0, 10.0)
"""By how many tokens a context has; chosen on users held out of train (benchmarks/LOG.md, "a user's own phrases")."""

LONGEST = 2048
"""Characters of an answer that are read; phrases are of titles and messages, and a book would hold up everybody."""

_START = -1  # stands before the first token, which is a context of its own
_ENTRY_BYTES = 160  # of a token behind a context, with its share of the tables around it


class UserNgramCache:
    """What one user's answers go on with.

    Args:
        answers: the tokens of each, the end of text among them.
    """

    def __init__(self, answers: Iterable[Ids]) -> None:
        after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for answer in answers:
            for place, token in enumerate(answer):
                for context in _contexts(answer, place):
                    after[context][token] += 1
        self._after = {context: _Seen(counts, DISCOUNT[len(context)]) for context, counts in after.items()}

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return _ENTRY_BYTES * sum(1 + len(seen.counts) for seen in self._after.values())

    def mixed(self, shares: Tensor, written: Ids) -> Tensor:
        """Return the model's (V,) distribution of the next token, mixed with the user's.

        Args:
            written: the answer so far.
        """
        shares = shares.clone()
        for seen in self._known(written, len(written)):
            tokens, counts = seen.arrays
            shares *= 1 - seen.trust
            shares[tokens.to(shares.device)] += seen.trust * counts.to(shares.device, shares.dtype) / seen.times
        return shares

    def along(self, answer: Ids) -> list[tuple[float, float]]:
        """What mixing does to the share that the model gives each token of an answer: times a, plus b.

        Returns:
            (a, b) of each token.
        """
        return [self._at(answer, place) for place in range(len(answer))]

    def _at(self, answer: Ids, place: int) -> tuple[float, float]:
        factor, more = 1.0, 0.0
        for seen in self._known(answer, place):
            factor *= 1 - seen.trust
            more = (1 - seen.trust) * more + seen.trust * seen.counts[answer[place]] / seen.times
        return factor, more

    def _known(self, answer: Ids, place: int) -> Iterator[_Seen]:
        """What followed each context of a place that was seen, the shortest first."""
        for context in _contexts(answer, place):
            if context in self._after:
                yield self._after[context]


class _Seen:
    """What followed a context.

    Attributes:
        counts: how often each token did.
        times: all together (n).
        trust: how far that is mixed in (s).
    """

    def __init__(self, counts: Counter[int], doubt: float) -> None:
        self.counts, self.times = counts, counts.total()
        self.trust = self.times / (self.times + doubt * len(counts))

    @cached_property
    def arrays(self) -> tuple[Tensor, Tensor]:
        """The tokens, and how often each; made when something is written behind the context, which few ever are."""
        return torch.tensor(list(self.counts)), torch.tensor(list(self.counts.values()))


def interpolate_logits(logits: Tensor, phrases: Sequence[UserNgramCache], written: Sequence[Ids]) -> Tensor:
    """Logits of the next token of several answers, each mixed with its user's phrases.

    Args:
        logits: (R, V) of the model.
        phrases: R of them.
        written: the R answers so far.
    Returns:
        (R, V) logarithms of the mixed shares; what the model must not say at all stays so.
    """
    shares = torch.softmax(logits.float(), dim=-1)
    rows = zip(shares, phrases, written, strict=True)
    mixed = torch.stack([own.mixed(row, ids) for row, own, ids in rows]).log()
    return mixed.masked_fill(logits == -torch.inf, -torch.inf)


def interpolate_losses(losses: Tensor, wanted: Tensor, phrases: Sequence[UserNgramCache]) -> Tensor:
    """−log p of the tokens of right answers, each mixed with its user's phrases; gradients pass.

    Args:
        losses: (N,) of the model, one answer behind the other.
        wanted: (B, L) its tokens, negative where there are none; N are not.
        phrases: B of them.
    """
    rows = zip(wanted.tolist(), phrases, strict=True)
    pairs = [pair for row, own in rows for pair in own.along([token for token in row if token >= 0])]
    factor, more = torch.tensor(pairs, dtype=losses.dtype, device=losses.device).reshape(-1, 2).unbind(dim=1)
    return -torch.logaddexp(factor.log() - losses, more.log())


def check_ngrams(task: Task) -> None:
    """Check that users of a task write answers, whose phrases can be mixed into the model's.

    Raises:
        ConfigError: if they do not.
    """
    if task.kind != "text":
        raise ConfigError(
            f"Phrases are mixed into written answers; {task.name} has a closed set of labels, and a plug knows a "
            f"user's own by itself."
        )
    if task.answer_field is None:
        raise ConfigError(f"Phrases are those of a user's answers, and items of {task.name} hold none (answer_field).")


def _contexts(answer: Ids, place: int) -> list[tuple[int, ...]]:
    """The last 0, 1 and 2 tokens before a place, as far as there are so many; the start counts as one."""
    longest = len(DISCOUNT) - 1
    ahead = tuple(answer[max(0, place - longest) : place])
    if place < longest:
        ahead = (_START, *ahead)
    return [ahead[len(ahead) - size :] for size in range(len(ahead) + 1)]
