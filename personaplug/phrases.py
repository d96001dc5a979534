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

import torch
from torch import Tensor

from personaplug.data.base import Task
from personaplug.errors import BadConfig

Ids = Sequence[int]

DOUBT = (100.0, 30.0, 10.0)
"""By how many tokens a context has; chosen on users held out of train (benchmarks/LOG.md, "a user's own phrases")."""

_START = -1  # stands before the first token, which is a context of its own


class Phrases:
    """What one user's answers go on with.

    Args:
        answers: the tokens of each, the end of text among them.
    """

    def __init__(self, answers: Iterable[Ids]) -> None:
        self._after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for answer in answers:
            for place, token in enumerate(answer):
                for context in _contexts(answer[:place]):
                    self._after[context][token] += 1

    def mixed(self, shares: Tensor, written: Ids) -> Tensor:
        """Return the model's (V,) distribution of the next token, mixed with the user's.

        Args:
            written: the answer so far.
        """
        shares = shares.clone()
        for trust, after in self._known(written):
            tokens = torch.tensor(list(after), device=shares.device)
            counts = torch.tensor(list(after.values()), dtype=shares.dtype, device=shares.device)
            shares *= 1 - trust
            shares[tokens] += trust * counts / counts.sum()
        return shares

    def along(self, answer: Ids) -> list[tuple[float, float]]:
        """What mixing does to the share that the model gives each token of an answer: times a, plus b.

        Returns:
            (a, b) of each token.
        """
        return [self._of(token, answer[:place]) for place, token in enumerate(answer)]

    def _of(self, token: int, written: Ids) -> tuple[float, float]:
        factor, more = 1.0, 0.0
        for trust, after in self._known(written):
            factor *= 1 - trust
            more = (1 - trust) * more + trust * after[token] / after.total()
        return factor, more

    def _known(self, written: Ids) -> Iterator[tuple[float, Counter[int]]]:
        """What followed each context that was seen, the shortest first, and how far that is trusted."""
        for context, doubt in zip(_contexts(written), DOUBT, strict=False):
            after = self._after.get(context)
            if after:
                seen = after.total()
                yield seen / (seen + doubt * len(after)), after


def mixed_logits(logits: Tensor, phrases: Sequence[Phrases], written: Sequence[Ids]) -> Tensor:
    """Logits of the next token of several answers, each mixed with its user's phrases.

    Args:
        logits: (R, V) of the model.
        phrases: R of them.
        written: the R answers so far.
    Returns:
        (R, V) logarithms of the mixed shares.
    """
    shares = torch.softmax(logits.float(), dim=-1)
    rows = zip(shares, phrases, written, strict=True)
    return torch.stack([own.mixed(row, ids) for row, own, ids in rows]).log()


def mixed_losses(losses: Tensor, wanted: Tensor, phrases: Sequence[Phrases]) -> Tensor:
    """−log p of the tokens of right answers, each mixed with its user's phrases; gradients pass.

    Args:
        losses: (N,) of the model, one answer behind the other.
        wanted: (B, L) its tokens, negative where there are none; N are not.
        phrases: B of them.
    """
    rows = zip(wanted.tolist(), phrases, strict=True)
    pairs = [pair for row, own in rows for pair in own.along([token for token in row if token >= 0])]
    factor, more = torch.tensor(pairs, dtype=losses.dtype, device=losses.device).reshape(-1, 2).unbind(dim=1)
    return -torch.log(factor * torch.exp(-losses) + more)


def check_phrases(task: Task) -> None:
    """Check that users of a task write answers, whose phrases can be mixed into the model's.

    Raises:
        BadConfig: if they do not.
    """
    if task.kind != "text":
        raise BadConfig(
            f"Phrases are mixed into written answers; {task.name} has a closed set of labels, and a plug knows a "
            f"user's own by itself."
        )
    if task.answer_field is None:
        raise BadConfig(f"Phrases are those of a user's answers, and items of {task.name} hold none (answer_field).")


def _contexts(written: Ids) -> list[tuple[int, ...]]:
    """The last 0, 1 and 2 tokens, as far as there are so many; the start counts as one."""
    ahead = (_START, *written[-len(DOUBT) :]) if len(written) < len(DOUBT) else tuple(written[-len(DOUBT) :])
    return [ahead[len(ahead) - size :] for size in range(min(len(DOUBT), len(ahead) + 1))]
