"""Soft tokens right before the answer: read apart from the prompt, they give the losses and gradients of the whole."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS, small_backend
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from personaplug.config import PAPER
from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, no_style
from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import tiny_tokenizer
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.training.objectives import PlugObjective

PROMPTS = ["a question that is longer than any sliding window here", "?", "middling text"]
TARGETS = ["yes indeed", "n", "ok"]


def _vectors(llm: Any, *, rows: int = 3, tokens: int = 2, seed: int = 1) -> Tensor:
    width: int = llm.identity.width
    drawn = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))
    scale: float = llm.embedding_scale
    return (drawn * scale).requires_grad_()


def _whole(llm: Any, vectors: Tensor, *, prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Losses and gradient with prompt, soft tokens and answer as plain rows of embeddings, one by one."""
    losses = []
    for row, (prompt, target) in enumerate(zip(prompts or PROMPTS, TARGETS, strict=True)):
        ids, answer = llm.prompt_tokenizer.prompt(prompt).ids, llm.prompt_tokenizer.answer(target)
        rows = [llm.embed(torch.tensor([ids])), vectors[row : row + 1], llm.embed(torch.tensor([answer]))]
        logits = llm.model(inputs_embeds=torch.cat(rows, dim=1)).logits[0, -len(answer) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum"))
    together = torch.stack(losses)
    return together.detach(), torch.autograd.grad(together.sum(), vectors)[0]


def _apart(llm: Any, vectors: Tensor, *, prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:
    losses, tokens = llm.loss(prompts or PROMPTS, TARGETS, soft=SoftPrompt(vectors, placement="suffix"))
    assert tokens.tolist() == [len(llm.prompt_tokenizer.answer(target)) for target in TARGETS]
    return losses.detach(), torch.autograd.grad(losses.sum(), vectors)[0]


def _close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], *, within: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < within


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradient_are_those_of_one_pass_over_everything(family: str, side: str, chat: bool) -> None:
    llm = small_backend(family, padding_side=side, chat=chat)
    vectors = _vectors(llm)
    assert llm._layout() is not None  # no family here falls back
    wanted = _whole(llm, vectors)
    _close(_apart(llm, vectors), wanted)
    llm.keep(PROMPTS)
    _close(_apart(llm, vectors), wanted)
    llm._tried, llm._found = True, None  # the way of families that cannot
    _close(_apart(llm, vectors), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_in_bfloat16_it_agrees_within_its_rounding(family: str) -> None:
    llm = small_backend(family)
    llm.model.to(torch.bfloat16)
    vectors = _vectors(llm)
    llm.keep(PROMPTS)
    apart = _apart(llm, vectors)
    llm._found = None
    _close(apart, _apart(llm, vectors), within=0.05)


def test_no_gradient_is_computed_for_the_prompt() -> None:
    llm = small_backend("llama")
    soft = SoftPrompt(_vectors(llm), placement="suffix")
    sizes: list[int] = []

    def noted(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda saved: saved):
        llm.loss(PROMPTS, TARGETS, soft=soft)
        short = sum(sizes)
        sizes.clear()
        llm.loss([4 * prompt for prompt in PROMPTS], TARGETS, soft=soft)
    # Only keys and values grow with the prompt: what is saved for the backward pass hardly does.
    assert sum(sizes) < 2 * short


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("labels", [["1", "2", "5"], ["war", "war film", "comedy", "x"]])
@pytest.mark.parametrize("kept", [False, True])
def test_scores_are_the_losses_of_the_labels(family: str, labels: list[str], kept: bool) -> None:
    llm = small_backend(family)
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    if kept:
        llm.keep(PROMPTS)
    found = llm.score(PROMPTS, labels, soft=soft)
    for column, label in enumerate(labels):
        losses, _ = llm.loss(PROMPTS, [label] * 3, soft=soft, labels=labels)
        torch.testing.assert_close(found[:, column], -losses, atol=1e-4, rtol=1e-4)
    llm._found = None
    torch.testing.assert_close(found, llm.score(PROMPTS, labels, soft=soft), atol=1e-4, rtol=1e-4)


def test_large_sets_of_labels_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_backend("llama")
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    labels = ["1", "one two", "3", "three four five", "black & white"]
    at_once = llm.score(PROMPTS, labels, soft=soft)
    monkeypatch.setattr("personaplug.llm.causal_lm._LOGITS", 1)
    torch.testing.assert_close(llm.score(PROMPTS, labels, soft=soft), at_once, atol=1e-4, rtol=1e-4)


def test_labels_that_cannot_be_confused_are_trained_without_an_end() -> None:
    llm = small_backend("llama")
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    _, tokens = llm.loss(PROMPTS, ["1", "2", "1"], soft=soft, labels=["1", "2"])
    assert tokens.tolist() == [1, 1, 1]
    _, tokens = llm.loss(PROMPTS, ["1", "12", "1"], soft=soft, labels=["1", "12"])
    assert tokens.tolist() == [2, 3, 2]
    _, tokens = llm.loss(PROMPTS, ["1", "3", "1"], soft=soft, labels=["1", "2"])
    assert tokens.tolist() == [1, 2, 1]  # what is no label is open text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_is_generated_behind_prompt_and_soft_tokens(family: str) -> None:
    llm = small_backend(family)
    vectors = _vectors(llm).detach()
    config = GenerationConfig(max_new_tokens=5)
    found = llm.generate(PROMPTS, soft=SoftPrompt(vectors, placement="suffix"), config=config)
    for row, prompt in enumerate(PROMPTS):
        ids: list[int] = []
        while len(ids) < 5 and llm.prompt_tokenizer.tokenizer.eos_token_id not in ids:
            before = llm.embed(torch.tensor([llm.prompt_tokenizer.prompt(prompt).ids]))
            rows = torch.cat([before, vectors[row : row + 1], llm.embed(torch.tensor([ids], dtype=torch.long))], 1)
            ids.append(int(llm.model(inputs_embeds=rows).logits[0, -1].argmax()))
        assert found[row].text == llm.prompt_tokenizer.decode(ids)


def test_a_place_in_the_text_is_of_no_matter_behind_it() -> None:
    llm = small_backend("llama")
    soft = SoftPrompt(_vectors(llm).detach(), placement="suffix")
    plain = llm.loss(PROMPTS, TARGETS, soft=soft)[0]
    assert torch.equal(plain, llm.loss(PROMPTS, TARGETS, soft=soft, soft_at=[3, 1, 2])[0])


def test_prompts_that_find_no_room_are_read_anew() -> None:
    llm = small_backend("llama")
    vectors = _vectors(llm)
    wanted = _whole(llm, vectors)
    layout = llm._layout()
    llm._keeping = ("memory", (len(PROMPTS[2]) + 3) * layout.bytes)  # the longest does not fit, the others do
    llm.keep(PROMPTS)
    assert len(llm._kept) == 2
    _close(_apart(llm, vectors), wanted)
    llm._keeping = ("nowhere", 0)
    llm.clear_cache()
    llm.keep(PROMPTS)
    assert llm._kept is None
    _close(_apart(llm, vectors), wanted)


def test_prompts_kept_on_disk_are_the_same() -> None:
    llm = small_backend("llama")
    vectors = _vectors(llm)
    llm.keep(PROMPTS)
    in_memory = _apart(llm, vectors)
    llm.clear_cache()
    llm._keeping = ("disk", 0)
    llm.keep(PROMPTS)
    assert llm._kept.room.place == "disk"
    _close(_apart(llm, vectors), in_memory, within=1e-9)


def test_kept_prompts_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_backend("llama")
    llm.keep(PROMPTS)
    monkeypatch.setattr(llm, "_read", lambda rows: pytest.fail("read again") if rows else [])
    llm.keep(PROMPTS[:2])
    views = 2 * PROMPTS
    llm.loss(views, 2 * TARGETS, soft=SoftPrompt(_vectors(llm, rows=6), placement="suffix"))


def test_a_family_without_keys_and_values_says_so_and_takes_the_slow_way(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    llm = CausalLM(MambaForCausalLM(shape), tokenizer, name="mamba")
    vectors = _vectors(llm)
    with caplog.at_level(logging.WARNING):
        llm.keep(PROMPTS)
        losses, gradient = _apart(llm, vectors, prompts=["same size"] * 3)
    assert "mamba cannot reuse its prompts" in caplog.text
    assert torch.isfinite(losses).all()
    assert gradient.abs().sum() > 0
    _close((losses, gradient), _whole(llm, vectors, prompts=["same size"] * 3))


def test_a_pass_is_bounded_by_what_a_family_really_runs(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    shape = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    slow = CausalLM(MambaForCausalLM(shape), tokenizer, name="mamba")
    encoder = HashEncoder(16)
    sample = EncodedSample(
        "1", "u", "u", "a prompt " * 20, "query", "yes", np.zeros(0, np.int64), np.zeros(0, np.int16), no_style()
    )
    for llm in (small_backend("llama"), slow):
        spec = PlugSpec(llm.identity, llm.embedding_scale, encoder.identity)
        plug = PersonaPlug(replace(PAPER, placement="suffix", query_encoder="head"), spec=spec, encoder=encoder)
        objective = PlugObjective(plug, llm, table=EmbeddingStore.open(tmp_path / llm.identity.name, encoder))
        assert (objective.live_lengths([sample])[0] > 100) == (llm is slow)


def test_no_prompts_have_no_scores() -> None:
    llm = small_backend("llama")
    soft = SoftPrompt(_vectors(llm)[:0].detach(), placement="suffix")
    assert llm.score([], ["a", "b"], soft=soft).shape == (0, 2)


def test_kept_prompts_are_let_go() -> None:
    llm = small_backend("llama")
    llm.keep(PROMPTS)
    kept = llm._kept
    llm.keep(PROMPTS)
    assert llm._kept is kept  # asked for again, nothing is done
    llm.keep(["others"])
    assert len(llm._kept) == 1
    llm.clear_cache()
    assert llm._kept is None


def test_an_encoder_decoder_reads_soft_tokens_on_the_decoders_side() -> None:
    llm = small_backend("t5")
    vectors = _vectors(llm)
    losses = []
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        answer = llm.prompt_tokenizer.answer(target)
        start = [llm.model.config.decoder_start_token_id, *answer[:-1]]
        read = torch.cat([vectors[row : row + 1], llm.embed(torch.tensor([start]))], dim=1)
        ids = torch.tensor([llm.prompt_tokenizer.prompt(prompt).ids])
        logits = llm.model(input_ids=ids, decoder_inputs_embeds=read).logits[0, vectors.shape[1] :]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    together = torch.stack(losses)
    wanted = together.detach(), torch.autograd.grad(together.sum(), vectors)[0]
    _close(_apart(llm, vectors), wanted)
    llm.keep(PROMPTS)
    assert len(llm._kept) == 3
    _close(_apart(llm, vectors), wanted)
    soft = SoftPrompt(vectors.detach(), placement="suffix")
    scores = llm.score(PROMPTS, ["ok", "n"], soft=soft)
    for column, label in enumerate(["ok", "n"]):
        losses_of, _ = llm.loss(PROMPTS, [label] * 3, soft=soft, labels=["ok", "n"])
        torch.testing.assert_close(scores[:, column], -losses_of)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_generates_behind_them(beams: int) -> None:
    llm = small_backend("t5")
    config = GenerationConfig(max_new_tokens=6, num_beams=beams)
    seen = set()
    for seed in range(6):
        vectors = 3 * _vectors(llm, seed=seed).detach()
        found = llm.generate(PROMPTS, soft=SoftPrompt(vectors, placement="suffix"), config=config)
        for row, prompt in enumerate(PROMPTS):
            alone = SoftPrompt(vectors[row : row + 1], placement="suffix")
            assert llm.generate([prompt], soft=alone, config=config)[0].text == found[row].text
            if beams == 1:
                assert found[row].text == _greedy(llm, prompt, vectors[row : row + 1])
            seen.add(found[row].text)
    assert len(seen) > 2  # the soft tokens are heard


def _greedy(llm: Any, prompt: str, vectors: Tensor) -> str:
    ids: list[int] = []
    start, end = llm.model.config.decoder_start_token_id, llm.prompt_tokenizer.tokenizer.eos_token_id
    while len(ids) < 6 and end not in ids:
        read = torch.cat([vectors, llm.embed(torch.tensor([[start, *ids]]))], dim=1)
        encoder = torch.tensor([llm.prompt_tokenizer.prompt(prompt).ids])
        ids.append(int(llm.model(input_ids=encoder, decoder_inputs_embeds=read).logits[0, -1].argmax()))
    return str(llm.prompt_tokenizer.decode(ids[: ids.index(end)] if end in ids else ids))
