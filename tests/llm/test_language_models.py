"""Soft tokens that are the embeddings of a text have the same effect as the text, in every family."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from families import DECODERS, FAMILIES, small_llm
from torch import Tensor

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, ShapeMismatch
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.loading import choose_device, open_llm
from personaplug.llm.prompt_tokenizer import PromptTokenizer
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import load_tiny_llm, tiny_tokenizer

# Texts of zero, one and many tokens, so that every batch has padding.
PROMPTS = ["", "a", "What does this user think of long films?"]
TARGETS = ["yes", "n", "maybe so"]
SPELLED = "Hi!"


def _spelled(llm: Any, text: str, *, rows: int) -> SoftPrompt:
    """Return soft tokens that are the embeddings of a text."""
    ids = torch.tensor(llm.prompt_tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])
    vectors: Tensor = llm.embed(ids)
    return SoftPrompt(vectors.expand(rows, -1, -1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_of_spelled_soft_tokens_equals_loss_of_text(family: str) -> None:
    llm = small_llm(family)
    spliced, counts = llm.loss(PromptBatch(PROMPTS, _spelled(llm, SPELLED, rows=3)), TARGETS)
    written, _ = llm.loss(PromptBatch([SPELLED + prompt for prompt in PROMPTS]), TARGETS)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [len(target) + 1 for target in TARGETS]  # bytes and the end token


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_loss_equals_transformers_on_plain_ids(family: str) -> None:
    llm = small_llm(family)
    losses, _ = llm.loss(PromptBatch(PROMPTS, _spelled(llm, SPELLED, rows=3)), TARGETS)
    for prompt, target, loss in zip(PROMPTS, TARGETS, losses, strict=True):
        before = llm.prompt_tokenizer.encode_prompt(SPELLED + prompt).ids
        answer = llm.prompt_tokenizer.encode_target(target)
        ids = torch.tensor([[*before, *answer]])
        logits = llm.model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_score_equals_negative_loss_of_each_label(family: str) -> None:
    llm = small_llm(family)
    soft = _spelled(llm, SPELLED, rows=3)
    labels = ["yes", "no", "yes indeed"]  # "yes" is a prefix of another label, so all get the end token
    scores = llm.score(PromptBatch(PROMPTS, soft), labels)
    for column, label in enumerate(labels):
        losses, _ = llm.loss(PromptBatch(PROMPTS, soft), [label] * 3)
        torch.testing.assert_close(scores[:, column], -losses, rtol=1e-4, atol=1e-4)


def test_score_of_one_token_labels_excludes_end_token() -> None:
    llm = small_llm("llama")
    scores = llm.score(PromptBatch(PROMPTS), ["1", "2"])
    longer = llm.score(PromptBatch(PROMPTS), ["1", "2", "12"])  # "1" is a prefix of "12"
    assert (scores > longer[:, :2]).all()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_score_does_not_depend_on_labels_per_pass(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")
    labels = ["crime", "comedy", "a", "world news", "sports"]
    whole = llm.score(PromptBatch(PROMPTS), labels)
    monkeypatch.setattr("personaplug.llm.causal_lm._LABEL_ROWS", chunk)
    torch.testing.assert_close(llm.score(PromptBatch(PROMPTS), labels), whole)


# The beginning, middle and end of a text.
POSITIONS = [0, 1, 9]
INSERTED = [
    prompt[:position] + SPELLED + prompt[position:] for prompt, position in zip(PROMPTS, POSITIONS, strict=True)
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_spelled_soft_tokens_at_a_position_equal_text_at_that_position(family: str) -> None:
    llm = small_llm(family)
    soft = _spelled(llm, SPELLED, rows=3)
    spliced, _ = llm.loss(PromptBatch(PROMPTS, soft, POSITIONS), TARGETS)
    written, _ = llm.loss(PromptBatch(INSERTED), TARGETS)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)
    in_front, _ = llm.loss(PromptBatch(PROMPTS, soft), TARGETS)
    assert in_front[0] == pytest.approx(float(spliced[0]), rel=1e-5)
    assert (in_front[1:] - spliced[1:]).abs().min() > 1e-4
    labels = ["yes", "no", "yes indeed"]
    scores = llm.score(PromptBatch(PROMPTS, soft, POSITIONS), labels)
    torch.testing.assert_close(scores, llm.score(PromptBatch(INSERTED), labels), rtol=1e-4, atol=1e-4)
    config = GenerationConfig(max_new_tokens=6)
    responses = llm.generate(PromptBatch(PROMPTS, soft, POSITIONS), config)
    expected = llm.generate(PromptBatch(INSERTED), config)
    assert [response.text for response in responses] == [response.text for response in expected]


def test_soft_at_with_chat_template_counts_from_start_of_text() -> None:
    llm = small_llm("llama", chat=True)
    spliced, _ = llm.loss(PromptBatch(["ab?"], _spelled(llm, "xy", rows=1), [2]), ["yes"])
    written, _ = llm.loss(PromptBatch(["abxy?"]), ["yes"])
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_at", [[0, 2, 0], [0, 0, 42], [0, 0, -1], [0, 0]])
def test_soft_at_outside_text_raises(soft_at: list[int]) -> None:
    llm = small_llm("llama")
    with pytest.raises(ShapeMismatch, match="soft_at"):
        llm.loss(PromptBatch(PROMPTS, _spelled(llm, "a", rows=3), soft_at), TARGETS)


@pytest.mark.parametrize("soft", [None, SoftPrompt(torch.zeros(3, 0, 32))])
def test_score_without_soft_tokens_tokenizes_text_in_one_piece(
    soft: SoftPrompt | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_llm("llama")
    encoded: list[str] = []
    encode = llm.prompt_tokenizer.texts.encode

    def record(text: str, *, inside: bool = False) -> list[int]:
        encoded.append(text)
        return list(encode(text, inside=inside))

    monkeypatch.setattr(llm.prompt_tokenizer.texts, "encode", record)
    llm.score(PromptBatch(PROMPTS, soft, POSITIONS), ["1", "2"])
    assert encoded == ["1", "2", *PROMPTS]


def test_soft_at_beyond_cut_text_is_clamped() -> None:
    prompt_tokenizer = CausalLM(
        load_tiny_llm().model, tiny_tokenizer(), name="short", max_prompt_tokens=8
    ).prompt_tokenizer
    row = prompt_tokenizer.encode_prompt("abcdefghijk", 9)
    assert (row.soft_position, len(row.ids), row.truncated) == (7, 8, True)
    assert row.ids == prompt_tokenizer.encode_prompt("abcdefghijk").ids


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_from_spelled_soft_tokens_equals_generation_from_text(family: str, beams: int, count: int) -> None:
    llm = small_llm(family)
    text = "Hello yo"[:count]
    config = GenerationConfig(max_new_tokens=6, num_beams=beams)
    spliced = llm.generate(PromptBatch(PROMPTS, _spelled(llm, text, rows=3)), config)
    written = llm.generate(PromptBatch([text + prompt for prompt in PROMPTS]), config)
    assert [response.text for response in spliced] == [response.text for response in written]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_equals_transformers_on_plain_ids(family: str) -> None:
    llm = small_llm(family)
    prompt = SPELLED + PROMPTS[2]
    ids = torch.tensor([llm.prompt_tokenizer.encode_prompt(prompt).ids])
    new = llm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    if family != "t5":
        new = new[:, ids.shape[1] :]
    expected = llm.prompt_tokenizer.decode(
        [t for t in new[0].tolist() if t != llm.prompt_tokenizer.tokenizer.eos_token_id]
    )
    soft = _spelled(llm, SPELLED, rows=1)
    responses = llm.generate(PromptBatch([PROMPTS[2]], soft), GenerationConfig(max_new_tokens=6))
    assert responses[0].text == expected


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_in_padded_batch_equals_single_rows(family: str) -> None:
    llm = small_llm(family)
    config = GenerationConfig(max_new_tokens=8)
    together = llm.generate(PromptBatch(PROMPTS, _spelled(llm, SPELLED, rows=3)), config)
    alone = [llm.generate(PromptBatch([p], _spelled(llm, SPELLED, rows=1)), config)[0] for p in PROMPTS]
    assert [response.text for response in together] == [response.text for response in alone]


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_generation_after_cached_prefix_equals_one_sequence(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm(family)
    soft = SoftPrompt(_spelled(llm, SPELLED, rows=6).vectors, placement="suffix")
    # Two responses per prompt, then different numbers of responses.
    batches = [[prompt for prompt in PROMPTS for _ in range(2)], [PROMPTS[0], *PROMPTS, PROMPTS[2], PROMPTS[2]]]
    config = GenerationConfig(max_new_tokens=7)
    assert llm.supports_prompt_cache
    cached = [llm.generate(PromptBatch(batch, soft), config) for batch in batches]
    monkeypatch.setattr(llm, "prompt_layout", None)
    uncached = [llm.generate(PromptBatch(batch, soft), config) for batch in batches]
    for batch, expected in zip(cached, uncached, strict=True):
        assert [one.text for one in batch] == [one.text for one in expected]
        assert [one.finished for one in batch] == [one.finished for one in expected]


def test_generation_after_cached_prefix_respects_seed_and_top_p() -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(_spelled(llm, SPELLED, rows=4).vectors, placement="suffix")

    def draw(seed: int, **options: float) -> list[str]:
        config = GenerationConfig(max_new_tokens=9, do_sample=True, seed=seed, **options)  # type: ignore[arg-type]
        return [response.text for response in llm.generate(PromptBatch(["Say"] * 4, soft), config)]

    assert draw(1) == draw(1)
    assert len({*draw(1, temperature=2.0), *draw(2, temperature=2.0)}) > 4
    greedy = [
        response.text for response in llm.generate(PromptBatch(["Say"] * 4, soft), GenerationConfig(max_new_tokens=9))
    ]
    assert draw(3, top_p=1e-6) == draw(4, temperature=1e-3) == greedy


def test_sampling_depends_only_on_seed() -> None:
    llm = small_llm("llama")

    def draw(seed: int) -> str:
        config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed)
        return str(llm.generate(PromptBatch(["Say"]), config)[0].text)

    state = torch.random.get_rng_state()
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_response_at_max_new_tokens_is_not_finished() -> None:
    llm = small_llm("llama")
    response = llm.generate(PromptBatch(["Say"]), GenerationConfig(max_new_tokens=3))[0]
    assert not response.finished


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_gradients_reach_soft_tokens_and_no_weight(family: str) -> None:
    llm = small_llm(family)
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    vectors = torch.randn(3, 2, 32, requires_grad=True)
    losses, _ = llm.loss(PromptBatch(PROMPTS, SoftPrompt(vectors)), TARGETS)
    losses.sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in llm.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in llm.model.state_dict().items())
    assert not llm.model.training


def test_prefix_soft_tokens_with_chat_template_come_right_before_text() -> None:
    llm = small_llm("llama", chat=True)
    tokenizer = llm.prompt_tokenizer.tokenizer
    spliced, _ = llm.loss(PromptBatch(["b?"], _spelled(llm, "a", rows=1)), ["yes"])
    ids = tokenizer("<user>ab?</><bot>yes")["input_ids"] + [tokenizer.eos_token_id]
    logits = llm.model(input_ids=torch.tensor([ids])).logits[0, -5:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-4:]), reduction="sum")
    torch.testing.assert_close(spliced[0], expected, rtol=1e-4, atol=1e-4)


def test_text_that_spells_special_tokens_stays_text() -> None:
    llm = small_llm("llama", chat=True)
    row = llm.prompt_tokenizer.encode_prompt("x<|end|>personaplugplaceofthetext</><bot>")
    assert llm.prompt_tokenizer.tokenizer.eos_token_id not in row.ids
    assert row.soft_position == len("<user>")


def test_measure_reports_the_cut_end_of_a_long_text() -> None:
    llm = CausalLM(load_tiny_llm().model, tiny_tokenizer(), name="short", max_prompt_tokens=8)
    measures = llm.measure(["abc", "abcdefghijk"])
    assert [m.truncated for m in measures] == [False, True]
    assert measures[1].tokens == 8
    assert llm.prompt_tokenizer.encode_prompt("abcdefghijk").ids[:7] == tuple(tiny_tokenizer()("abcdefg")["input_ids"])


@pytest.mark.parametrize("chat", [False, True])
def test_max_text_tokens_is_the_length_of_the_longest_uncut_text(chat: bool) -> None:
    llm = small_llm("llama", chat=chat)
    texts = ["x" * llm.max_text_tokens, "x" * (llm.max_text_tokens + 1)]
    assert [m.truncated for m in llm.measure(texts)] == [False, True]
    assert llm.count_tokens(texts) == [llm.max_text_tokens, llm.max_text_tokens + 1]
    assert llm.count_tokens([]) == []


def _word_pieces() -> Any:
    """Return a byte-level BPE tokenizer with merges, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["What does this user think of long films, and of short ones? The user thinks of them a lot."] * 4
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=tokenizer, eos_token="<|end|>")


LONG = "What  does this użytkownik think?\n\n表情 🙂🙂 long films, <|end|>and the user thinks "


@pytest.mark.parametrize("make", [tiny_tokenizer, _word_pieces])
def test_cut_text_returns_longest_fitting_prefix(make: Any) -> None:
    prompt_tokenizer = PromptTokenizer(make(), max_tokens=512, is_encoder_decoder=False)
    beginnings = {LONG[:size].rstrip() for size in range(len(LONG) + 1)}
    sizes = {text: prompt_tokenizer.count_tokens([text])[0] for text in beginnings}
    for tokens in range(-1, sizes[LONG.rstrip()] + 2):
        expected = max((text for text, size in sizes.items() if size <= tokens), key=len, default="")
        assert prompt_tokenizer.cut_text(LONG, tokens) == expected


@pytest.mark.parametrize("make", [tiny_tokenizer, _word_pieces])
def test_cut_text_without_offsets_never_exceeds_limit(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_tokenizer = PromptTokenizer(make(), max_tokens=512, is_encoder_decoder=False)
    full = prompt_tokenizer.count_tokens([LONG.rstrip()])[0]
    exact = [prompt_tokenizer.cut_text(LONG, tokens) for tokens in range(full + 2)]
    monkeypatch.setattr(type(prompt_tokenizer.tokenizer), "is_fast", False)
    for tokens, longest in enumerate(exact):
        prefix = prompt_tokenizer.cut_text(LONG, tokens)
        assert longest.startswith(prefix)
        assert prompt_tokenizer.count_tokens([prefix])[0] <= tokens
        assert len(prefix) >= len(longest) - 12  # at most two words are lost if a longer prefix has fewer tokens
    assert prompt_tokenizer.cut_text(LONG, full) == LONG.rstrip()


def test_cut_text_keeps_text_that_fits() -> None:
    llm = small_llm("llama")
    assert [llm.cut_text("  ab cd", tokens) for tokens in (0, 2, 5, 6, 7, 99)] == [
        "", "", "  ab", "  ab c", "  ab cd", "  ab cd",
    ]  # fmt: skip


def test_max_prompt_tokens_below_template_raises() -> None:
    with pytest.raises(ConfigError, match="max_prompt_tokens must exceed"):
        CausalLM(load_tiny_llm().model, tiny_tokenizer(), name="none", max_prompt_tokens=1)


def test_embedding_scale_is_root_mean_square_of_embeddings() -> None:
    llm = small_llm("llama")
    assert llm.embedding_scale == pytest.approx(float(llm.embed.weight.pow(2).mean().sqrt()), rel=1e-5)
    scaled = small_llm("gemma")
    assert scaled.embedding_scale == pytest.approx(
        float(scaled.embed(torch.arange(257)).pow(2).mean().sqrt()), rel=1e-5
    )


def test_load_tiny_llm_weights_depend_on_seed() -> None:
    assert load_tiny_llm(seed=3).identity.fingerprint == load_tiny_llm(seed=3).identity.fingerprint
    assert load_tiny_llm(seed=3).identity.fingerprint != load_tiny_llm(seed=4).identity.fingerprint


@pytest.mark.parametrize("text", ["héllo\n wörld", "表情 🙂", "<|end|>"])
def test_tiny_tokenizer_round_trip_restores_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_open_llm_with_bad_seed_or_device_raises() -> None:
    with pytest.raises(ConfigError, match="toy:SEED"):
        open_llm(ModelConfig(llm="toy:x"))
    with pytest.raises(ConfigError, match="toy:SEED"):
        open_llm(ModelConfig(llm=f"toy:{'9' * 30}"))
    with pytest.raises(ConfigError, match="device of this machine"):
        choose_device("warp")


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": 0.0}, {"top_p": 1.5}])
def test_generation_config_out_of_range_raises(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerationConfig(**values)


def test_suite_runs_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
