"""Penalties, biases and log-probabilities of the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import TOKENIZERS

from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Slot, SlotCopying
from personaplug.llm.copied_answers import copy_source
from personaplug.llm.copy_head import CopyHead
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.token_bytes import TokenBytes
from personaplug.llm.token_logprobs import next_logprobs
from personaplug.llm.token_shift import TokenShift, shift_logits

PROMPTS = ("one", "a somewhat longer prompt", "x y z " * 9)


def _soft(llm: CausalLM, seed: int) -> SoftPrompt:
    draw = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(1, 3, llm.identity.width, generator=draw) * llm.embedding_scale, placement="suffix")


def _slot(llm: CausalLM, number: int, *, tokens: int = 24, **options: Any) -> Slot:
    prompt = llm.prompt_tokenizer.encode_prompt(PROMPTS[number % 3])
    return Slot(prompt, _soft(llm, number), GenerationConfig(max_new_tokens=tokens), **options)


def _run(llm: CausalLM, slots: Sequence[Slot]) -> list[list[int]]:
    batch = ContinuousBatch(llm)
    batch.add(slots)
    while len(batch):
        batch.step()
    return [slot.ids for slot in slots]


_VALUES = st.floats(-2, 2).map(lambda value: round(value, 2))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(_VALUES, _VALUES, st.dictionaries(st.integers(0, 9), _VALUES), st.lists(st.integers(0, 9))),
        min_size=1,
        max_size=5,
    )
)
def test_shift_is_openais_definition(rows: list[tuple[float, float, dict[int, float], list[int]]]) -> None:
    logits = np.random.default_rng(0).normal(size=(len(rows), 10))
    expected = logits.copy()
    shifts = []
    for row, (presence, frequency, bias, tokens) in enumerate(rows):
        shift = TokenShift(presence=presence, frequency=frequency, bias=bias)
        for token in tokens:
            shift.count(token)
        shifts.append(shift)
        for token in range(10):
            count = tokens.count(token)
            expected[row, token] += bias.get(token, 0) - frequency * count - presence * (count > 0)
    shifted = torch.tensor(logits)
    shift_logits(shifted, shifts)
    np.testing.assert_allclose(shifted.numpy(), expected, atol=1e-9)


def test_rows_without_a_shift_keep_their_logits() -> None:
    logits = torch.randn(3, 10)
    before = logits.clone()
    shift_logits(logits, [None, TokenShift(bias={4: -100.0}), TokenShift(presence=1.0)])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert logits[1, 4] == before[1, 4] - 100


def _greedy(llm: CausalLM, number: int, *, tokens: int, presence: float = 0, frequency: float = 0) -> list[int]:
    """Return the likeliest tokens under penalties, with a full pass of the model for each token."""
    prompt, ids = llm.prompt_tokenizer.encode_prompt(PROMPTS[number]), list[int]()
    soft = _soft(llm, number).vectors[0]
    while len(ids) < tokens:
        embeds = torch.cat([llm.embed(torch.tensor(prompt.ids)), soft, llm.embed(torch.tensor(ids, dtype=torch.int64))])
        logits = llm.model(inputs_embeds=embeds[None]).logits[0, -1].double().detach().numpy()
        for token in set(ids):
            logits[token] -= frequency * ids.count(token) + presence
        if (token := int(logits.argmax())) in llm.end_ids:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-1.0, 2.0)])
def test_penalties_equal_those_of_full_passes(toy: CausalLM, presence: float, frequency: float) -> None:
    shifts = [TokenShift(presence=presence, frequency=frequency) for _ in range(3)]
    answers = _run(toy, [_slot(toy, number, shift=shift) for number, shift in enumerate(shifts)])
    expected = [_greedy(toy, number, tokens=24, presence=presence, frequency=frequency) for number in range(3)]
    assert answers == expected
    assert answers != _run(toy, [_slot(toy, number) for number in range(3)])


def test_bias_forces_and_bans_tokens(toy: CausalLM) -> None:
    (plain,) = _run(toy, [_slot(toy, 0)])
    forced, banned = _run(
        toy, [_slot(toy, 0, shift=TokenShift(bias={7: 100})), _slot(toy, 0, shift=TokenShift(bias={plain[0]: -100}))]
    )
    assert forced == [7] * 24
    assert plain[0] not in banned
    end = _slot(toy, 0, shift=TokenShift(bias={toy.end_ids[0]: 100}))
    assert (_run(toy, [end]), end.ended) == ([[]], "stop")


def test_options_of_a_row_do_not_change_other_rows(toy: CausalLM) -> None:
    alone = [_run(toy, [_slot(toy, number)])[0] for number in range(3)]
    others = [
        _slot(toy, 3, shift=TokenShift(bias={5: 100.0})),
        _slot(toy, 4, shift=TokenShift(presence=2.0, frequency=2.0), top_logprobs=5),
        _slot(toy, 5, top_logprobs=0),
    ]
    mixed = [others[0], _slot(toy, 0), others[1], _slot(toy, 1), others[2], _slot(toy, 2)]
    assert _run(toy, mixed)[1::2] == alone


def _expected_log_probs(llm: CausalLM, slot: Slot) -> torch.Tensor:
    """Return the log-probabilities at each token of an answer, (L, V), from one pass over prompt and answer."""
    assert slot.soft is not None
    parts = [llm.embed(torch.tensor(slot.prompt.ids)), slot.soft.vectors[0], llm.embed(torch.tensor(slot.ids))]
    logits: torch.Tensor = llm.model(inputs_embeds=torch.cat(parts)[None]).logits[0].detach()
    start = len(slot.prompt.ids) + slot.soft.tokens - 1
    return torch.log_softmax(logits[start:-1].double(), dim=-1)


def test_logprobs_equal_those_of_a_full_pass(toy: CausalLM) -> None:
    sampled = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=1.7, top_p=0.8, seed=3)
    slots = [_slot(toy, number, top_logprobs=number * 4) for number in range(6)]
    slots[1].config = sampled
    slots[2].shift = TokenShift(presence=1.0, bias={9: 3.0})
    _run(toy, [*slots, _slot(toy, 7)])
    for slot in slots:
        expected = _expected_log_probs(toy, slot)
        assert len(slot.logprobs) == len(slot.ids) > 5
        for found, token, log_probs in zip(slot.logprobs, slot.ids, expected, strict=True):
            assert (found.token, len(found.top)) == (token, slot.top_logprobs)
            assert found.logprob == pytest.approx(float(log_probs[token]), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(log_probs.topk(len(found.top)).values, abs=1e-4)
            assert [float(log_probs[other]) for other, _ in found.top] == pytest.approx(
                [value for _, value in found.top], abs=1e-4
            )


def test_rows_that_need_no_logprobs_get_none() -> None:
    logits = torch.randn(3, 10)
    first, second, third = next_logprobs(logits, [None, 2, 0])
    assert first is None
    assert second is not None
    assert third is not None
    assert second.of(4).logprob == pytest.approx(float(torch.log_softmax(logits[1], dim=0)[4]))
    assert (len(second.of(4).top), third.of(0).top) == (2, [])
    assert next_logprobs(logits, [None] * 3) == [None] * 3


def _eager_head(toy: CausalLM) -> CopyHead:
    head = toy.new_copy_head(seed=0)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor([0.0, 0.0, 6.0]))
    return head


def test_logprobs_with_a_copy_head_are_those_of_the_mixture(toy: CausalLM) -> None:
    head = _eager_head(toy)
    source = copy_source(toy, head, ["Why Music, Part 2"])
    copying = _slot(toy, 0, copying=SlotCopying(head, source), top_logprobs=3)
    plain = _slot(toy, 0, top_logprobs=3)
    _run(toy, [copying, plain])
    assert copying.ids != plain.ids
    for found in copying.logprobs:
        assert found.logprob == pytest.approx(found.top[0][1]), "the likeliest token of the mixture is chosen"
    assert copying.logprobs[0].logprob == pytest.approx(_mixed_log_probs(toy, head, copying)[copying.ids[0]], abs=1e-4)


def _mixed_log_probs(toy: CausalLM, head: CopyHead, slot: Slot) -> list[float]:
    """Return the log-probabilities of the first token, from the definition of the mixture."""
    assert slot.soft is not None
    embeds = torch.cat([toy.embed(torch.tensor(slot.prompt.ids)), slot.soft.vectors[0]])[None]
    states, logits = toy.prefill(embeds, torch.ones(1, embeds.shape[1], dtype=torch.int64))
    values = states[0].blocks[0][2 * head.layer + 1].transpose(0, 1).flatten(1)
    tokens = torch.tensor(slot.prompt.ids[1:])
    prompt = head.prompt.source(values[: len(tokens)], tokens)
    own = copy_source(toy, head, ["Why Music, Part 2"])
    shares = torch.softmax(head.gate(torch.nn.functional.layer_norm(values[-1:], values.shape[-1:])), dim=1)[0]
    probs = shares[0] * torch.softmax(logits[0], dim=0)
    for pointer, source, share in ((head.prompt, prompt, shares[1]), (head.own, own, shares[2])):
        weights = pointer.weights(values[-1:], source)[0]
        for token, weight in zip(source.tokens.tolist(), weights, strict=True):
            probs[token] += share * weight
    return [float(value) for value in probs.detach().log()]


def test_mixture_gives_unlikely_tokens_a_finite_logarithm(toy: CausalLM) -> None:
    head = _eager_head(toy)
    logits = torch.full((1, 257), -500.0)
    logits[0, 3] = 500.0
    states = torch.randn(1, head.gate.in_features)
    source = copy_source(toy, head, ["tea"])
    mixed = head.mix(logits, states, prompts=[source], own=[source])
    assert torch.isfinite(mixed).all()
    assert float(mixed.exp().sum()) == pytest.approx(1)


def test_answers_to_one_request_share_the_pass_over_its_prompt(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, rows = toy.prefill, list[int]()

    def counted(embeds: torch.Tensor, mask: torch.Tensor) -> Any:
        rows.append(len(embeds))
        return prefill(embeds, mask)

    monkeypatch.setattr(toy, "prefill", counted)
    prompt, soft = toy.prompt_tokenizer.encode_prompt("hello"), _soft(toy, 1)
    configs = [GenerationConfig(max_new_tokens=9, do_sample=True, temperature=2.0, seed=seed) for seed in range(4)]
    together = _run(toy, [*(Slot(prompt, soft, config) for config in configs), _slot(toy, 2)])
    assert sum(rows) == 2
    assert together[:4] == [_run(toy, [Slot(prompt, soft, config)])[0] for config in configs]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_tokens_make_up_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    of = TokenBytes(tokenizer).of
    text = "Tea, please: 3 cups" if kind != "bytes" else "Tea ☕ or crème brûlée?\n\t日本"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(of, ids)).decode().strip() == text.strip()
    assert of(tokenizer.eos_token_id) == str(tokenizer.eos_token).encode()
    assert of(10**6) == b"", "a row of the model without a token"
