"""A copy head: its mixture, its states from the frozen model, and where it can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_families
import pytest
import torch
from families import small_llm
from torch import Tensor

from personaplug.errors import ConfigError, DamagedFile
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copied_answers import MAX_ANSWERS, check_model, copy_source, read_answers
from personaplug.llm.copy_head import CopyHead, Copying, CopyInputs, CopySource, copy_layer
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["what comes next", "and what is this one called"]
ANSWERS = ["Why Music, Part 2", "other"]
WIDTH, VOCABULARY = 12, 9


def _soft(llm: CausalLM, placement: str = "suffix") -> SoftPrompt:
    noise = torch.randn(len(PROMPTS), 2, llm.identity.width, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(noise * llm.embedding_scale, placement=placement)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _head(*, gate: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> CopyHead:
    head = CopyHead(WIDTH, layer=0)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor(gate))
    return head


def _eager(llm: CausalLM) -> CopyHead:
    """Return a head for a model that mostly copies the user's answers."""
    head = llm.new_copy_head(seed=0)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor([0.0, -3.0, 6.0]))
    return head


def test_mix_equals_the_formula() -> None:
    head, logits, state = _head(), _random(VOCABULARY, seed=1), _random(WIDTH, seed=2)
    prompt = head.prompt.source(_random(3, WIDTH, seed=3), torch.tensor([4, 5, 4]))
    own = head.own.source(_random(2, WIDTH, seed=4), torch.tensor([7, 4]))
    mixed = head.mix(logits[None], state[None], prompts=[prompt], own=[own])[0].exp()
    a, b = head.prompt.weights(state[None], prompt)[0], head.own.weights(state[None], own)[0]
    expected = torch.softmax(logits, dim=0)
    expected[4] += a[0] + a[2] + b[1]
    expected[5] += a[1]
    expected[7] += b[0]
    torch.testing.assert_close(mixed, expected / 3)  # the gate's shares are equal
    assert float(mixed.sum()) == pytest.approx(1)


def test_losses_equal_mix() -> None:
    head, logits, states = _head(gate=(0.0, -1.0, 0.5)), _random(4, VOCABULARY, seed=1), _random(4, WIDTH, seed=2)
    targets, prompt_states, tokens = torch.tensor([4, 0, 7, 7]), _random(3, WIDTH, seed=3), torch.tensor([4, 5, 4])
    own = head.own.source(_random(2, WIDTH, seed=4), torch.tensor([7, 4]))
    losses = -torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
    actual = head.losses(CopyInputs(losses, states, targets, prompt_states, tokens), own)
    prompt = head.prompt.source(prompt_states, tokens)
    mixed = head.mix(logits, states, prompts=[prompt] * 4, own=[own] * 4)
    torch.testing.assert_close(actual, -mixed.gather(1, targets[:, None])[:, 0])


def test_user_without_answers_gives_no_share_to_them() -> None:
    head, logits, state = _head(gate=(0.0, -50.0, 50.0)), _random(VOCABULARY, seed=1), _random(WIDTH, seed=2)
    prompt = head.prompt.source(_random(3, WIDTH, seed=3), torch.tensor([4, 5, 4]))
    mixed = head.mix(logits[None], state[None], prompts=[prompt], own=[CopySource.cat([])])[0]
    torch.testing.assert_close(mixed, torch.log_softmax(logits, dim=0))


def test_forbidden_token_stays_forbidden() -> None:
    head, logits = _head(), _random(VOCABULARY, seed=1)
    logits[4] = -torch.inf
    prompt = head.prompt.source(_random(3, WIDTH, seed=3), torch.tensor([4, 5, 4]))
    mixed = head.mix(logits[None], _random(1, WIDTH, seed=2), prompts=[prompt], own=[CopySource.cat([])])[0]
    assert mixed[4] == -torch.inf


def test_compressed_source_has_nearly_the_same_weights() -> None:
    head, states = _head(), _random(5, WIDTH, seed=2)
    source = head.own.source(_random(40, WIDTH, seed=3), torch.arange(40))
    small = CopySource.cat([source.compressed()])
    assert small.nbytes == 40 * (64 + 4)
    torch.testing.assert_close(head.own.weights(states, small), head.own.weights(states, source), atol=0.03, rtol=0)


@pytest.mark.parametrize(("layers", "layer"), [(1, 0), (2, 1), (3, 2), (30, 20)])
def test_copy_layer_is_at_two_thirds_of_the_depth(layers: int, layer: int) -> None:
    assert copy_layer(layers) == layer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_are_the_values_of_the_whole_text(kind: str) -> None:
    llm: Any = small_llm(kind)
    soft, layer = _soft(llm), copy_layer(len(llm.prompt_layout.values))
    targets = llm.prompt_tokenizer.encode_targets(ANSWERS)
    rows = llm.cached_prefix.copy_inputs(PromptBatch(PROMPTS, soft), targets, layer=layer)
    for index, (inputs, ids) in enumerate(zip(rows, targets, strict=True)):
        prompt = llm.prompt_tokenizer.encode_prompt(PROMPTS[index]).ids
        embeds = torch.cat([llm.spell(prompt), soft.row(index).vectors, llm.spell(ids)], dim=1)
        states, _ = llm.prefill(embeds, torch.ones(embeds.shape[:2], dtype=torch.int64))
        values = states[0].blocks[0][2 * layer + 1].transpose(0, 1).flatten(1)
        start = len(prompt) + soft.tokens - 1
        torch.testing.assert_close(inputs.states, values[start : start + len(ids)], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(inputs.prompt_states, values[: len(prompt) - 1], atol=1e-4, rtol=1e-4)
        assert inputs.prompt_tokens.tolist() == list(prompt[1:])
        assert inputs.targets.tolist() == list(ids)
        loss, _ = llm.loss(PromptBatch([PROMPTS[index]], soft.row(index)), [ANSWERS[index]])
        assert float(inputs.losses.sum()) == pytest.approx(float(loss), rel=1e-4)


def test_read_answer_has_the_state_before_each_token() -> None:
    llm: Any = small_llm("llama")
    layer, head = 1, llm.prompt_tokenizer.encode_prompt("").ids
    first, second, again = read_answers(llm, ["Why Music, Part 2", "On tea", "Why Music, Part 2"], layer=layer)
    ids = llm.prompt_tokenizer.encode_target("On tea")
    assert second.tokens.tolist() == list(ids)
    states = llm.compute_whole_prompts([head + ids])[0].blocks[0][2 * layer + 1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(second.states, states[len(head) - 1 : -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(first.states, again.states)


def test_only_the_latest_answers_are_read(toy: CausalLM) -> None:
    head = toy.new_copy_head(seed=0)
    texts = [f"answer {number}" for number in range(MAX_ANSWERS + 3)]
    latest = copy_source(toy, head, texts[3:])
    assert torch.equal(copy_source(toy, head, texts).tokens, latest.tokens)
    assert len(copy_source(toy, head, [])) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_past_answer_is_likelier_with_a_copy_head(kind: str) -> None:
    llm: Any = small_llm(kind)
    head, soft = _eager(llm), _soft(llm)
    copying = Copying(head, [copy_source(llm, head, [ANSWERS[0]]), copy_source(llm, head, [])])
    head.requires_grad_(False)
    plain, _ = llm.loss(PromptBatch(PROMPTS, soft), ANSWERS)
    mixed, tokens = llm.loss(PromptBatch(PROMPTS, soft, copying=copying), ANSWERS)
    assert float(mixed[0]) < float(plain[0])
    assert tokens.tolist() == [len(llm.prompt_tokenizer.encode_target(target)) for target in ANSWERS]


def test_rows_of_a_batch_copy_from_their_own_user(toy: CausalLM) -> None:
    head, soft, config = _eager(toy), _soft(toy), GenerationConfig(max_new_tokens=12)
    own = [copy_source(toy, head, [answer]) for answer in ANSWERS]
    both = toy.generate(PromptBatch(PROMPTS, soft, copying=Copying(head, own)), config)
    for index, prompt in enumerate(PROMPTS):
        alone = PromptBatch([prompt], soft.row(index), copying=Copying(head, [own[index]]))
        assert toy.generate(alone, config)[0].text == both[index].text
    batch = PromptBatch(PROMPTS, soft, copying=Copying(head, own)).take([1, 0, 0])
    assert [output.text for output in toy.generate(batch, config)] == [both[row].text for row in (1, 0, 0)]


@pytest.mark.parametrize("beams", [1, 2])
def test_copy_head_refuses_other_placements_and_beams(toy: CausalLM, beams: int) -> None:
    head = toy.new_copy_head(seed=0)
    copying, soft = Copying(head, [CopySource.cat([])] * 2), _soft(toy, "prefix" if beams == 1 else "suffix")
    with pytest.raises(ConfigError, match="placement=suffix, num_beams=1"):
        toy.generate(PromptBatch(PROMPTS, soft, copying=copying), GenerationConfig(num_beams=beams))


def test_saved_head_is_the_same(toy: CausalLM, tmp_path: Path) -> None:
    head = toy.new_copy_head(seed=3)
    head.save(tmp_path)
    loaded = toy.load_copy_head(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in head.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_head_of_another_model_is_refused(toy: CausalLM, tmp_path: Path) -> None:
    CopyHead(WIDTH, layer=0).save(tmp_path)
    with pytest.raises(DamagedFile):
        toy.load_copy_head(tmp_path)


def test_model_without_attention_has_no_copy_head() -> None:
    if "mamba2" not in model_families.CAUSAL:
        pytest.skip("this version of transformers has no mamba2")
    llm = model_families.load("mamba2", is_encoder_decoder=False)
    assert llm.prompt_layout is not None
    with pytest.raises(ConfigError, match="needs a decoder-only model with a prompt cache and attention layers"):
        check_model(llm)


@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma4_text", "deepseek_v3"])
def test_copy_head_reads_an_attention_layer_of_any_cache(family: str) -> None:
    if family not in model_families.CAUSAL:
        pytest.skip(f"this version of transformers has no {family}")
    llm = check_model(model_families.load(family, is_encoder_decoder=False))
    head, targets = llm.new_copy_head(seed=0), llm.prompt_tokenizer.encode_targets(ANSWERS)
    own = [copy_source(llm, head, ["Why Music, Part 2"]) for _ in PROMPTS]
    batch = PromptBatch(PROMPTS, _soft(llm), copying=Copying(head, own))
    together, _ = llm.cached_prefix.target_loss(batch, targets)
    alone = [llm.cached_prefix.target_loss(row, [ids])[0] for row, ids in zip(batch.rows(), targets, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
