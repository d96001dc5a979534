"""The loss of targets equals torch's cross-entropy, with a gradient in the model's precision; KL equals scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr

from personaplug.analysis.metric_base import Array
from personaplug.llm import chunked_cross_entropy
from personaplug.llm.chunked_cross_entropy import token_divergence, token_loss
from personaplug.llm.soft_prompt import IGNORED


def _case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(5, 7, 50, generator=draw)).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (5, 7), generator=draw)
    labels[0, 2:], labels[3, :1], labels[4] = IGNORED, IGNORED, IGNORED
    return logits, labels


def _plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(labels.shape).sum(dim=1)


@pytest.mark.parametrize("limit", [1, 150, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_loss_and_gradient_equal_torch(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_cross_entropy, "_CPU_LOGITS", limit)
    (logits, labels), (same, _) = _case(dtype), _case(dtype)
    weights = torch.arange(1.0, 6.0)
    losses, tokens = token_loss(logits, labels)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    (expected,) = torch.autograd.grad((_plain(same, labels) * weights).sum(), same)
    torch.testing.assert_close(losses, _plain(same, labels))
    assert tokens.tolist() == [2, 7, 7, 6, 0]
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)


def test_token_loss_ignores_nan_at_unlabeled_positions() -> None:
    logits, labels = _case()
    with torch.no_grad():
        logits[labels == IGNORED] = torch.nan
    losses, _ = token_loss(logits, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert float(gradient[labels == IGNORED].abs().sum()) == 0


def test_token_loss_nan_at_labeled_position_is_nan() -> None:
    logits, labels = _case()
    with torch.no_grad():
        logits[1, 0] = torch.nan
    assert token_loss(logits, labels)[0].isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("limit", [1, 150, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_divergence_equals_scipy(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_cross_entropy, "_CPU_LOGITS", limit)
    lengths = [7, 2, 1]
    draw = torch.Generator().manual_seed(5)
    rows = [[(4 * torch.randn(n, 50, generator=draw)).to(dtype) for n in lengths] for _ in range(2)]
    for row in (*rows[0], *rows[1]):
        row[:, 3] = -torch.inf  # a token that neither model can write
    rows[0][0][:, 4] = -torch.inf  # a token that only the other model can write
    p, q = (_padded(part, left=left) for part, left in zip(rows, (True, False), strict=True))
    expected = [float(rel_entr(_probabilities(a), _probabilities(b)).sum()) for a, b in zip(*rows, strict=True)]
    np.testing.assert_allclose(token_divergence(p, q).numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(token_divergence(p, p).numpy(), [0, 0, 0])


def _padded(rows: list[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels of rows, padded on one side; the padded logits are NaN."""
    logits, labels = torch.full((len(rows), 8, 50), torch.nan, dtype=rows[0].dtype), torch.full((len(rows), 8), IGNORED)
    for index, row in enumerate(rows):
        place = slice(8 - len(row), 8) if left else slice(len(row))
        logits[index, place], labels[index, place] = row, 1
    return logits, labels


def _probabilities(logits: torch.Tensor) -> Array:
    return np.asarray(np.exp(log_softmax(logits.double().numpy(), axis=-1)))
