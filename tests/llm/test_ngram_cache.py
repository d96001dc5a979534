"""A user's phrases in what the model says: shares that sum to 1, losses and texts of every kind of model alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import small_backend
from torch import Tensor

from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.hf import HFLanguageModel
from personaplug.llm.ngram_cache import DISCOUNT, LONGEST, UserNgramCache, interpolate_logits, interpolate_losses
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["what comes next", "and what is this one called"]
SERIES = ["Why Music, Part 1", "Why Music, Part 2", "Why Music, Part 2"] * 40
KINDS = ["llama", "gpt2", "t5"]


def _shares(size: int = 6) -> Tensor:
    return torch.softmax(torch.randn(size, generator=torch.Generator().manual_seed(0)), dim=0)


def _soft(llm: HFLanguageModel, placement: str) -> SoftPrompt | None:
    if placement == "none":
        return None
    drawn = torch.randn(len(PROMPTS), 2, llm.identity.width, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(drawn, placement=placement)


def test_nothing_is_mixed_in_of_a_user_without_answers() -> None:
    shares = _shares()
    assert UserNgramCache([]).mixed(shares, [1, 2]).equal(shares)
    assert UserNgramCache([]).along([1, 2]) == [(1.0, 0.0)] * 2


def test_shares_are_those_of_the_formula() -> None:
    phrases, shares = UserNgramCache([(1, 2, 0), (1, 3, 0)]), _shares()
    found = phrases.mixed(shares, [1])
    # Any token: 0 and 1 twice, 2 and 3 once. Behind 1, or behind 1 at the start: 2 or 3.
    trust = 6 / (6 + 4 * DISCOUNT[0])
    wanted = (1 - trust) * shares + trust * torch.tensor([2, 2, 1, 1, 0, 0]) / 6
    for doubt in DISCOUNT[1:]:
        trust = 2 / (2 + 2 * doubt)
        wanted = (1 - trust) * wanted + trust * torch.tensor([0, 0, 1, 1, 0, 0]) / 2
    torch.testing.assert_close(found, wanted)
    assert shares.equal(_shares())  # the model's own are left as they are


def test_a_start_is_a_context_and_not_the_last_token_of_another_answer() -> None:
    phrases = UserNgramCache([(1, 2), (1, 2)])
    assert phrases.mixed(_shares(), [])[1] > phrases.mixed(_shares(), [2])[1]


@pytest.mark.parametrize("written", [[], [1], [1, 2], [4, 1, 2], [5, 5, 5]])
def test_mixed_shares_sum_to_one_and_say_what_answers_are_scored_by(written: list[int]) -> None:
    phrases, shares = UserNgramCache([(1, 2, 3, 0), (1, 2, 0), (4, 1, 2, 5, 0)]), _shares()
    mixed = phrases.mixed(shares, written)
    assert float(mixed.sum()) == pytest.approx(1)
    for token in range(len(shares)):
        factor, more = phrases.along([*written, token])[-1]
        assert float(mixed[token]) == pytest.approx(factor * float(shares[token]) + more)


@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_in_a_users_phrases_are_likelier(kind: str, placement: str) -> None:
    llm: Any = small_backend(kind)
    soft, targets = _soft(llm, placement), ["Why Music, Part 2", "other"]
    both = [llm.phrases(SERIES), llm.phrases([])]
    plain, _ = llm.loss(PROMPTS, targets, soft=soft)
    mixed, tokens = llm.loss(PROMPTS, targets, soft=soft, phrases=both)
    assert float(mixed[0]) < float(plain[0]) / 2
    assert float(mixed[1]) == pytest.approx(float(plain[1]), rel=1e-5)
    assert tokens.tolist() == [len(llm.prompt_tokenizer.answer(target)) for target in targets]


def test_losses_of_rows_are_mixed_each_with_its_own() -> None:
    mine, yours = UserNgramCache([(1, 2, 0)] * 3), UserNgramCache([(2, 2, 2)])
    wanted, losses = torch.tensor([[1, 2, 0], [2, 0, -100]]), torch.tensor([2.0, 0.5, 3.0, 1.0, 4.0])
    pairs = [*mine.along([1, 2, 0]), *yours.along([2, 0])]
    each = [-math.log(a * math.exp(-one) + b) for one, (a, b) in zip(losses.tolist(), pairs, strict=True)]
    torch.testing.assert_close(interpolate_losses(losses, wanted, [mine, yours]), torch.tensor(each))
    assert each[0] < 2 < 4 < each[4]


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_gradients_reach_the_soft_tokens(placement: str, toy: CausalLM) -> None:
    soft = _soft(toy, placement)
    assert soft is not None
    soft.vectors.requires_grad_()
    losses, _ = toy.loss(PROMPTS, ["Why not", "x"], soft=soft, phrases=[toy.phrases(SERIES), toy.phrases([])])
    (gradient,) = torch.autograd.grad(losses.sum(), soft.vectors)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0].abs().sum()) > 0


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("placement", ["none", "prefix", "suffix"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_users_series_goes_on_in_what_is_written(kind: str, placement: str, beams: int) -> None:
    llm = small_backend(kind)
    config, soft = GenerationConfig(max_new_tokens=24, num_beams=beams), _soft(llm, placement)
    mine, nobodys = llm.phrases(SERIES), llm.phrases([])
    plain = llm.generate(PROMPTS, soft=soft, config=config)
    found = llm.generate(PROMPTS, soft=soft, config=config, phrases=[mine, nobodys])
    assert found[0].text == "Why Music, Part 2"
    assert found[0].finished
    assert found[1].text == plain[1].text != found[0].text
    turned = llm.generate(PROMPTS[::-1], soft=_turned(soft), config=config, phrases=[nobodys, mine])
    assert [one.text for one in turned[::-1]] == [one.text for one in found]


def _turned(soft: SoftPrompt | None) -> SoftPrompt | None:
    return None if soft is None else SoftPrompt(soft.vectors.flip(0), placement=soft.placement)


def test_draws_are_from_the_mixed_shares(toy: CausalLM) -> None:
    soft, config = _soft(toy, "suffix"), GenerationConfig(max_new_tokens=4, do_sample=True, temperature=0.05)
    found = toy.generate(PROMPTS, soft=soft, config=config, phrases=[toy.phrases(SERIES)] * 2)
    assert [one.text for one in found] == ["Why"] * 2


def test_rows_of_logits_are_mixed_each_with_its_own() -> None:
    logits, phrases = torch.randn(2, 5), UserNgramCache([(3, 0)] * 9)
    found: Any = interpolate_logits(logits, [UserNgramCache([]), phrases], [[1], [3]])
    torch.testing.assert_close(found[0], torch.log_softmax(logits[0], dim=0))
    torch.testing.assert_close(found[1].exp(), phrases.mixed(torch.softmax(logits[1], dim=0), [3]))


def test_long_answers_are_counted_quickly_and_their_beginnings_alone(toy: CausalLM) -> None:
    title = "".join(chr(97 + place % 26) for place in range(3 * LONGEST))
    long, short = toy.phrases([title]), toy.phrases([title[:LONGEST]])
    ids = toy.prompt_tokenizer.answer(title)
    torch.testing.assert_close(torch.tensor(long.along(ids[:9])), torch.tensor(short.along(ids[:9])), rtol=0.05, atol=0)
    assert long.nbytes < 2**16  # one entry a context, however often it came
    end = toy.end_ids()[0]
    assert long.along([end])[0][1] == 0 < short.along([end])[0][1]  # it did not end there


def test_a_loss_beyond_what_an_exponential_holds_stays_finite() -> None:
    losses = interpolate_losses(torch.tensor([200.0]), torch.tensor([[3]]), [UserNgramCache([])])
    assert losses.tolist() == pytest.approx([200])


def test_what_must_not_be_said_is_not_mixed_in() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 3] = -torch.inf
    assert interpolate_logits(logits, [UserNgramCache([(3, 0)] * 9)], [[]])[0, 3] == -torch.inf
