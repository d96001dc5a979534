"""Logits outside of training: the float32 product of half-precision states, so that close labels do not tie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, small_backend

from personaplug.llm import fp32_logits as exact_logits
from personaplug.llm.fp32_logits import use_fp32_logits


def _states_and_logits(model: Any, *, grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output layer was given, and what it made of it."""
    head, seen = model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda _, given, made: seen.append((given[0].detach(), made.detach())))
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    words = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.set_grad_enabled(grad):
        model(ids, **words)
    hook.remove()
    (found,) = seen
    return found


@pytest.mark.parametrize("rows", [1, 50, 2**20])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_float32_product_but_in_training(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_logits, "_CACHED", rows)
    model = small_backend(family).model.bfloat16()
    use_fp32_logits(model)
    head = model.get_output_embeddings()
    states, logits = _states_and_logits(model, grad=False)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, states.float() @ head.weight.float().T)
    states, logits = _states_and_logits(model, grad=True)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, states @ head.weight.T)


def test_a_layer_with_a_bias_adds_it() -> None:
    model = small_backend("llama").model
    head = torch.nn.Linear(32, 40).bfloat16()
    model.set_output_embeddings(head)
    use_fp32_logits(model)
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(
            head(states), torch.nn.functional.linear(states.float(), head.weight.float(), head.bias.float())
        )


def test_a_model_in_float32_is_left_alone() -> None:
    model = small_backend("llama").model
    assert "forward" not in vars(model.get_output_embeddings())


def test_labels_that_bfloat16_cannot_tell_apart_are_told_apart() -> None:
    plain, exact = (small_backend("llama").model.bfloat16() for _ in range(2))
    use_fp32_logits(exact)
    for model in (plain, exact):
        with torch.no_grad():
            model.get_output_embeddings().weight *= 64
    found = {}
    for name, model in (("plain", plain), ("exact", exact)):
        _, logits = _states_and_logits(model, grad=False)
        found[name] = sum(len(row.unique()) for row in logits.reshape(-1, logits.shape[-1])), logits.numel()
    assert found["plain"][0] < 0.9 * found["plain"][1]
    assert found["exact"][0] > 0.99 * found["exact"][1]
