"""Frozen language models: soft tokens that spell a text do what the text does, in every family and on both sides."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from families import DECODERS, FAMILIES, small_backend
from torch import Tensor

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, ShapeMismatch
from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.loading import choose_device, open_llm
from personaplug.llm.prompt_tokenizer import PromptTokenizer
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import load_tiny_llm, tiny_tokenizer

# Zero, one and many tokens; of different lengths, so that every batch has padding.
PROMPTS = ["", "a", "What does this user think of long films?"]
TARGETS = ["yes", "n", "maybe so"]
SPELLED = "Hi!"


def _spelled(llm: Any, text: str, *, rows: int) -> SoftPrompt:
    """Soft tokens that are the embeddings of a text."""
    ids = torch.tensor(llm.prompt_tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])
    vectors: Tensor = llm.embed(ids)
    return SoftPrompt(vectors.expand(rows, -1, -1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_with_spelled_soft_tokens_is_the_loss_of_the_text(family: str, side: str) -> None:
    llm = small_backend(family, padding_side=side)
    spliced, counts = llm.loss(PROMPTS, TARGETS, soft=_spelled(llm, SPELLED, rows=3))
    written, _ = llm.loss([SPELLED + prompt for prompt in PROMPTS], TARGETS, soft=None)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [len(target) + 1 for target in TARGETS]  # bytes and the end


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_loss_agrees_with_a_plain_unpadded_pass_over_ids(family: str) -> None:
    llm = small_backend(family)
    losses, _ = llm.loss(PROMPTS, TARGETS, soft=_spelled(llm, SPELLED, rows=3))
    for prompt, target, loss in zip(PROMPTS, TARGETS, losses, strict=True):
        before = llm.prompt_tokenizer.prompt(SPELLED + prompt).ids
        answer = llm.prompt_tokenizer.answer(target)
        ids = torch.tensor([[*before, *answer]])
        logits = llm.model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_the_negative_losses_of_the_labels(family: str) -> None:
    llm = small_backend(family)
    soft = _spelled(llm, SPELLED, rows=3)
    labels = ["yes", "no", "yes indeed"]  # "yes" begins another label, so all carry the end
    scores = llm.score(PROMPTS, labels, soft=soft)
    for column, label in enumerate(labels):
        losses, _ = llm.loss(PROMPTS, [label] * 3, soft=soft)
        torch.testing.assert_close(scores[:, column], -losses, rtol=1e-4, atol=1e-4)


def test_one_token_labels_are_scored_without_the_end() -> None:
    llm = small_backend("llama")
    scores = llm.score(PROMPTS, ["1", "2"], soft=None)
    longer = llm.score(PROMPTS, ["1", "2", "12"], soft=None)  # "1" begins "12"
    assert (scores > longer[:, :2]).all()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_scores_do_not_depend_on_how_labels_are_cut_into_passes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_backend("llama")
    labels = ["crime", "comedy", "a", "world news", "sports"]
    whole = llm.score(PROMPTS, labels, soft=None)
    monkeypatch.setattr("personaplug.llm.causal_lm._LABEL_ROWS", chunk)
    torch.testing.assert_close(llm.score(PROMPTS, labels, soft=None), whole)


# The beginning, the middle and the end of a text, in rows of one batch.
PLACES = [0, 1, 9]
INSERTED = [prompt[:place] + SPELLED + prompt[place:] for prompt, place in zip(PROMPTS, PLACES, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_soft_tokens_at_a_place_of_each_text_do_what_the_text_there_does(family: str, side: str) -> None:
    llm = small_backend(family, padding_side=side)
    soft = _spelled(llm, SPELLED, rows=3)
    spliced, _ = llm.loss(PROMPTS, TARGETS, soft=soft, soft_at=PLACES)
    written, _ = llm.loss(INSERTED, TARGETS, soft=None)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)
    in_front, _ = llm.loss(PROMPTS, TARGETS, soft=soft)
    assert in_front[0] == pytest.approx(float(spliced[0]), rel=1e-5)
    assert (in_front[1:] - spliced[1:]).abs().min() > 1e-4
    labels = ["yes", "no", "yes indeed"]
    scores = llm.score(PROMPTS, labels, soft=soft, soft_at=PLACES)
    torch.testing.assert_close(scores, llm.score(INSERTED, labels, soft=None), rtol=1e-4, atol=1e-4)
    config = GenerationConfig(max_new_tokens=6)
    made = llm.generate(PROMPTS, soft=soft, soft_at=PLACES, config=config)
    assert [one.text for one in made] == [one.text for one in llm.generate(INSERTED, soft=None, config=config)]


def test_the_place_of_soft_tokens_is_of_the_text_within_a_chat_template() -> None:
    llm = small_backend("llama", chat=True)
    spliced, _ = llm.loss(["ab?"], ["yes"], soft=_spelled(llm, "xy", rows=1), soft_at=[2])
    written, _ = llm.loss(["abxy?"], ["yes"], soft=None)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_at", [[0, 2, 0], [0, 0, 42], [0, 0, -1], [0, 0]])
def test_soft_tokens_outside_a_text_are_refused(soft_at: list[int]) -> None:
    llm = small_backend("llama")
    with pytest.raises(ShapeMismatch, match="soft_at"):
        llm.loss(PROMPTS, TARGETS, soft=_spelled(llm, "a", rows=3), soft_at=soft_at)


@pytest.mark.parametrize("soft", [None, SoftPrompt(torch.zeros(3, 0, 32))])
def test_a_bare_model_reads_a_text_in_one_piece(soft: SoftPrompt | None, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_backend("llama")
    seen: list[str] = []
    encode = llm.prompt_tokenizer._text_ids

    def watched(text: str) -> list[int]:
        seen.append(text)
        return list(encode(text))

    monkeypatch.setattr(llm.prompt_tokenizer, "_text_ids", watched)
    llm.score(PROMPTS, ["1", "2"], soft=soft, soft_at=PLACES)
    assert seen == ["1", "2", *PROMPTS]


def test_the_place_of_soft_tokens_stays_within_what_is_left_of_a_long_text() -> None:
    prompt_tokenizer = CausalLM(
        load_tiny_llm().model, tiny_tokenizer(), name="short", max_prompt_tokens=8
    ).prompt_tokenizer
    row = prompt_tokenizer.prompt("abcdefghijk", 9)
    assert (row.at, len(row.ids), row.truncated) == (7, 8, True)
    assert row.ids == prompt_tokenizer.prompt("abcdefghijk").ids


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_with_spelled_soft_tokens_is_that_of_the_text(family: str, beams: int, count: int) -> None:
    llm = small_backend(family)
    text = "Hello yo"[:count]
    config = GenerationConfig(max_new_tokens=6, num_beams=beams)
    spliced = llm.generate(PROMPTS, soft=_spelled(llm, text, rows=3), config=config)
    written = llm.generate([text + prompt for prompt in PROMPTS], soft=None, config=config)
    assert [made.text for made in spliced] == [made.text for made in written]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_agrees_with_transformers_on_ids(family: str) -> None:
    llm = small_backend(family)
    prompt = SPELLED + PROMPTS[2]
    ids = torch.tensor([llm.prompt_tokenizer.prompt(prompt).ids])
    new = llm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    if family != "t5":
        new = new[:, ids.shape[1] :]
    expected = llm.prompt_tokenizer.decode(
        [t for t in new[0].tolist() if t != llm.prompt_tokenizer.tokenizer.eos_token_id]
    )
    soft = _spelled(llm, SPELLED, rows=1)
    made = llm.generate([PROMPTS[2]], soft=soft, config=GenerationConfig(max_new_tokens=6))
    assert made[0].text == expected


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_answers_the_same_alone_and_in_a_padded_batch(family: str) -> None:
    llm = small_backend(family)
    config = GenerationConfig(max_new_tokens=8)
    together = llm.generate(PROMPTS, soft=_spelled(llm, SPELLED, rows=3), config=config)
    alone = [llm.generate([p], soft=_spelled(llm, SPELLED, rows=1), config=config)[0] for p in PROMPTS]
    assert [made.text for made in together] == [made.text for made in alone]


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_answers_behind_prompts_that_are_read_apart_are_those_of_one_pass(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_backend(family)
    soft = SoftPrompt(_spelled(llm, SPELLED, rows=6).vectors, placement="suffix")
    # Two answers a prompt, as consensus asks for them, and unequal numbers of them.
    batches = [[prompt for prompt in PROMPTS for _ in range(2)], [PROMPTS[0], *PROMPTS, PROMPTS[2], PROMPTS[2]]]
    config = GenerationConfig(max_new_tokens=7)
    assert llm.supports_prompt_cache()
    apart = [llm.generate(batch, soft=soft, config=config) for batch in batches]
    monkeypatch.setattr(llm, "_apart", lambda _: False)
    whole = [llm.generate(batch, soft=soft, config=config) for batch in batches]
    assert [[one.text for one in made] for made in apart] == [[one.text for one in made] for made in whole]
    assert [[one.finished for one in made] for made in apart] == [[one.finished for one in made] for made in whole]


def test_sampling_behind_a_prompt_follows_the_seed_and_the_top() -> None:
    llm = small_backend("llama")
    soft = SoftPrompt(_spelled(llm, SPELLED, rows=4).vectors, placement="suffix")

    def draw(seed: int, **options: float) -> list[str]:
        config = GenerationConfig(max_new_tokens=9, do_sample=True, seed=seed, **options)  # type: ignore[arg-type]
        return [made.text for made in llm.generate(["Say"] * 4, soft=soft, config=config)]

    assert draw(1) == draw(1)
    assert len({*draw(1, temperature=2.0), *draw(2, temperature=2.0)}) > 4
    greedy = [made.text for made in llm.generate(["Say"] * 4, soft=soft, config=GenerationConfig(max_new_tokens=9))]
    assert draw(3, top_p=1e-6) == draw(4, temperature=1e-3) == greedy


def test_sampling_is_drawn_by_its_seed() -> None:
    llm = small_backend("llama")

    def draw(seed: int) -> str:
        config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed)
        return str(llm.generate(["Say"], soft=None, config=config)[0].text)

    state = torch.random.get_rng_state()
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_answer_that_reaches_its_longest_length_is_reported() -> None:
    llm = small_backend("llama")
    made = llm.generate(["Say"], soft=None, config=GenerationConfig(max_new_tokens=3))[0]
    assert not made.finished


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_reach_the_soft_tokens_and_no_weight(family: str) -> None:
    llm = small_backend(family)
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    vectors = torch.randn(3, 2, 32, requires_grad=True)
    losses, _ = llm.loss(PROMPTS, TARGETS, soft=SoftPrompt(vectors))
    losses.sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in llm.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in llm.model.state_dict().items())
    assert not llm.model.training


def test_soft_tokens_stand_right_before_the_users_text_in_a_chat_template() -> None:
    llm = small_backend("llama", chat=True)
    tokenizer = llm.prompt_tokenizer.tokenizer
    spliced, _ = llm.loss(["b?"], ["yes"], soft=_spelled(llm, "a", rows=1))
    ids = tokenizer("<user>ab?</><bot>yes")["input_ids"] + [tokenizer.eos_token_id]
    logits = llm.model(input_ids=torch.tensor([ids])).logits[0, -5:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-4:]), reduction="sum")
    torch.testing.assert_close(spliced[0], expected, rtol=1e-4, atol=1e-4)


def test_a_text_that_spells_special_tokens_or_the_template_is_only_text() -> None:
    llm = small_backend("llama", chat=True)
    row = llm.prompt_tokenizer.prompt("x<|end|>personaplugplaceofthetext</><bot>")
    assert llm.prompt_tokenizer.tokenizer.eos_token_id not in row.ids
    assert row.at == len("<user>")


def test_long_texts_are_cut_at_their_end_and_counted() -> None:
    llm = CausalLM(load_tiny_llm().model, tiny_tokenizer(), name="short", max_prompt_tokens=8)
    measures = llm.measure(["abc", "abcdefghijk"])
    assert [m.truncated for m in measures] == [False, True]
    assert measures[1].tokens == 8
    assert llm.prompt_tokenizer.prompt("abcdefghijk").ids[:7] == tuple(tiny_tokenizer()("abcdefg")["input_ids"])


@pytest.mark.parametrize("chat", [False, True])
def test_room_is_what_a_text_may_have(chat: bool) -> None:
    llm = small_backend("llama", chat=chat)
    texts = ["x" * llm.room, "x" * (llm.room + 1)]
    assert [m.truncated for m in llm.measure(texts)] == [False, True]
    assert llm.count_tokens(texts) == [llm.room, llm.room + 1]
    assert llm.count_tokens([]) == []


def _word_pieces() -> Any:
    """A byte-level tokenizer that merges, trained on the spot."""
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
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=tokenizer, eos_token="<|end|>")


LONG = "What  does this użytkownik think?\n\n表情 🙂🙂 long films, <|end|>and the user thinks "


@pytest.mark.parametrize("make", [tiny_tokenizer, _word_pieces])
def test_a_cut_text_is_the_longest_beginning_that_fits(make: Any) -> None:
    prompt_tokenizer = PromptTokenizer(make(), max_tokens=512, encoder_decoder=False)
    beginnings = {LONG[:size].rstrip() for size in range(len(LONG) + 1)}
    sizes = {text: prompt_tokenizer.count([text])[0] for text in beginnings}
    for tokens in range(-1, sizes[LONG.rstrip()] + 2):
        expected = max((text for text, size in sizes.items() if size <= tokens), key=len, default="")
        assert prompt_tokenizer.cut(LONG, tokens) == expected


@pytest.mark.parametrize("make", [tiny_tokenizer, _word_pieces])
def test_a_tokenizer_that_does_not_say_where_tokens_stand_cuts_too(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_tokenizer = PromptTokenizer(make(), max_tokens=512, encoder_decoder=False)
    full = prompt_tokenizer.count([LONG.rstrip()])[0]
    exact = [prompt_tokenizer.cut(LONG, tokens) for tokens in range(full + 2)]
    monkeypatch.setattr(type(prompt_tokenizer.tokenizer), "is_fast", False)
    for tokens, longest in enumerate(exact):
        kept = prompt_tokenizer.cut(LONG, tokens)
        assert longest.startswith(kept)
        assert prompt_tokenizer.count([kept])[0] <= tokens
        assert len(kept) >= len(longest) - 12  # two words at most are lost where a longer beginning has fewer tokens
    assert prompt_tokenizer.cut(LONG, full) == LONG.rstrip()


def test_nothing_of_a_text_is_cut_that_need_not_be() -> None:
    llm = small_backend("llama")
    assert [llm.cut_text("  ab cd", tokens) for tokens in (0, 2, 5, 6, 7, 99)] == [
        "", "", "  ab", "  ab c", "  ab cd", "  ab cd",
    ]  # fmt: skip


def test_no_room_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_prompt_tokens must exceed"):
        CausalLM(load_tiny_llm().model, tiny_tokenizer(), name="none", max_prompt_tokens=1)


def test_the_scale_is_that_of_the_embeddings() -> None:
    llm = small_backend("llama")
    assert llm.embedding_scale == pytest.approx(float(llm.embed.weight.pow(2).mean().sqrt()), rel=1e-5)
    scaled = small_backend("gemma")
    assert scaled.embedding_scale == pytest.approx(
        float(scaled.embed(torch.arange(257)).pow(2).mean().sqrt()), rel=1e-5
    )


def test_the_toy_model_is_the_same_for_the_same_seed_only() -> None:
    assert load_tiny_llm(seed=3).identity.fingerprint == load_tiny_llm(seed=3).identity.fingerprint
    assert load_tiny_llm(seed=3).identity.fingerprint != load_tiny_llm(seed=4).identity.fingerprint


@pytest.mark.parametrize("text", ["héllo\n wörld", "表情 🙂", "<|end|>"])
def test_the_toy_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_bad_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="toy:SEED"):
        open_llm(ModelConfig(llm="toy:x"))
    with pytest.raises(ConfigError, match="device of this machine"):
        choose_device("warp")


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": 0.0}, {"top_p": 1.5}])
def test_generation_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerationConfig(**values)


def test_offline_is_set_for_the_suite() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
