"""Placement `suffix`: losses and gradients after cached prompts equal those of one sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS, small_llm, small_mamba
from torch import Tensor

from personaplug.config import PAPER
from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.padding import common_prefix
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.training.objectives import PlugObjective

PROMPTS = ["a question that is longer than any sliding window here", "?", "middling text"]
TARGETS = ["yes indeed", "n", "ok"]


def _vectors(llm: Any, *, rows: int = 3, tokens: int = 2, seed: int = 1) -> Tensor:
    width: int = llm.identity.width
    noise = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))
    scale: float = llm.embedding_scale
    return (noise * scale).requires_grad_()


def _one_sequence(llm: Any, vectors: Tensor, *, prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Return losses and gradient of prompt, soft tokens and answer as one sequence of embeddings, row by row."""
    losses = []
    for row, (prompt, target) in enumerate(zip(prompts or PROMPTS, TARGETS, strict=True)):
        ids, answer = llm.prompt_tokenizer.encode_prompt(prompt).ids, llm.prompt_tokenizer.encode_target(target)
        rows = [llm.embed(torch.tensor([ids])), vectors[row : row + 1], llm.embed(torch.tensor([answer]))]
        logits = llm.model(inputs_embeds=torch.cat(rows, dim=1)).logits[0, -len(answer) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum"))
    together = torch.stack(losses)
    return together.detach(), torch.autograd.grad(together.sum(), vectors)[0]


def _cached(llm: Any, vectors: Tensor, *, prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:
    losses, tokens = llm.loss(PromptBatch(prompts or PROMPTS, SoftPrompt(vectors, placement="suffix")), TARGETS)
    assert tokens.tolist() == [len(llm.prompt_tokenizer.encode_target(target)) for target in TARGETS]
    return losses.detach(), torch.autograd.grad(losses.sum(), vectors)[0]


def _assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], *, within: float = 1e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < within


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_suffix_loss_and_gradient_equal_one_sequence(family: str, chat: bool) -> None:
    llm = small_llm(family, chat=chat)
    vectors = _vectors(llm)
    assert llm.supports_prompt_cache
    expected = _one_sequence(llm, vectors)
    _assert_close(_cached(llm, vectors), expected)
    llm.cache_prompts(PROMPTS)
    _assert_close(_cached(llm, vectors), expected)
    llm.prompt_layout = None  # as in unsupported families
    _assert_close(_cached(llm, vectors), expected)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_suffix_loss_in_bfloat16_equals_one_sequence_within_rounding(family: str) -> None:
    llm = small_llm(family, dtype=torch.bfloat16)
    vectors = _vectors(llm)
    llm.cache_prompts(PROMPTS)
    cached = _cached(llm, vectors)
    llm.prompt_layout = None
    _assert_close(cached, _cached(llm, vectors), within=0.05)


def test_suffix_loss_saves_no_prompt_activations() -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(_vectors(llm), placement="suffix")
    sizes: list[int] = []

    def record_size(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record_size, lambda saved: saved):
        llm.loss(PromptBatch(PROMPTS, soft), TARGETS)
        short = sum(sizes)
        sizes.clear()
        llm.loss(PromptBatch([4 * prompt for prompt in PROMPTS], soft), TARGETS)
    # Only keys and values grow with the prompt; the tensors saved for the backward pass hardly grow.
    assert sum(sizes) < 2 * short


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("labels", [["1", "2", "5"], ["war", "war film", "comedy", "x"]])
@pytest.mark.parametrize("cached", [False, True])
def test_suffix_score_equals_negative_loss_of_each_label(family: str, labels: list[str], cached: bool) -> None:
    llm = small_llm(family)
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    if cached:
        llm.cache_prompts(PROMPTS)
    actual = llm.score(PromptBatch(PROMPTS, soft), labels)
    for column, label in enumerate(labels):
        losses, _ = llm.loss(PromptBatch(PROMPTS, soft), [label] * 3, labels=labels)
        torch.testing.assert_close(actual[:, column], -losses, atol=1e-4, rtol=1e-4)
    llm.prompt_layout = None
    torch.testing.assert_close(actual, llm.score(PromptBatch(PROMPTS, soft), labels), atol=1e-4, rtol=1e-4)


def test_suffix_score_does_not_depend_on_the_number_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    labels = ["1", "one two", "3", "three four five", "black & white"]
    at_once = llm.score(PromptBatch(PROMPTS, soft), labels)
    monkeypatch.setattr("personaplug.llm.cached_prefix._LABEL_LOGITS", 1)
    torch.testing.assert_close(llm.score(PromptBatch(PROMPTS, soft), labels), at_once, atol=1e-4, rtol=1e-4)


def test_loss_of_labels_has_end_token_only_if_one_is_a_prefix_of_another() -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    _, tokens = llm.loss(PromptBatch(PROMPTS, soft), ["1", "2", "1"], labels=["1", "2"])
    assert tokens.tolist() == [1, 1, 1]
    _, tokens = llm.loss(PromptBatch(PROMPTS, soft), ["1", "12", "1"], labels=["1", "12"])
    assert tokens.tolist() == [2, 3, 2]
    _, tokens = llm.loss(PromptBatch(PROMPTS, soft), ["1", "3", "1"], labels=["1", "2"])
    assert tokens.tolist() == [1, 2, 1]  # "3" is not a label, so it is free text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_suffix_generation_equals_greedy_decoding_by_transformers(family: str) -> None:
    llm = small_llm(family)
    vectors = _vectors(llm).detach()
    config = GenerationConfig(max_new_tokens=5)
    actual = llm.generate(PromptBatch(PROMPTS, SoftPrompt(vectors, placement="suffix")), config)
    for row, prompt in enumerate(PROMPTS):
        ids: list[int] = []
        while len(ids) < 5 and llm.prompt_tokenizer.tokenizer.eos_token_id not in ids:
            before = llm.embed(torch.tensor([llm.prompt_tokenizer.encode_prompt(prompt).ids]))
            rows = torch.cat([before, vectors[row : row + 1], llm.embed(torch.tensor([ids], dtype=torch.long))], 1)
            ids.append(int(llm.model(inputs_embeds=rows).logits[0, -1].argmax()))
        assert actual[row].text == llm.prompt_tokenizer.decode(ids)


def test_suffix_ignores_soft_at() -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    plain = llm.loss(PromptBatch(PROMPTS, soft), TARGETS)[0]
    assert torch.equal(plain, llm.loss(PromptBatch(PROMPTS, soft, [3, 1, 2]), TARGETS)[0])


def test_cache_prompts_beyond_limit_recomputes_the_rest() -> None:
    llm = small_llm("llama")
    vectors = _vectors(llm)
    expected = _one_sequence(llm, vectors)
    layout = llm.prompt_layout
    # The longest prompt does not fit, the others do.
    llm.prompt_states.location, llm.prompt_states.limit = "memory", (len(PROMPTS[2]) + 3) * layout.token_bytes
    llm.cache_prompts(PROMPTS)
    assert len(llm.prompt_states.cache.states) == 2
    _assert_close(_cached(llm, vectors), expected)
    llm.prompt_states.location = "nowhere"
    llm.clear_cache()
    llm.cache_prompts(PROMPTS)
    assert llm.prompt_states.cache is None
    _assert_close(_cached(llm, vectors), expected)


def test_cache_prompts_on_disk_equals_in_memory() -> None:
    llm = small_llm("llama")
    vectors = _vectors(llm)
    llm.cache_prompts(PROMPTS)
    in_memory = _cached(llm, vectors)
    llm.clear_cache()
    llm.prompt_states.location = "disk"
    llm.cache_prompts(PROMPTS)
    assert llm.prompt_states.cache.plan.location == "disk"
    _assert_close(_cached(llm, vectors), in_memory, within=1e-9)


def test_cache_prompts_twice_computes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")
    llm.cache_prompts(PROMPTS)
    monkeypatch.setattr(llm.prompt_states, "compute", lambda _: pytest.fail("computed again"))
    llm.cache_prompts(PROMPTS[:2])
    views = 2 * PROMPTS
    llm.loss(PromptBatch(views, SoftPrompt(_vectors(llm, rows=6), placement="suffix")), 2 * TARGETS)


def test_live_lengths_without_prompt_cache_count_whole_prompt(tmp_path: Path) -> None:
    slow = small_mamba()
    encoder = HashEncoder(16)
    sample = EncodedSample(
        "1",
        "u",
        "u",
        "a prompt " * 20,
        "query",
        "yes",
        np.zeros(0, np.int64),
        np.zeros(0, np.int16),
        no_style(),
        all_answers(),
    )
    for llm in (small_llm("llama"), slow):
        spec = PlugSpec(llm.identity, llm.embedding_scale, encoder.identity)
        plug = PersonaPlug(replace(PAPER, placement="suffix", query_encoder="head"), spec=spec, encoder=encoder)
        objective = PlugObjective(plug, llm, table=EmbeddingStore.open(tmp_path / llm.identity.name, encoder))
        assert (objective.live_lengths([sample])[0] > 100) == (llm is slow)


def test_empty_batch_has_no_scores_and_no_responses() -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(_vectors(llm)[:0].detach(), placement="suffix")
    assert llm.score(PromptBatch([], soft), ["a", "b"]).shape == (0, 2)
    assert llm.generate(PromptBatch([], soft), GenerationConfig()) == []


def test_cache_prompts_replaces_earlier_prompts_and_clear_cache_drops_all() -> None:
    llm = small_llm("llama")
    llm.cache_prompts(PROMPTS)
    cache = llm.prompt_states.cache
    llm.cache_prompts(PROMPTS)
    assert llm.prompt_states.cache is cache
    llm.cache_prompts(["others"])
    assert len(llm.prompt_states.cache.states) == 1
    llm.clear_cache()
    assert llm.prompt_states.cache is None


def test_seq2seq_suffix_soft_tokens_come_first_in_decoder() -> None:
    llm = small_llm("t5")
    vectors = _vectors(llm)
    losses = []
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        answer = llm.prompt_tokenizer.encode_target(target)
        start = [llm.model.config.decoder_start_token_id, *answer[:-1]]
        read = torch.cat([vectors[row : row + 1], llm.embed(torch.tensor([start]))], dim=1)
        ids = torch.tensor([llm.prompt_tokenizer.encode_prompt(prompt).ids])
        logits = llm.model(input_ids=ids, decoder_inputs_embeds=read).logits[0, vectors.shape[1] :]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    together = torch.stack(losses)
    expected = together.detach(), torch.autograd.grad(together.sum(), vectors)[0]
    _assert_close(_cached(llm, vectors), expected)
    llm.cache_prompts(PROMPTS)
    assert len(llm.prompt_states.cache.states) == 3
    _assert_close(_cached(llm, vectors), expected)
    soft = SoftPrompt(vectors.detach(), placement="suffix")
    scores = llm.score(PromptBatch(PROMPTS, soft), ["ok", "n"])
    for column, label in enumerate(["ok", "n"]):
        losses_of, _ = llm.loss(PromptBatch(PROMPTS, soft), [label] * 3, labels=["ok", "n"])
        torch.testing.assert_close(scores[:, column], -losses_of)


@pytest.mark.parametrize("beams", [1, 3])
def test_seq2seq_suffix_generation_equals_greedy_decoding_by_transformers(beams: int) -> None:
    llm = small_llm("t5")
    config = GenerationConfig(max_new_tokens=6, num_beams=beams)
    seen = set()
    for seed in range(6):
        vectors = 3 * _vectors(llm, seed=seed).detach()
        actual = llm.generate(PromptBatch(PROMPTS, SoftPrompt(vectors, placement="suffix")), config)
        for row, prompt in enumerate(PROMPTS):
            alone = SoftPrompt(vectors[row : row + 1], placement="suffix")
            assert llm.generate(PromptBatch([prompt], alone), config)[0].text == actual[row].text
            if beams == 1:
                assert actual[row].text == _greedy(llm, prompt, vectors[row : row + 1])
            seen.add(actual[row].text)
    assert len(seen) > 2  # the soft tokens matter


def _greedy(llm: Any, prompt: str, vectors: Tensor) -> str:
    ids: list[int] = []
    start, end = llm.model.config.decoder_start_token_id, llm.prompt_tokenizer.tokenizer.eos_token_id
    while len(ids) < 6 and end not in ids:
        read = torch.cat([vectors, llm.embed(torch.tensor([[start, *ids]]))], dim=1)
        encoder = torch.tensor([llm.prompt_tokenizer.encode_prompt(prompt).ids])
        ids.append(int(llm.model(input_ids=encoder, decoder_inputs_embeds=read).logits[0, -1].argmax()))
    return str(llm.prompt_tokenizer.decode(ids[: ids.index(end)] if end in ids else ids))


@pytest.mark.parametrize("family", DECODERS)
def test_states_of_prompts_with_a_common_prefix_equal_those_of_each_prompt(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_llm(family, chat=True)
    texts = [f"name the best film about {rest}" for rest in ("trains and a long war at sea", "a cat", "two old maps")]
    prompts = [llm.prompt_tokenizer.encode_prompt(text).ids for text in texts]
    expected = [llm.compute_prompt_states([ids])[0] for ids in prompts]
    monkeypatch.setattr("personaplug.llm.causal_lm._MIN_SHARED_TOKENS", 1)
    in_full, rows = llm.compute_whole_prompts, list[int]()

    def recording(some: list[tuple[int, ...]]) -> list[Tensor]:
        rows.append(len(some))
        states: list[Tensor] = in_full(some)
        return states

    monkeypatch.setattr(llm, "compute_whole_prompts", recording)
    states = llm.compute_prompt_states(prompts)
    assert rows == [1]
    for ids, own_state, full_state in zip(prompts, states, expected, strict=True):
        own, full = own_state.blocks[0], full_state.blocks[0]
        assert own.shape == full.shape
        assert full.shape[2] == len(ids) == own_state.tokens
        assert float((own - full).norm() / full.norm()) < 1e-5


def test_prompts_are_cached_if_the_check_of_a_model_meets_a_common_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.llm.causal_lm._MIN_SHARED_TOKENS", 1)  # as with a long head of a chat template
    assert small_llm("llama", chat=True).supports_prompt_cache


def test_common_prefix_leaves_a_token_of_each_row() -> None:
    assert common_prefix([(1, 2, 3, 4), (1, 2, 9), (1, 2, 3, 5)]) == (1, 2)
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == (1,)
    assert common_prefix([(5,), (5, 6)]) == ()
    assert common_prefix([(1, 2), (3, 4)]) == ()
