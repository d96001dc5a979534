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
from personaplug.encoders.embedding_store import VectorTable
from personaplug.encoders.encoded_sample import EncodedSample, no_forms
from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import DecoderOnlyBackend
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import toy_tokenizer
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import Fitting
from personaplug.training.objectives import PlugObjective

PROMPTS = ["a question that is longer than any sliding window here", "?", "middling text"]
TARGETS = ["yes indeed", "n", "ok"]


def _vectors(backend: Any, *, rows: int = 3, tokens: int = 2, seed: int = 1) -> Tensor:
    width: int = backend.identity.width
    drawn = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))
    scale: float = backend.embedding_scale
    return (drawn * scale).requires_grad_()


def _whole(backend: Any, vectors: Tensor, *, prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Losses and gradient with prompt, soft tokens and answer as plain rows of embeddings, one by one."""
    losses = []
    for row, (prompt, target) in enumerate(zip(prompts or PROMPTS, TARGETS, strict=True)):
        ids, answer = backend.renderer.prompt(prompt).ids, backend.renderer.answer(target)
        rows = [backend.embed(torch.tensor([ids])), vectors[row : row + 1], backend.embed(torch.tensor([answer]))]
        logits = backend.model(inputs_embeds=torch.cat(rows, dim=1)).logits[0, -len(answer) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum"))
    together = torch.stack(losses)
    return together.detach(), torch.autograd.grad(together.sum(), vectors)[0]


def _apart(backend: Any, vectors: Tensor, *, prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:
    losses, tokens = backend.loss(prompts or PROMPTS, TARGETS, soft=SoftPrompt(vectors, placement="suffix"))
    assert tokens.tolist() == [len(backend.renderer.answer(target)) for target in TARGETS]
    return losses.detach(), torch.autograd.grad(losses.sum(), vectors)[0]


def _close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], *, within: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < within


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradient_are_those_of_one_pass_over_everything(family: str, side: str, chat: bool) -> None:
    backend = small_backend(family, padding_side=side, chat=chat)
    vectors = _vectors(backend)
    assert backend._layout() is not None  # no family here falls back
    wanted = _whole(backend, vectors)
    _close(_apart(backend, vectors), wanted)
    backend.keep(PROMPTS)
    _close(_apart(backend, vectors), wanted)
    backend._tried, backend._found = True, None  # the way of families that cannot
    _close(_apart(backend, vectors), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_in_bfloat16_it_agrees_within_its_rounding(family: str) -> None:
    backend = small_backend(family)
    backend.model.to(torch.bfloat16)
    vectors = _vectors(backend)
    backend.keep(PROMPTS)
    apart = _apart(backend, vectors)
    backend._found = None
    _close(apart, _apart(backend, vectors), within=0.05)


def test_no_gradient_is_computed_for_the_prompt() -> None:
    backend = small_backend("llama")
    soft = SoftPrompt(_vectors(backend), placement="suffix")
    sizes: list[int] = []

    def noted(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda saved: saved):
        backend.loss(PROMPTS, TARGETS, soft=soft)
        short = sum(sizes)
        sizes.clear()
        backend.loss([4 * prompt for prompt in PROMPTS], TARGETS, soft=soft)
    # Only keys and values grow with the prompt: what is saved for the backward pass hardly does.
    assert sum(sizes) < 2 * short


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("labels", [["1", "2", "5"], ["war", "war film", "comedy", "x"]])
@pytest.mark.parametrize("kept", [False, True])
def test_scores_are_the_losses_of_the_labels(family: str, labels: list[str], kept: bool) -> None:
    backend = small_backend(family)
    soft = SoftPrompt(_vectors(backend).detach(), placement="suffix")
    if kept:
        backend.keep(PROMPTS)
    found = backend.score(PROMPTS, labels, soft=soft)
    for column, label in enumerate(labels):
        losses, _ = backend.loss(PROMPTS, [label] * 3, soft=soft, labels=labels)
        torch.testing.assert_close(found[:, column], -losses, atol=1e-4, rtol=1e-4)
    backend._found = None
    torch.testing.assert_close(found, backend.score(PROMPTS, labels, soft=soft), atol=1e-4, rtol=1e-4)


def test_large_sets_of_labels_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small_backend("llama")
    soft = SoftPrompt(_vectors(backend).detach(), placement="suffix")
    labels = ["1", "one two", "3", "three four five", "black & white"]
    at_once = backend.score(PROMPTS, labels, soft=soft)
    monkeypatch.setattr("personaplug.llm.causal_lm._LOGITS", 1)
    torch.testing.assert_close(backend.score(PROMPTS, labels, soft=soft), at_once, atol=1e-4, rtol=1e-4)


def test_labels_that_cannot_be_confused_are_trained_without_an_end() -> None:
    backend = small_backend("llama")
    soft = SoftPrompt(_vectors(backend).detach(), placement="suffix")
    _, tokens = backend.loss(PROMPTS, ["1", "2", "1"], soft=soft, labels=["1", "2"])
    assert tokens.tolist() == [1, 1, 1]
    _, tokens = backend.loss(PROMPTS, ["1", "12", "1"], soft=soft, labels=["1", "12"])
    assert tokens.tolist() == [2, 3, 2]
    _, tokens = backend.loss(PROMPTS, ["1", "3", "1"], soft=soft, labels=["1", "2"])
    assert tokens.tolist() == [1, 2, 1]  # what is no label is open text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_is_generated_behind_prompt_and_soft_tokens(family: str) -> None:
    backend = small_backend(family)
    vectors = _vectors(backend).detach()
    config = GenerationConfig(max_new_tokens=5)
    found = backend.generate(PROMPTS, soft=SoftPrompt(vectors, placement="suffix"), config=config)
    for row, prompt in enumerate(PROMPTS):
        ids: list[int] = []
        while len(ids) < 5 and backend.renderer.tokenizer.eos_token_id not in ids:
            before = backend.embed(torch.tensor([backend.renderer.prompt(prompt).ids]))
            rows = torch.cat([before, vectors[row : row + 1], backend.embed(torch.tensor([ids], dtype=torch.long))], 1)
            ids.append(int(backend.model(inputs_embeds=rows).logits[0, -1].argmax()))
        assert found[row].text == backend.renderer.decode(ids)


def test_a_place_in_the_text_is_of_no_matter_behind_it() -> None:
    backend = small_backend("llama")
    soft = SoftPrompt(_vectors(backend).detach(), placement="suffix")
    plain = backend.loss(PROMPTS, TARGETS, soft=soft)[0]
    assert torch.equal(plain, backend.loss(PROMPTS, TARGETS, soft=soft, soft_at=[3, 1, 2])[0])


def test_prompts_that_find_no_room_are_read_anew() -> None:
    backend = small_backend("llama")
    vectors = _vectors(backend)
    wanted = _whole(backend, vectors)
    layout = backend._layout()
    backend._keeping = ("memory", (len(PROMPTS[2]) + 3) * layout.bytes)  # the longest does not fit, the others do
    backend.keep(PROMPTS)
    assert len(backend._kept) == 2
    _close(_apart(backend, vectors), wanted)
    backend._keeping = ("nowhere", 0)
    backend.let_go()
    backend.keep(PROMPTS)
    assert backend._kept is None
    _close(_apart(backend, vectors), wanted)


def test_prompts_kept_on_disk_are_the_same() -> None:
    backend = small_backend("llama")
    vectors = _vectors(backend)
    backend.keep(PROMPTS)
    in_memory = _apart(backend, vectors)
    backend.let_go()
    backend._keeping = ("disk", 0)
    backend.keep(PROMPTS)
    assert backend._kept.room.place == "disk"
    _close(_apart(backend, vectors), in_memory, within=1e-9)


def test_kept_prompts_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small_backend("llama")
    backend.keep(PROMPTS)
    monkeypatch.setattr(backend, "_read", lambda rows: pytest.fail("read again") if rows else [])
    backend.keep(PROMPTS[:2])
    views = 2 * PROMPTS
    backend.loss(views, 2 * TARGETS, soft=SoftPrompt(_vectors(backend, rows=6), placement="suffix"))


def test_a_family_without_keys_and_values_says_so_and_takes_the_slow_way(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    shape = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    backend = DecoderOnlyBackend(MambaForCausalLM(shape), tokenizer, name="mamba")
    vectors = _vectors(backend)
    with caplog.at_level(logging.WARNING):
        backend.keep(PROMPTS)
        losses, gradient = _apart(backend, vectors, prompts=["same size"] * 3)
    assert "mamba cannot reuse its prompts" in caplog.text
    assert torch.isfinite(losses).all()
    assert gradient.abs().sum() > 0
    _close((losses, gradient), _whole(backend, vectors, prompts=["same size"] * 3))


def test_a_pass_is_bounded_by_what_a_family_really_runs(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    shape = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    slow = DecoderOnlyBackend(MambaForCausalLM(shape), tokenizer, name="mamba")
    encoder = HashEncoder(16)
    sample = EncodedSample(
        "1", "u", "u", "a prompt " * 20, "query", "yes", np.zeros(0, np.int64), np.zeros(0, np.int16), no_forms()
    )
    for backend in (small_backend("llama"), slow):
        fitting = Fitting(backend.identity, backend.embedding_scale, encoder.identity)
        plug = PersonaPlug(replace(PAPER, placement="suffix", query_encoder="head"), fitting=fitting, encoder=encoder)
        objective = PlugObjective(plug, backend, table=VectorTable.open(tmp_path / backend.identity.name, encoder))
        assert (objective.live_lengths([sample])[0] > 100) == (backend is slow)


def test_no_prompts_have_no_scores() -> None:
    backend = small_backend("llama")
    soft = SoftPrompt(_vectors(backend)[:0].detach(), placement="suffix")
    assert backend.score([], ["a", "b"], soft=soft).shape == (0, 2)


def test_kept_prompts_are_let_go() -> None:
    backend = small_backend("llama")
    backend.keep(PROMPTS)
    kept = backend._kept
    backend.keep(PROMPTS)
    assert backend._kept is kept  # asked for again, nothing is done
    backend.keep(["others"])
    assert len(backend._kept) == 1
    backend.let_go()
    assert backend._kept is None


def test_an_encoder_decoder_reads_soft_tokens_on_the_decoders_side() -> None:
    backend = small_backend("t5")
    vectors = _vectors(backend)
    losses = []
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        answer = backend.renderer.answer(target)
        start = [backend.model.config.decoder_start_token_id, *answer[:-1]]
        read = torch.cat([vectors[row : row + 1], backend.embed(torch.tensor([start]))], dim=1)
        ids = torch.tensor([backend.renderer.prompt(prompt).ids])
        logits = backend.model(input_ids=ids, decoder_inputs_embeds=read).logits[0, vectors.shape[1] :]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    together = torch.stack(losses)
    wanted = together.detach(), torch.autograd.grad(together.sum(), vectors)[0]
    _close(_apart(backend, vectors), wanted)
    backend.keep(PROMPTS)
    assert len(backend._kept) == 3
    _close(_apart(backend, vectors), wanted)
    soft = SoftPrompt(vectors.detach(), placement="suffix")
    scores = backend.score(PROMPTS, ["ok", "n"], soft=soft)
    for column, label in enumerate(["ok", "n"]):
        losses_of, _ = backend.loss(PROMPTS, [label] * 3, soft=soft, labels=["ok", "n"])
        torch.testing.assert_close(scores[:, column], -losses_of)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_generates_behind_them(beams: int) -> None:
    backend = small_backend("t5")
    config = GenerationConfig(max_new_tokens=6, num_beams=beams)
    seen = set()
    for seed in range(6):
        vectors = 3 * _vectors(backend, seed=seed).detach()
        found = backend.generate(PROMPTS, soft=SoftPrompt(vectors, placement="suffix"), config=config)
        for row, prompt in enumerate(PROMPTS):
            alone = SoftPrompt(vectors[row : row + 1], placement="suffix")
            assert backend.generate([prompt], soft=alone, config=config)[0].text == found[row].text
            if beams == 1:
                assert found[row].text == _greedy(backend, prompt, vectors[row : row + 1])
            seen.add(found[row].text)
    assert len(seen) > 2  # the soft tokens are heard


def _greedy(backend: Any, prompt: str, vectors: Tensor) -> str:
    ids: list[int] = []
    start, end = backend.model.config.decoder_start_token_id, backend.renderer.tokenizer.eos_token_id
    while len(ids) < 6 and end not in ids:
        read = torch.cat([vectors, backend.embed(torch.tensor([[start, *ids]]))], dim=1)
        encoder = torch.tensor([backend.renderer.prompt(prompt).ids])
        ids.append(int(backend.model(input_ids=encoder, decoder_inputs_embeds=read).logits[0, -1].argmax()))
    return str(backend.renderer.decode(ids[: ids.index(end)] if end in ids else ids))
