"""Logits outside of training are float32 products, so that labels with close logits do not tie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, small_llm

from personaplug.llm import fp32_logits
from personaplug.llm.fp32_logits import use_fp32_logits


def _states_and_logits(model: Any, *, grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input and the output of the output layer."""
    head, calls = model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0].detach(), output.detach())))
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.set_grad_enabled(grad):
        model(ids, **inputs)
    hook.remove()
    return calls[0]


@pytest.mark.parametrize("rows", [1, 50, 2**20])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_gradients_are_float32_product(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32_logits, "_CPU_ROWS", rows)
    model = small_llm(family).model.bfloat16()
    use_fp32_logits(model)
    head = model.get_output_embeddings()
    states, logits = _states_and_logits(model, grad=False)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, states.float() @ head.weight.float().T)
    states, logits = _states_and_logits(model, grad=True)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, states @ head.weight.T)


def test_output_layer_with_bias_adds_it() -> None:
    model = small_llm("llama").model
    head = torch.nn.Linear(32, 40).bfloat16()
    model.set_output_embeddings(head)
    use_fp32_logits(model)
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(
            head(states), torch.nn.functional.linear(states.float(), head.weight.float(), head.bias.float())
        )


def test_float32_model_is_unchanged() -> None:
    model = small_llm("llama").model
    assert "forward" not in vars(model.get_output_embeddings())


def test_logits_that_tie_in_bfloat16_differ() -> None:
    plain, exact = (small_llm("llama").model.bfloat16() for _ in range(2))
    use_fp32_logits(exact)
    for model in (plain, exact):
        with torch.no_grad():
            model.get_output_embeddings().weight *= 64
    counts = {}
    for name, model in (("plain", plain), ("exact", exact)):
        _, logits = _states_and_logits(model, grad=False)
        counts[name] = sum(len(row.unique()) for row in logits.reshape(-1, logits.shape[-1])), logits.numel()
    assert counts["plain"][0] < 0.9 * counts["plain"][1]
    assert counts["exact"][0] > 0.99 * counts["exact"][1]
