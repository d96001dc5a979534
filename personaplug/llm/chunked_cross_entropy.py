"""Cross-entropy of right answers over a wide vocabulary (PPlug, eq. 6), in memory traffic what it has to be.

A vocabulary of 49,152 makes the logits the largest tensor of a step. They are gone through a few places at a time, in
float32, which stays within a processor's cache; what is kept for the gradient is the logits as the model gave them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from personaplug.llm.ngram_cache import UserNgramCache, interpolate_losses
from personaplug.llm.soft_prompt import IGNORED

_CACHED = 2**18  # logits that are gone through at once on a processor; 1 MB in float32
_AT_ONCE = 2**26  # elsewhere, where a kernel's start costs more than memory does


def token_loss(
    logits: Tensor, labels: Tensor, phrases: Sequence[UserNgramCache] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of −log p over each row's labels (eq. 6), and how many there are.

    Args:
        logits: (B, L, V), already aligned with the labels.
        labels: (B, L), IGNORED where there is nothing to predict.
        phrases: (B,) mixed into what the logits say; None = nothing is.
    """
    real = labels != IGNORED
    losses: Tensor = _Losses.apply(logits, labels, real)  # type: ignore[no-untyped-call]
    if phrases is not None:
        losses = interpolate_losses(losses, labels, phrases)
    each = losses.new_zeros(labels.shape).masked_scatter(real, losses)
    return each.sum(dim=1), real.sum(dim=1)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32, over the last axis."""
    return torch.log_softmax(logits.float(), dim=-1)


class _Losses(torch.autograd.Function):
    """−log p of the labels at the (n) real places of (B, L, V) logits, row by row, in float32.

    The gradient is softmax − one-hot at real places and 0 at others, whose logits are never looked at.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
        places, wanted = real.flatten().nonzero()[:, 0], labels[real]
        flat = logits.reshape(-1, logits.shape[-1])
        normalizers = flat.new_empty(len(places), dtype=torch.float32)
        losses = torch.empty_like(normalizers)
        for part in _parts(flat, len(places)):
            some = flat[places[part]].float()
            normalizers[part] = some.logsumexp(dim=1)
            losses[part] = normalizers[part] - some.gather(1, wanted[part, None])[:, 0]
        ctx.save_for_backward(logits, places, wanted, normalizers)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, places, wanted, normalizers = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        found = torch.zeros_like(flat)
        for part in _parts(flat, len(places)):
            shares = flat[places[part]].float().sub_(normalizers[part, None]).exp_()
            shares.scatter_add_(1, wanted[part, None], shares.new_full((len(shares), 1), -1))
            found[places[part]] = shares.mul_(gradient[part, None]).to(found.dtype)
        return found.view(logits.shape), None, None


def _parts(flat: Tensor, count: int) -> Iterator[slice]:
    """So many places a few at a time."""
    most = _CACHED if flat.device.type == "cpu" else _AT_ONCE
    step = max(1, most // flat.shape[1])
    return (slice(start, start + step) for start in range(0, count, step))
