"""The model check at load: every accepted family gives the same numbers as the model in transformers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import model_families
import pytest
import torch
from families import small_llm, small_mamba

from personaplug.errors import UnsupportedModel
from personaplug.infra.checksums import read_json
from personaplug.infra.model_hub import read_embeddings
from personaplug.llm import check_results, model_check
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.check_results import find_result, keep_result
from personaplug.llm.loading import load_hf, wrap_model
from personaplug.llm.model_check import run_check
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import tiny_tokenizer

LONGROPE = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [9.0] * 4,
        "original_max_position_embeddings": 48,
    },
}
DYNAMIC = {
    "max_position_embeddings": 48,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
# Family, is it an encoder-decoder, changes of its config, chosen runner, can prompts be cached.
REPRESENTATIVES: list[tuple[str, bool, dict[str, Any], str, bool]] = [
    ("llama", False, {}, "batched", True),
    ("gpt_neox", False, {}, "batched", True),
    ("gemma3_text", False, {"sliding_window": 8}, "batched", True),
    ("gemma3", False, {}, "batched", True),
    ("qwen3", False, {}, "batched", True),
    ("mistral", False, {"sliding_window": 8}, "batched", True),
    ("bloom", False, {}, "batched", True),
    ("roformer", False, {}, "batched", False),  # counts positions from the first column of a batch
    ("mamba", False, {}, "batched by transformers", False),
    ("mamba2", False, {}, "batched", True),
    ("qwen3_5", False, {}, "batched", True),
    ("falcon_h1", False, {}, "batched", True),
    ("granitemoehybrid", False, {}, "batched", True),
    ("gpt_oss", False, {"sliding_window": 8}, "batched", True),
    ("gemma4_text", False, {}, "batched", True),
    ("gemma4_unified_text", False, {}, "batched", True),
    ("deepseek_v3", False, {}, "batched", True),
    ("llama4_text", False, {"attention_chunk_size": 8}, "batched", True),
    ("smollm3", False, {"no_rope_layers": [1, 0]}, "batched", True),
    ("bart", False, {}, "row by row", False),
    ("t5", True, {}, "batched", True),
    ("bart", True, {"forced_bos_token_id": 2}, "batched", True),
    ("pegasus", True, {"scale_embedding": True}, "batched", True),
    ("marian", True, {"scale_embedding": True}, "batched", True),
    ("mbart", True, {"scale_embedding": True}, "batched", True),
    ("t5gemma", True, {}, "batched", True),
    ("switch_transformers", True, {}, "batched", True),
]


@pytest.mark.parametrize(("family", "is_encoder_decoder", "changes", "way", "caches"), REPRESENTATIVES)
def test_family_gives_the_same_numbers_as_single_rows_of_ids(
    family: str, is_encoder_decoder: bool, changes: dict[str, Any], way: str, caches: bool
) -> None:
    if family not in model_families.CAUSAL | model_families.SEQ2SEQ:
        pytest.skip(f"this version of transformers has no {family}")
    llm = model_families.load(family, is_encoder_decoder=is_encoder_decoder, **changes)
    assert model_families.largest_error(llm) < 1e-5
    assert (llm.check.way, llm.supports_prompt_cache) == (way, caches)


@pytest.mark.slow
def test_no_family_of_transformers_is_silently_wrong() -> None:
    outcomes = list(model_families.examine_all())
    assert [one for one in outcomes if one.kind == "wrong"] == []
    assert sum(one.kind == "fast" for one in outcomes) > 80


def _one_row_losses(llm: Any, prompts: list[str], vectors: torch.Tensor, targets: list[str]) -> torch.Tensor:
    losses = []
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        ids, answer = llm.prompt_tokenizer.encode_prompt(prompt).ids, llm.prompt_tokenizer.encode_target(target)
        parts = [llm.embed(torch.tensor([ids])), vectors[row : row + 1], llm.embed(torch.tensor([answer]))]
        logits = llm.model(inputs_embeds=torch.cat(parts, dim=1)).logits[0, -len(answer) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    return torch.stack(losses)


@pytest.mark.parametrize(("family", "changes"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_switching_rope_equals_one_pass_below_above_and_across_the_switch(family: str, changes: dict[str, Any]) -> None:
    llm: Any = model_families.load(family, is_encoder_decoder=False, **changes)
    assert llm.rope_switch == llm.max_cached_tokens == 48
    prompts, targets = ["short", "x" * 42, "y" * 60], ["yes", "no way", "ok"]
    vectors = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1)) * llm.embedding_scale
    expected = _one_row_losses(llm, prompts, vectors, targets)
    soft = SoftPrompt(vectors, placement="suffix")
    llm.cache_prompts(prompts)
    torch.testing.assert_close(llm.loss(PromptBatch(prompts, soft), targets)[0], expected, rtol=1e-5, atol=1e-5)
    # "yes" is a prefix of another label.
    scores = llm.score(PromptBatch(prompts, soft), [*targets, "yes no"]).diagonal()
    torch.testing.assert_close(-scores, expected, rtol=1e-5, atol=1e-5)
    short = llm.loss(PromptBatch(prompts[:1], soft.row(0)), targets[:1])[0]
    torch.testing.assert_close(short, expected[:1], rtol=1e-5, atol=1e-5)
    text = llm.generate(PromptBatch(["z" * 44]), GenerationConfig(max_new_tokens=8))[0].text
    ids = [*llm.prompt_tokenizer.encode_prompt("z" * 44).ids]
    while len(ids) < 45 + 8:
        ids.append(int(llm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert text == llm.prompt_tokenizer.decode(ids[45:])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"is_decoder": False}, "a token's probability depends on later tokens"),
        ("deepseek_v4", {}, "has no attribute"),
    ],
)
def test_unsupported_family_is_refused_with_the_reason(family: str, changes: dict[str, Any], message: str) -> None:
    if family not in model_families.CAUSAL:
        pytest.skip(f"this version of transformers has no {family}")
    with pytest.raises(UnsupportedModel, match=f"'{family}' cannot be used: .*{message}"):
        model_families.load(family, is_encoder_decoder=False, **changes)


def test_model_without_input_embeddings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_families.build("llama", is_encoder_decoder=False)
    monkeypatch.setattr(model, "get_input_embeddings", lambda: None)
    with pytest.raises(UnsupportedModel, match="lacks a required feature"):
        wrap_model(model, tiny_tokenizer(), name="odd")


def test_encoder_decoder_without_start_token_is_refused() -> None:
    model = model_families.build("t5", is_encoder_decoder=True)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(UnsupportedModel, match="decoder_start_token_id"):
        wrap_model(model, tiny_tokenizer(), name="t5")


def test_slow_runner_is_logged_with_its_reason_and_gives_correct_gradients(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        llm = small_mamba()
    assert "mamba runs batched by transformers: " in caplog.text
    assert "mamba cannot cache prompts" in caplog.text
    prompts, targets = ["same size"] * 3, ["yes indeed", "n", "ok"]
    noise = torch.randn(3, 2, llm.identity.width, generator=torch.Generator().manual_seed(1))
    vectors = (noise * llm.embedding_scale).requires_grad_()
    llm.cache_prompts(prompts)
    losses, _ = llm.loss(PromptBatch(prompts, SoftPrompt(vectors, "suffix")), targets)
    expected = _one_row_losses(llm, prompts, vectors, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    gradient, expected_gradient = (torch.autograd.grad(one.sum(), vectors)[0] for one in (losses, expected))
    assert expected_gradient.abs().sum() > 0
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, IndexError, TypeError, NotImplementedError])
def test_family_whose_prefill_raises_has_no_prompt_cache(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_llm("llama")

    def fail(*_: object, **__: object) -> None:
        raise error("unsupported")

    monkeypatch.setattr(llm, "prefill", fail)
    result = run_check(llm)
    assert (result.way, result.layout) == ("batched", None)
    assert "unsupported" in result.why_no_prompt_cache


def test_family_with_wrong_cached_states_has_no_prompt_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")
    prefill = llm.prefill

    def forget_first_layer(embeds: torch.Tensor, mask: torch.Tensor) -> object:
        states, logits = prefill(embeds, mask)
        for own in states:
            own.blocks[0][:2] = 0
        return states, logits

    monkeypatch.setattr(llm, "prefill", forget_first_layer)
    result = run_check(llm)
    assert result.layout is None
    assert "after a cached prompt" in result.why_no_prompt_cache


def test_out_of_memory_error_does_not_refuse_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(llm, "prefill", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run_check(llm)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of an empty results file, to which checks of any duration are written."""
    monkeypatch.setenv("PERSONAPLUG_CACHE", str(tmp_path))
    monkeypatch.setattr(check_results, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(check_results, "_in_memory", {})
    return tmp_path / "model-checks.json"


def _keys(results: Path) -> list[str]:
    return list(read_json(results, remedy=""))


@pytest.mark.parametrize("load", [lambda: small_llm("llama"), small_mamba])
def test_result_is_read_from_the_file_by_another_process(
    load: Any, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load()
    assert len(_keys(results)) == 1
    monkeypatch.setattr(check_results, "_in_memory", {})
    monkeypatch.setattr(model_check, "run_check", lambda _: pytest.fail("checked again"))
    second = load()
    assert (second.check, second.check is first.check) == (first.check, False)


def test_other_settings_or_weights_are_checked_again(results: Path) -> None:
    small_llm("llama")
    small_llm("llama", dtype=torch.bfloat16)
    small_llm("llama", chat=True)
    model = model_families.build("llama", is_encoder_decoder=False)
    wrap_model(model, tiny_tokenizer(), name="one")
    model.config.sliding_window = 8
    wrap_model(model, tiny_tokenizer(), name="two")
    assert len(_keys(results)) == 5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "null",
        '{"KEY": 3}',
        '{"KEY": {"way": "batched"}}',
        '{"KEY": null}',
        '{"KEY": "x"}',
        '{"KEY": [1]}',
    ],
)
def test_damaged_results_file_counts_as_missing(content: str, results: Path) -> None:
    key = "0123"
    results.write_text(content.replace("KEY", key))
    assert find_result(key) is None
    result = small_llm("llama").check
    keep_result(key, result, seconds=9.0)
    check_results._in_memory.clear()
    assert find_result(key) == result


def test_model_loads_if_the_results_file_cannot_be_written(results: Path) -> None:
    results.mkdir()  # a folder in place of the file
    assert small_llm("llama").check.way == "batched"
    assert small_llm("llama").supports_prompt_cache


@pytest.mark.usefixtures("results")
def test_refused_model_is_checked_again_each_time(results: Path) -> None:
    for _ in range(2):
        with pytest.raises(UnsupportedModel):
            model_families.load("bert", is_encoder_decoder=False, is_decoder=False)
    assert not results.exists()


@pytest.mark.parametrize(("family", "is_encoder_decoder"), [("llama", False), ("mamba", False), ("t5", True)])
def test_loading_and_running_a_model_gives_no_warning(
    family: str, is_encoder_decoder: bool, tmp_path: Path, results: Path
) -> None:
    model_families.build(family, is_encoder_decoder=is_encoder_decoder).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = load_hf(str(tmp_path / "model"), dtype="float32")
        for placement in ("prefix", "suffix"):
            batch = PromptBatch(["a", "bc"], SoftPrompt(torch.zeros(2, 1, 32), placement))
            llm.loss(batch, ["x", "y"])
            llm.score(batch, ["one", "two"])
            for beams in (1, 2):
                llm.generate(batch, GenerationConfig(max_new_tokens=2, num_beams=beams))
            llm.generate(batch, GenerationConfig(max_new_tokens=2, do_sample=True))


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "opt"])
def test_read_embeddings_returns_the_models_embeddings(family: str, tmp_path: Path) -> None:
    model = model_families.build(family, is_encoder_decoder=False)
    model.save_pretrained(tmp_path)
    expected = model.get_input_embeddings()(torch.arange(257)).detach()
    assert torch.equal(read_embeddings(tmp_path), expected)


def test_max_positions_of_a_composite_model_come_from_its_text_config() -> None:
    llm: Any = model_families.load("gemma3", is_encoder_decoder=False)
    assert llm.max_positions == llm.max_cached_tokens == 512


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_generation_settings_of_a_checkpoint_do_not_change_answers(placement: str) -> None:
    texts = []
    for settings in ({}, {"repetition_penalty": 9.0, "min_length": 300, "do_sample": True, "temperature": 3.0}):
        model = model_families.build("llama", is_encoder_decoder=False)
        model.generation_config.update(**settings)
        llm = wrap_model(model, tiny_tokenizer(), name="llama")
        soft = SoftPrompt(torch.zeros(2, 1, 32), placement)
        for beams in (1, 2):
            config = GenerationConfig(max_new_tokens=6, num_beams=beams)
            texts.append([response.text for response in llm.generate(PromptBatch(["a", "bc"], soft), config)])
    assert texts[:2] == texts[2:]
