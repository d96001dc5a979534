"""Label prior of a user's own answers, and its distribution over the tokens of labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import small_llm

from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Slot
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.label_prior import LabelPrior

LABELS = ("politics", "pop", "sports news", "science", "7")
BIAS = torch.tensor([[0.5, -2.0, 3.0, 0.0, 1.0], [0.0, 1.5, -4.0, 2.0, -1.0]])


def _prior(*, width: int = 0) -> LabelPrior:
    prior = LabelPrior(3, width=width)
    prior.set_usual(torch.tensor([0, 0, 0, 0, 0, 1, 1, -1]))  # with add-one smoothing: frequencies 0.6, 0.3 and 0.1
    with torch.no_grad():
        prior.log_doubt.fill_(math.log(2))
        prior.trust.fill_(0.5)
    return prior


def _history(labels: list[int], lengths: tuple[int, ...], *, vectors: torch.Tensor | None = None) -> HistoryBatch:
    items = len(labels)
    vectors = torch.eye(items, 4) if vectors is None else vectors
    kinds = torch.zeros(items, dtype=torch.int64)
    return HistoryBatch(vectors.half(), lengths, torch.tensor(labels, dtype=torch.int64), torch.zeros(items, 0), kinds)


def test_label_prior_equals_formula() -> None:
    bias = _prior()(_history([2, 2, 0, 1], (3, 0, 1)))
    for row, counts in zip(bias.tolist(), [(1, 0, 2), (0, 0, 0), (0, 1, 0)], strict=True):
        shares, total = (0.6, 0.3, 0.1), sum(counts)
        expected = [
            0.5 * math.log((n + 2 * usual) / ((total + 2) * usual)) for n, usual in zip(counts, shares, strict=True)
        ]
        assert row == pytest.approx(expected, abs=1e-6)


def test_similar_items_equal_formula() -> None:
    prior = _prior(width=2)
    with torch.no_grad():
        prior.log_near_doubt.fill_(math.log(0.5))
        prior.near_trust.fill_(2.0)
        prior.log_temperature.fill_(math.log(0.25))
        assert prior.metric is not None
        prior.metric.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # only the sign of the first value remains
    vectors = torch.tensor([[0.6, 0.8], [-0.6, 0.8]])  # cosines of 1 and -1 with the query
    bias = prior(_history([2, 0], (2,), vectors=vectors), torch.tensor([[1.0, 0.0]]))
    own = [(1 + 1.2) / 4, 0.6 / 4, (1 + 0.2) / 4]
    near_counts = (math.exp(-2 / 0.25), 0, 1)
    near = [(m + 0.5 * s) / (sum(near_counts) + 0.5) for m, s in zip(near_counts, own, strict=True)]
    expected = [
        0.5 * math.log(s / usual) + 2 * math.log(r / s) for s, r, usual in zip(own, near, (0.6, 0.3, 0.1), strict=True)
    ]
    assert bias[0].tolist() == pytest.approx(expected, abs=1e-3)  # item vectors are float16


def test_each_user_of_a_batch_gets_the_bias_of_the_own_items() -> None:
    prior, generator = _prior(width=4), torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(3, 4, generator=generator), dim=1)
    together = prior(_history([0, 2, 2, -1, 1], (2, 0, 3), vectors=vectors), queries)
    first = prior(_history([0, 2], (2,), vectors=vectors[:2]), queries[:1])
    last = prior(_history([2, -1, 1], (3,), vectors=vectors[2:]), queries[2:])
    torch.testing.assert_close(together, torch.cat([first, torch.zeros(1, 3), last]))


@pytest.mark.parametrize("width", [0, 4])
def test_label_prior_ignores_unlabeled_items(width: int) -> None:
    prior, queries = _prior(width=width), torch.eye(1, 4)
    vectors = torch.eye(3, 4)
    all_items = prior(_history([-1, 2, -1], (3,), vectors=vectors), queries)
    torch.testing.assert_close(all_items, prior(_history([2], (1,), vectors=vectors[1:2]), queries))
    assert not prior(_history([-1, -1], (2,)), queries).any()
    assert prior(_history([], ()), torch.empty(0, 4)).shape == (0, 3)


@pytest.mark.parametrize("width", [0, 4])
def test_item_weights_and_the_rest_give_the_frequencies(width: int) -> None:
    prior = _prior(width=width)
    numbers = torch.tensor([0.3, 1.0, -0.5, 1.0, -1.0])[: 5 if width else 2]  # with trusts of 1, b = log(r / π)
    vectors = torch.nn.functional.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    history, query = _history([0, 2, -1, 2], (4,), vectors=vectors), torch.eye(1, 4)
    with torch.no_grad():
        weights = prior.item_weights(history, query, numbers=numbers)
        frequencies = prior.usual * prior(history, query, numbers=numbers)[0].exp()
    by_label = torch.stack([weights[0], torch.tensor(0.0), weights[1] + weights[3]])
    torch.testing.assert_close(by_label + (1 - weights.sum()) * prior.usual, frequencies)
    assert weights[2] == 0
    assert (weights[1] != weights[3]) == bool(width)
    assert not torch.equal(prior.item_weights(history, query), weights)


def test_label_prior_parameters_get_gradients() -> None:
    prior = _prior(width=4)
    (-prior(_history([2, 2], (2,)), torch.eye(1, 4))[0, 2]).backward()
    gradients = {name: parameter.grad for name, parameter in prior.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


def test_given_label_becomes_likelier_with_more_trust_and_less_doubt() -> None:
    prior = _prior()
    (-prior(_history([2, 2], (2,)))[0, 2]).backward()
    assert prior.trust.grad is not None
    assert prior.trust.grad < 0
    assert prior.log_doubt.grad is not None
    assert prior.log_doubt.grad > 0


def _tokens_share_a_beginning(choices: list[tuple[int, ...]]) -> bool:
    return len({choice[0] for choice in choices}) < len(choices)


def test_next_token_bias_along_a_label_sums_to_its_bias(toy: CausalLM) -> None:
    choices = toy.prompt_tokenizer.encode_labels(LABELS)
    assert _tokens_share_a_beginning(choices)  # otherwise no bias is distributed
    bias = LabelBias(choices, BIAS)
    sums = []
    for choice in choices:
        parts = []
        for count, token in enumerate(choice):
            tokens, values = bias.next_token_bias(choice[:count])
            parts.append(values[:, tokens.index(token)] if tokens else torch.zeros(2))
        sums.append(torch.stack(parts).sum(dim=0))
    offset = torch.stack(sums, dim=1) - BIAS
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset))  # the same for all labels


def test_first_branch_bias_comes_after_common_prefix() -> None:
    tokens, values = LabelBias([(9, 4, 1), (9, 4, 2)], torch.tensor([[1.0, 3.0]])).first_branch_bias()
    assert tokens == [1, 2]
    assert float(values[0, 1] - values[0, 0]) == pytest.approx(2)


def test_add_to_changes_logits_at_branches_only() -> None:
    bias = LabelBias([(5, 1), (5, 2), (6, 3)], torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]))
    targets = torch.tensor([[IGNORED, 5, 2], [6, 3, IGNORED]])
    added = bias.add_to(torch.zeros(2, 3, 8), targets)
    means = torch.log(torch.tensor([(math.e + math.e**2) / 2, (math.e + math.e**2 + math.e**4) / 3]))
    expected = torch.zeros(2, 3, 8)
    expected[0, 1, 5], expected[0, 1, 6] = means[0] - means[1], 4 - means[1]
    expected[0, 2, 1], expected[0, 2, 2] = 1 - means[0], 2 - means[0]
    torch.testing.assert_close(added, expected)


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_score_and_loss_add_label_bias(toy: CausalLM, placement: str) -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 3, toy.identity.width, generator=draw) * toy.embedding_scale
    bare, prompts = SoftPrompt(vectors, placement), ["which", "a longer question"]
    biased = replace(bare, label_bias=BIAS)
    torch.testing.assert_close(
        toy.score(PromptBatch(prompts, biased), LABELS),
        toy.score(PromptBatch(prompts, bare), LABELS) + BIAS,
        rtol=1e-4,
        atol=1e-4,
    )
    one_token = ("1", "2", "3", "4", "5")  # the normalizer of the loss is known exactly
    scores = toy.score(PromptBatch(prompts, bare), one_token)
    losses, _ = toy.loss(PromptBatch(prompts, biased), ["3", "1"], labels=one_token)
    offset = torch.stack([BIAS[0].exp().mean().log(), BIAS[1].exp().mean().log()])
    shares = scores + BIAS - offset[:, None]
    rest = 1 - scores.exp().sum(dim=1)
    expected = -(shares[[0, 1], [2, 0]] - torch.log(rest + shares.exp().sum(dim=1)))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    free, _ = toy.loss(PromptBatch(prompts, biased), ["3", "1"])  # without a closed set, no bias is added
    torch.testing.assert_close(free, toy.loss(PromptBatch(prompts, bare), ["3", "1"])[0])


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
@pytest.mark.parametrize("family", ["t5", "gpt2", "gemma"])
def test_score_and_loss_of_other_families_add_label_bias(family: str, placement: str) -> None:
    llm = small_llm(family)
    draw = torch.Generator().manual_seed(0)
    soft = SoftPrompt(torch.randn(2, 3, llm.identity.width, generator=draw), placement)
    biased = replace(soft, label_bias=BIAS)
    prompts = ["which", "a longer question"]
    scores = llm.score(PromptBatch(prompts, soft), LABELS)
    torch.testing.assert_close(llm.score(PromptBatch(prompts, biased), LABELS), scores + BIAS, rtol=1e-4, atol=1e-4)
    losses, bare = (llm.loss(PromptBatch(prompts, one), [LABELS[2]] * 2, labels=LABELS)[0] for one in (biased, soft))
    assert losses[0] < bare[0]  # a positive bias makes a label more likely
    assert losses[1] > bare[1]


def test_add_to_half_precision_logits_keeps_small_bias() -> None:
    logits = torch.full((1, 1, 8), 40.0, dtype=torch.bfloat16, requires_grad=True)
    added = LabelBias([(1,), (2,)], torch.tensor([[0.05, -0.05]])).add_to(logits, torch.tensor([[1]]))
    assert float(added[0, 0, 1] - added[0, 0, 2]) == pytest.approx(0.1, abs=1e-5)
    (gradient,) = torch.autograd.grad(added[0, 0, 1], logits)
    assert gradient[0, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_continuous_batch_chooses_with_label_bias(toy: CausalLM) -> None:
    choices, vectors = toy.prompt_tokenizer.encode_labels(LABELS), torch.zeros(1, 1, toy.identity.width)
    for sampled in (False, True):
        for place, label in enumerate(LABELS):
            decisive_bias = torch.full((1, len(LABELS)), -60.0).index_fill(1, torch.tensor(place), 0.0)
            config = GenerationConfig(max_new_tokens=20, do_sample=sampled, temperature=1.0, seed=place)
            slot = Slot(
                toy.prompt_tokenizer.encode_prompt("which"),
                SoftPrompt(vectors, "suffix", label_bias=decisive_bias),
                config,
                choices,
            )
            batch = ContinuousBatch(toy)
            batch.add([slot])
            while slot.ended is None:
                batch.step()
            assert toy.prompt_tokenizer.decode(slot.ids) == label


def test_soft_prompt_cat_concatenates_label_bias() -> None:
    vectors = torch.zeros(1, 2, 4)
    both = SoftPrompt.cat([SoftPrompt(vectors, "suffix", label_bias=row[None]) for row in BIAS])
    assert both.vectors.shape == (2, 2, 4)
    assert both.placement == "suffix"
    assert both.label_bias is not None
    torch.testing.assert_close(both.label_bias, BIAS)
    assert SoftPrompt.cat([SoftPrompt(vectors)]).label_bias is None
