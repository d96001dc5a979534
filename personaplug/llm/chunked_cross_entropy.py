"""Cross-entropy (PPlug, eq. 6) and KL divergence over a large vocabulary with little memory traffic.

The logits are the largest tensor of a step. They are converted to float32 in chunks that fit into the CPU cache. The
backward pass needs only the original logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from personaplug.llm.soft_prompt import IGNORED

_CPU_LOGITS = 2**18  # logits per chunk on a CPU: 1 MB in float32
_GPU_LOGITS = 2**26  # on other devices, because kernel launches cost more than memory


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of −log p over each row's labels (eq. 6) and the number of labels, both (B,).

    `logits` (B, L, V) are aligned with `labels` (B, L). A label is IGNORED if there is nothing to predict.
    """
    return token_losses(logits, labels).sum(dim=1), (labels != IGNORED).sum(dim=1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log p of each label, (B, L), and 0 for IGNORED; see `token_loss`."""
    is_label = labels != IGNORED
    losses: Tensor = _TokenLosses.apply(logits, labels, is_label)  # type: ignore[no-untyped-call]
    return losses.new_zeros(labels.shape).masked_scatter(is_label, losses)


def token_divergence(plain: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum of KL(plain ‖ other) over each row's labels, in nats, (B,), computed in float32.

    Both arguments are logits (B, L, V) and labels (B, L) as in `token_loss`. Their labels are the same tokens, but may
    be padded on different sides.
    """
    (plain_logits, plain_positions), (logits, positions) = _labeled(*plain), _labeled(*other)
    divergences = plain_logits.new_empty(len(positions), dtype=torch.float32)
    for chunk in _chunks(logits, len(positions)):
        log_p, log_q = log_softmax(plain_logits[plain_positions[chunk]]), log_softmax(logits[positions[chunk]])
        p = log_p.exp()
        # The term is 0 if p is 0, for any q. Clamp, because rounding can make the divergence slightly negative.
        divergences[chunk] = (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(dim=1).clamp(min=0)
    is_label = plain[1] != IGNORED
    return divergences.new_zeros(is_label.shape).masked_scatter(is_label, divergences).sum(dim=1)


def _labeled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits as (B · L, V) and the indices of the rows that have a label."""
    return logits.flatten(0, 1), (labels != IGNORED).flatten().nonzero()[:, 0]


def log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


class _TokenLosses(torch.autograd.Function):
    """−log p at the n labeled positions of (B, L, V) logits, row by row, in float32.

    The gradient is softmax − one-hot at labeled positions and 0 elsewhere. Logits elsewhere are never read.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, is_label: Tensor) -> Tensor:
        positions, targets = is_label.flatten().nonzero()[:, 0], labels[is_label]
        flat = logits.reshape(-1, logits.shape[-1])
        normalizers = flat.new_empty(len(positions), dtype=torch.float32)
        losses = torch.empty_like(normalizers)
        for chunk in _chunks(flat, len(positions)):
            values = flat[positions[chunk]].float()
            normalizers[chunk] = values.logsumexp(dim=1)
            losses[chunk] = normalizers[chunk] - values.gather(1, targets[chunk, None])[:, 0]
        ctx.save_for_backward(logits, positions, targets, normalizers)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, positions, targets, normalizers = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        flat_gradient = torch.zeros_like(flat)
        for chunk in _chunks(flat, len(positions)):
            probs = flat[positions[chunk]].float().sub_(normalizers[chunk, None]).exp_()
            probs.scatter_add_(1, targets[chunk, None], probs.new_full((len(probs), 1), -1))
            flat_gradient[positions[chunk]] = probs.mul_(gradient[chunk, None]).to(flat.dtype)
        return flat_gradient.view(logits.shape), None, None


def _chunks(flat: Tensor, count: int) -> Iterator[slice]:
    limit = _CPU_LOGITS if flat.device.type == "cpu" else _GPU_LOGITS
    step = max(1, limit // flat.shape[1])
    return (slice(start, start + step) for start in range(0, count, step))
