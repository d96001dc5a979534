"""The check whether a model family can run prompts separately."""

from __future__ import annotations

import logging

import pytest
import torch
from families import small_llm, small_mamba

from personaplug.llm.base import PromptBatch
from personaplug.llm.prefix_probe import check_prefix_cache
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["same size"] * 3
TARGETS = ["yes indeed", "n", "ok"]


def test_family_without_keys_and_values_warns_and_runs_one_sequence(caplog: pytest.LogCaptureFixture) -> None:
    llm = small_mamba()
    drawn = torch.randn(3, 2, llm.identity.width, generator=torch.Generator().manual_seed(1))
    vectors = (drawn * llm.embedding_scale).requires_grad_()
    with caplog.at_level(logging.WARNING):
        llm.cache_prompts(PROMPTS)
        losses, _ = llm.loss(PromptBatch(PROMPTS, SoftPrompt(vectors, "suffix")), TARGETS)
    assert "mamba cannot reuse its prompts" in caplog.text
    gradient = torch.autograd.grad(losses.sum(), vectors)[0]
    expected = []
    for row, target in enumerate(TARGETS):
        ids, answer = llm.prompt_tokenizer.encode_prompt(PROMPTS[row]).ids, llm.prompt_tokenizer.encode_target(target)
        parts = [llm.embed(torch.tensor([ids])), vectors[row : row + 1], llm.embed(torch.tensor([answer]))]
        logits = llm.model(inputs_embeds=torch.cat(parts, dim=1)).logits[0, -len(answer) - 1 : -1]
        expected.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(torch.stack(expected).sum(), vectors)[0]
    assert wanted.abs().sum() > 0
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, IndexError, TypeError, NotImplementedError])
def test_family_that_fails_in_any_way_is_unsupported(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")

    def fail(*_: object, **__: object) -> None:
        raise error("unsupported")

    monkeypatch.setattr(llm, "prefill", fail)
    assert check_prefix_cache(llm) is None


def test_family_that_computes_something_else_is_unsupported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_llm("llama")
    prefill = llm.prefill

    def forget_first_layer(embeds: torch.Tensor, mask: torch.Tensor) -> object:
        states, logits = prefill(embeds, mask)
        for own in states:
            own[:2] = 0
        return states, logits

    monkeypatch.setattr(llm, "prefill", forget_first_layer)
    with caplog.at_level(logging.WARNING):
        assert check_prefix_cache(llm) is None
    assert "gradients agree by" in caplog.text


def test_out_of_memory_is_raised_and_the_check_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(llm, "prefill", fail)
        with pytest.raises(torch.OutOfMemoryError):
            llm.supports_prompt_cache  # noqa: B018
    assert llm.supports_prompt_cache
