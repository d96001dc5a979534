"""Fit of a copy head: it learns when past answers help, and refuses losses that are not finite."""

from __future__ import annotations

import pytest
import torch

from personaplug.errors import TrainingDiverged
from personaplug.llm.copied_answers import ReadAnswer
from personaplug.llm.copy_head import CopyHead, CopyInputs
from personaplug.training.copy_head_fit import CopySample, fit_copy_head, held_out_loss

WIDTH, USERS = 16, 60


def _samples(*, loss: float = 3.0) -> list[CopySample]:
    """Return an answer of each user. Its tokens are in the user's past answers, after the same states."""
    draw, samples = torch.Generator().manual_seed(0), []
    for user in range(USERS):
        states, tokens = torch.randn(12, WIDTH, generator=draw), torch.randint(50, (12,), generator=draw)
        prompt = torch.randn(4, WIDTH, generator=draw), torch.randint(50, (4,), generator=draw)
        noise = 0.2 * torch.randn(3, WIDTH, generator=draw)
        inputs = CopyInputs(torch.full((3,), loss), states[:3] + noise, tokens[:3], *prompt)
        samples.append(CopySample(inputs, f"u{user}", [ReadAnswer(tokens, states)]))
    return samples


def _strangers(samples: list[CopySample]) -> list[CopySample]:
    others = samples[1:] + samples[:1]
    return [CopySample(s.inputs, s.owner, o.answers) for s, o in zip(samples, others, strict=True)]


def test_fit_learns_to_copy_without_harm_by_strangers() -> None:
    torch.manual_seed(0)
    samples, head = _samples(), CopyHead(WIDTH, layer=0)
    before = held_out_loss(head, samples[40:])
    report = fit_copy_head(head, samples[:40], held_out=samples[40:], seed=0, title="copy")
    assert report.best_loss == pytest.approx(held_out_loss(head, samples[40:]))
    assert report.best_loss < before < report.loss_without_copy_head == 3.0
    assert held_out_loss(head, _strangers(samples[40:])) > report.best_loss + 0.5
    assert (report.steps, report.samples, report.validation_samples) == (12, 160, 20)


def test_fit_refuses_losses_that_are_not_finite() -> None:
    samples = _samples(loss=float("nan"))
    with pytest.raises(TrainingDiverged, match="gradient"):
        fit_copy_head(CopyHead(WIDTH, layer=0), samples[:40], held_out=samples[40:], seed=0, title="copy")


def test_equal_seeds_give_equal_heads() -> None:
    samples, heads = _samples(), []
    for _ in range(2):
        torch.manual_seed(0)
        heads.append(CopyHead(WIDTH, layer=0))
        fit_copy_head(heads[-1], samples[:40], held_out=samples[40:], seed=3, title="copy")
    assert all(torch.equal(value, heads[1].state_dict()[name]) for name, value in heads[0].state_dict().items())
