"""User n-gram caches: interpolated probabilities, losses and responses of all model types."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import small_llm
from torch import Tensor

from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.ngram_cache import DISCOUNT, MAX_CHARACTERS, UserNgramCache, interpolate_logits, interpolate_losses
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["what comes next", "and what is this one called"]
SERIES = ["Why Music, Part 1", "Why Music, Part 2", "Why Music, Part 2"] * 40
KINDS = ["llama", "gpt2", "t5"]


def _probs(size: int = 6) -> Tensor:
    return torch.softmax(torch.randn(size, generator=torch.Generator().manual_seed(0)), dim=0)


def _soft(llm: LanguageModel, placement: str) -> SoftPrompt | None:
    if placement == "none":
        return None
    noise = torch.randn(len(PROMPTS), 2, llm.identity.width, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(noise, placement=placement)


def test_interpolate_empty_cache_changes_nothing() -> None:
    probs = _probs()
    assert UserNgramCache([]).interpolate(probs, [1, 2]).equal(probs)
    assert UserNgramCache([]).coefficients([1, 2]) == [(1.0, 0.0)] * 2


def test_interpolate_equals_formula() -> None:
    ngrams, probs = UserNgramCache([(1, 2, 0), (1, 3, 0)]), _probs()
    actual = ngrams.interpolate(probs, [1])
    # Without context: 0 and 1 twice, 2 and 3 once. After 1, or after 1 at the start: 2 or 3.
    trust = 6 / (6 + 4 * DISCOUNT[0])
    expected = (1 - trust) * probs + trust * torch.tensor([2, 2, 1, 1, 0, 0]) / 6
    for discount in DISCOUNT[1:]:
        trust = 2 / (2 + 2 * discount)
        expected = (1 - trust) * expected + trust * torch.tensor([0, 0, 1, 1, 0, 0]) / 2
    torch.testing.assert_close(actual, expected)
    assert probs.equal(_probs())  # the input is unchanged


def test_interpolate_start_of_answer_is_a_context() -> None:
    ngrams = UserNgramCache([(1, 2), (1, 2)])
    assert ngrams.interpolate(_probs(), [])[1] > ngrams.interpolate(_probs(), [2])[1]


@pytest.mark.parametrize("prefix", [[], [1], [1, 2], [4, 1, 2], [5, 5, 5]])
def test_interpolate_sums_to_one_and_agrees_with_coefficients(prefix: list[int]) -> None:
    ngrams, probs = UserNgramCache([(1, 2, 3, 0), (1, 2, 0), (4, 1, 2, 5, 0)]), _probs()
    mixed = ngrams.interpolate(probs, prefix)
    assert float(mixed.sum()) == pytest.approx(1)
    for token in range(len(probs)):
        factor, offset = ngrams.coefficients([*prefix, token])[-1]
        assert float(mixed[token]) == pytest.approx(factor * float(probs[token]) + offset)


@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_past_answer_is_lower_with_ngrams(kind: str, placement: str) -> None:
    llm: Any = small_llm(kind)
    soft, targets = _soft(llm, placement), ["Why Music, Part 2", "other"]
    ngrams = [llm.build_ngram_cache(SERIES), llm.build_ngram_cache([])]
    plain, _ = llm.loss(PromptBatch(PROMPTS, soft), targets)
    mixed, tokens = llm.loss(PromptBatch(PROMPTS, soft, ngrams=ngrams), targets)
    assert float(mixed[0]) < float(plain[0]) / 2
    assert float(mixed[1]) == pytest.approx(float(plain[1]), rel=1e-5)
    assert tokens.tolist() == [len(llm.prompt_tokenizer.encode_target(target)) for target in targets]


def test_interpolate_losses_uses_each_rows_cache() -> None:
    first, second = UserNgramCache([(1, 2, 0)] * 3), UserNgramCache([(2, 2, 2)])
    labels, losses = torch.tensor([[1, 2, 0], [2, 0, -100]]), torch.tensor([2.0, 0.5, 3.0, 1.0, 4.0])
    pairs = [*first.coefficients([1, 2, 0]), *second.coefficients([2, 0])]
    each = [-math.log(a * math.exp(-one) + b) for one, (a, b) in zip(losses.tolist(), pairs, strict=True)]
    torch.testing.assert_close(interpolate_losses(losses, labels, [first, second]), torch.tensor(each))
    assert each[0] < 2 < 4 < each[4]


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_loss_with_ngrams_passes_gradients_to_soft_tokens(placement: str, toy: CausalLM) -> None:
    soft = _soft(toy, placement)
    assert soft is not None
    soft.vectors.requires_grad_()
    losses, _ = toy.loss(
        PromptBatch(PROMPTS, soft, ngrams=[toy.build_ngram_cache(SERIES), toy.build_ngram_cache([])]), ["Why not", "x"]
    )
    (gradient,) = torch.autograd.grad(losses.sum(), soft.vectors)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0].abs().sum()) > 0


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_ngrams_continues_a_users_series(kind: str, placement: str, beams: int) -> None:
    llm = small_llm(kind)
    config, soft = GenerationConfig(max_new_tokens=24, num_beams=beams), _soft(llm, placement)
    user_cache, empty_cache = llm.build_ngram_cache(SERIES), llm.build_ngram_cache([])
    plain = llm.generate(PromptBatch(PROMPTS, soft), config)
    actual = llm.generate(PromptBatch(PROMPTS, soft, ngrams=[user_cache, empty_cache]), config)
    assert actual[0].text == "Why Music, Part 2"
    assert actual[0].finished
    assert actual[1].text == plain[1].text != actual[0].text
    swapped = llm.generate(PromptBatch(PROMPTS[::-1], _swapped(soft), ngrams=[empty_cache, user_cache]), config)
    assert [one.text for one in swapped[::-1]] == [one.text for one in actual]


def _swapped(soft: SoftPrompt | None) -> SoftPrompt | None:
    return None if soft is None else SoftPrompt(soft.vectors.flip(0), placement=soft.placement)


def test_generate_samples_from_interpolated_probabilities(toy: CausalLM) -> None:
    soft, config = _soft(toy, "suffix"), GenerationConfig(max_new_tokens=4, do_sample=True, temperature=0.05)
    actual = toy.generate(PromptBatch(PROMPTS, soft, ngrams=[toy.build_ngram_cache(SERIES)] * 2), config)
    assert [one.text for one in actual] == ["Why"] * 2


def test_interpolate_logits_uses_each_rows_cache() -> None:
    logits, ngrams = torch.randn(2, 5), UserNgramCache([(3, 0)] * 9)
    actual: Any = interpolate_logits(logits, [UserNgramCache([]), ngrams], [[1], [3]])
    torch.testing.assert_close(actual[0], torch.log_softmax(logits[0], dim=0))
    torch.testing.assert_close(actual[1].exp(), ngrams.interpolate(torch.softmax(logits[1], dim=0), [3]))


def test_build_ngram_cache_counts_beginning_of_long_answers(toy: CausalLM) -> None:
    title = "".join(chr(97 + place % 26) for place in range(3 * MAX_CHARACTERS))
    long, short = toy.build_ngram_cache([title]), toy.build_ngram_cache([title[:MAX_CHARACTERS]])
    ids = toy.prompt_tokenizer.encode_target(title)
    torch.testing.assert_close(
        torch.tensor(long.coefficients(ids[:9])), torch.tensor(short.coefficients(ids[:9])), rtol=0.05, atol=0
    )
    assert long.nbytes < 2**16  # one entry per (context, token), for any number of occurrences
    end = toy.end_ids[0]
    assert long.coefficients([end])[0][1] == 0 < short.coefficients([end])[0][1]  # the cut answer does not end there


def test_interpolate_losses_beyond_float_range_is_finite() -> None:
    losses = interpolate_losses(torch.tensor([200.0]), torch.tensor([[3]]), [UserNgramCache([])])
    assert losses.tolist() == pytest.approx([200])


def test_interpolate_logits_keeps_minus_infinity() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 3] = -torch.inf
    assert interpolate_logits(logits, [UserNgramCache([(3, 0)] * 9)], [[]])[0, 3] == -torch.inf
