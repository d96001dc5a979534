"""Frozen language models: soft tokens that spell a text do what the text does, in every family and on both sides."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from families import DECODERS, FAMILIES, small_backend
from torch import Tensor

from personaplug.config import ModelConfig
from personaplug.errors import BadConfig, ShapeMismatch
from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import DecoderOnlyBackend
from personaplug.llm.loading import choose_device, open_backend
from personaplug.llm.prompt_tokenizer import Renderer
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import load_toy, toy_tokenizer

# Zero, one and many tokens; of different lengths, so that every batch has padding.
PROMPTS = ["", "a", "What does this user think of long films?"]
TARGETS = ["yes", "n", "maybe so"]
SPELLED = "Hi!"


def _spelled(backend: Any, text: str, *, rows: int) -> SoftPrompt:
    """Soft tokens that are the embeddings of a text."""
    ids = torch.tensor(backend.renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    vectors: Tensor = backend.embed(ids)
    return SoftPrompt(vectors.expand(rows, -1, -1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_with_spelled_soft_tokens_is_the_loss_of_the_text(family: str, side: str) -> None:
    backend = small_backend(family, padding_side=side)
    spliced, counts = backend.loss(PROMPTS, TARGETS, soft=_spelled(backend, SPELLED, rows=3))
    written, _ = backend.loss([SPELLED + prompt for prompt in PROMPTS], TARGETS, soft=None)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [len(target) + 1 for target in TARGETS]  # bytes and the end


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_loss_agrees_with_a_plain_unpadded_pass_over_ids(family: str) -> None:
    backend = small_backend(family)
    losses, _ = backend.loss(PROMPTS, TARGETS, soft=_spelled(backend, SPELLED, rows=3))
    for prompt, target, loss in zip(PROMPTS, TARGETS, losses, strict=True):
        before = backend.renderer.prompt(SPELLED + prompt).ids
        answer = backend.renderer.answer(target)
        ids = torch.tensor([[*before, *answer]])
        logits = backend.model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_the_negative_losses_of_the_labels(family: str) -> None:
    backend = small_backend(family)
    soft = _spelled(backend, SPELLED, rows=3)
    labels = ["yes", "no", "yes indeed"]  # "yes" begins another label, so all carry the end
    scores = backend.score(PROMPTS, labels, soft=soft)
    for column, label in enumerate(labels):
        losses, _ = backend.loss(PROMPTS, [label] * 3, soft=soft)
        torch.testing.assert_close(scores[:, column], -losses, rtol=1e-4, atol=1e-4)


def test_one_token_labels_are_scored_without_the_end() -> None:
    backend = small_backend("llama")
    scores = backend.score(PROMPTS, ["1", "2"], soft=None)
    longer = backend.score(PROMPTS, ["1", "2", "12"], soft=None)  # "1" begins "12"
    assert (scores > longer[:, :2]).all()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_scores_do_not_depend_on_how_labels_are_cut_into_passes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small_backend("llama")
    labels = ["crime", "comedy", "a", "world news", "sports"]
    whole = backend.score(PROMPTS, labels, soft=None)
    monkeypatch.setattr("personaplug.llm.causal_lm._LABEL_ROWS", chunk)
    torch.testing.assert_close(backend.score(PROMPTS, labels, soft=None), whole)


# The beginning, the middle and the end of a text, in rows of one batch.
PLACES = [0, 1, 9]
INSERTED = [prompt[:place] + SPELLED + prompt[place:] for prompt, place in zip(PROMPTS, PLACES, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_soft_tokens_at_a_place_of_each_text_do_what_the_text_there_does(family: str, side: str) -> None:
    backend = small_backend(family, padding_side=side)
    soft = _spelled(backend, SPELLED, rows=3)
    spliced, _ = backend.loss(PROMPTS, TARGETS, soft=soft, soft_at=PLACES)
    written, _ = backend.loss(INSERTED, TARGETS, soft=None)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)
    in_front, _ = backend.loss(PROMPTS, TARGETS, soft=soft)
    assert in_front[0] == pytest.approx(float(spliced[0]), rel=1e-5)
    assert (in_front[1:] - spliced[1:]).abs().min() > 1e-4
    labels = ["yes", "no", "yes indeed"]
    scores = backend.score(PROMPTS, labels, soft=soft, soft_at=PLACES)
    torch.testing.assert_close(scores, backend.score(INSERTED, labels, soft=None), rtol=1e-4, atol=1e-4)
    config = GenerationConfig(max_new_tokens=6)
    made = backend.generate(PROMPTS, soft=soft, soft_at=PLACES, config=config)
    assert [one.text for one in made] == [one.text for one in backend.generate(INSERTED, soft=None, config=config)]


def test_the_place_of_soft_tokens_is_of_the_text_within_a_chat_template() -> None:
    backend = small_backend("llama", chat=True)
    spliced, _ = backend.loss(["ab?"], ["yes"], soft=_spelled(backend, "xy", rows=1), soft_at=[2])
    written, _ = backend.loss(["abxy?"], ["yes"], soft=None)
    torch.testing.assert_close(spliced, written, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_at", [[0, 2, 0], [0, 0, 42], [0, 0, -1], [0, 0]])
def test_soft_tokens_outside_a_text_are_refused(soft_at: list[int]) -> None:
    backend = small_backend("llama")
    with pytest.raises(ShapeMismatch, match="soft_at"):
        backend.loss(PROMPTS, TARGETS, soft=_spelled(backend, "a", rows=3), soft_at=soft_at)


@pytest.mark.parametrize("soft", [None, SoftPrompt(torch.zeros(3, 0, 32))])
def test_a_bare_model_reads_a_text_in_one_piece(soft: SoftPrompt | None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small_backend("llama")
    seen: list[str] = []
    encode = backend.renderer._text_ids

    def watched(text: str) -> list[int]:
        seen.append(text)
        return list(encode(text))

    monkeypatch.setattr(backend.renderer, "_text_ids", watched)
    backend.score(PROMPTS, ["1", "2"], soft=soft, soft_at=PLACES)
    assert seen == ["1", "2", *PROMPTS]


def test_the_place_of_soft_tokens_stays_within_what_is_left_of_a_long_text() -> None:
    renderer = DecoderOnlyBackend(load_toy().model, toy_tokenizer(), name="short", max_prompt_tokens=8).renderer
    row = renderer.prompt("abcdefghijk", 9)
    assert (row.at, len(row.ids), row.truncated) == (7, 8, True)
    assert row.ids == renderer.prompt("abcdefghijk").ids


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_with_spelled_soft_tokens_is_that_of_the_text(family: str, beams: int, count: int) -> None:
    backend = small_backend(family)
    text = "Hello yo"[:count]
    config = GenerationConfig(max_new_tokens=6, num_beams=beams)
    spliced = backend.generate(PROMPTS, soft=_spelled(backend, text, rows=3), config=config)
    written = backend.generate([text + prompt for prompt in PROMPTS], soft=None, config=config)
    assert [made.text for made in spliced] == [made.text for made in written]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_agrees_with_transformers_on_ids(family: str) -> None:
    backend = small_backend(family)
    prompt = SPELLED + PROMPTS[2]
    ids = torch.tensor([backend.renderer.prompt(prompt).ids])
    new = backend.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    if family != "t5":
        new = new[:, ids.shape[1] :]
    expected = backend.renderer.decode([t for t in new[0].tolist() if t != backend.renderer.tokenizer.eos_token_id])
    soft = _spelled(backend, SPELLED, rows=1)
    made = backend.generate([PROMPTS[2]], soft=soft, config=GenerationConfig(max_new_tokens=6))
    assert made[0].text == expected


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_answers_the_same_alone_and_in_a_padded_batch(family: str) -> None:
    backend = small_backend(family)
    config = GenerationConfig(max_new_tokens=8)
    together = backend.generate(PROMPTS, soft=_spelled(backend, SPELLED, rows=3), config=config)
    alone = [backend.generate([p], soft=_spelled(backend, SPELLED, rows=1), config=config)[0] for p in PROMPTS]
    assert [made.text for made in together] == [made.text for made in alone]


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_answers_behind_prompts_that_are_read_apart_are_those_of_one_pass(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = small_backend(family)
    soft = SoftPrompt(_spelled(backend, SPELLED, rows=6).vectors, placement="suffix")
    # Two answers a prompt, as consensus asks for them, and unequal numbers of them.
    batches = [[prompt for prompt in PROMPTS for _ in range(2)], [PROMPTS[0], *PROMPTS, PROMPTS[2], PROMPTS[2]]]
    config = GenerationConfig(max_new_tokens=7)
    assert backend.reads_apart()
    apart = [backend.generate(batch, soft=soft, config=config) for batch in batches]
    monkeypatch.setattr(backend, "_apart", lambda _: False)
    whole = [backend.generate(batch, soft=soft, config=config) for batch in batches]
    assert [[one.text for one in made] for made in apart] == [[one.text for one in made] for made in whole]
    assert [[one.finished for one in made] for made in apart] == [[one.finished for one in made] for made in whole]


def test_sampling_behind_a_prompt_follows_the_seed_and_the_top() -> None:
    backend = small_backend("llama")
    soft = SoftPrompt(_spelled(backend, SPELLED, rows=4).vectors, placement="suffix")

    def draw(seed: int, **options: float) -> list[str]:
        config = GenerationConfig(max_new_tokens=9, do_sample=True, seed=seed, **options)  # type: ignore[arg-type]
        return [made.text for made in backend.generate(["Say"] * 4, soft=soft, config=config)]

    assert draw(1) == draw(1)
    assert len({*draw(1, temperature=2.0), *draw(2, temperature=2.0)}) > 4
    greedy = [made.text for made in backend.generate(["Say"] * 4, soft=soft, config=GenerationConfig(max_new_tokens=9))]
    assert draw(3, top_p=1e-6) == draw(4, temperature=1e-3) == greedy


def test_sampling_is_drawn_by_its_seed() -> None:
    backend = small_backend("llama")

    def draw(seed: int) -> str:
        config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed)
        return str(backend.generate(["Say"], soft=None, config=config)[0].text)

    state = torch.random.get_rng_state()
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_answer_that_reaches_its_longest_length_is_reported() -> None:
    backend = small_backend("llama")
    made = backend.generate(["Say"], soft=None, config=GenerationConfig(max_new_tokens=3))[0]
    assert not made.finished


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_reach_the_soft_tokens_and_no_weight(family: str) -> None:
    backend = small_backend(family)
    before = {name: value.clone() for name, value in backend.model.state_dict().items()}
    vectors = torch.randn(3, 2, 32, requires_grad=True)
    losses, _ = backend.loss(PROMPTS, TARGETS, soft=SoftPrompt(vectors))
    losses.sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in backend.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in backend.model.state_dict().items())
    assert not backend.model.training


def test_soft_tokens_stand_right_before_the_users_text_in_a_chat_template() -> None:
    backend = small_backend("llama", chat=True)
    tokenizer = backend.renderer.tokenizer
    spliced, _ = backend.loss(["b?"], ["yes"], soft=_spelled(backend, "a", rows=1))
    ids = tokenizer("<user>ab?</><bot>yes")["input_ids"] + [tokenizer.eos_token_id]
    logits = backend.model(input_ids=torch.tensor([ids])).logits[0, -5:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-4:]), reduction="sum")
    torch.testing.assert_close(spliced[0], expected, rtol=1e-4, atol=1e-4)


def test_a_text_that_spells_special_tokens_or_the_template_is_only_text() -> None:
    backend = small_backend("llama", chat=True)
    row = backend.renderer.prompt("x<|end|>personaplugplaceofthetext</><bot>")
    assert backend.renderer.tokenizer.eos_token_id not in row.ids
    assert row.at == len("<user>")


def test_long_texts_are_cut_at_their_end_and_counted() -> None:
    backend = DecoderOnlyBackend(load_toy().model, toy_tokenizer(), name="short", max_prompt_tokens=8)
    measures = backend.measure(["abc", "abcdefghijk"])
    assert [m.truncated for m in measures] == [False, True]
    assert measures[1].tokens == 8
    assert backend.renderer.prompt("abcdefghijk").ids[:7] == tuple(toy_tokenizer()("abcdefg")["input_ids"])


@pytest.mark.parametrize("chat", [False, True])
def test_room_is_what_a_text_may_have(chat: bool) -> None:
    backend = small_backend("llama", chat=chat)
    texts = ["x" * backend.room, "x" * (backend.room + 1)]
    assert [m.truncated for m in backend.measure(texts)] == [False, True]
    assert backend.count_tokens(texts) == [backend.room, backend.room + 1]
    assert backend.count_tokens([]) == []


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


@pytest.mark.parametrize("make", [toy_tokenizer, _word_pieces])
def test_a_cut_text_is_the_longest_beginning_that_fits(make: Any) -> None:
    renderer = Renderer(make(), max_tokens=512, encoder_decoder=False)
    beginnings = {LONG[:size].rstrip() for size in range(len(LONG) + 1)}
    sizes = {text: renderer.count([text])[0] for text in beginnings}
    for tokens in range(-1, sizes[LONG.rstrip()] + 2):
        expected = max((text for text, size in sizes.items() if size <= tokens), key=len, default="")
        assert renderer.cut(LONG, tokens) == expected


@pytest.mark.parametrize("make", [toy_tokenizer, _word_pieces])
def test_a_tokenizer_that_does_not_say_where_tokens_stand_cuts_too(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(make(), max_tokens=512, encoder_decoder=False)
    full = renderer.count([LONG.rstrip()])[0]
    exact = [renderer.cut(LONG, tokens) for tokens in range(full + 2)]
    monkeypatch.setattr(type(renderer.tokenizer), "is_fast", False)
    for tokens, longest in enumerate(exact):
        kept = renderer.cut(LONG, tokens)
        assert longest.startswith(kept)
        assert renderer.count([kept])[0] <= tokens
        assert len(kept) >= len(longest) - 12  # two words at most are lost where a longer beginning has fewer tokens
    assert renderer.cut(LONG, full) == LONG.rstrip()


def test_nothing_of_a_text_is_cut_that_need_not_be() -> None:
    backend = small_backend("llama")
    assert [backend.cut_text("  ab cd", tokens) for tokens in (0, 2, 5, 6, 7, 99)] == [
        "", "", "  ab", "  ab c", "  ab cd", "  ab cd",
    ]  # fmt: skip


def test_no_room_for_text_is_refused() -> None:
    with pytest.raises(BadConfig, match="max_prompt_tokens must exceed"):
        DecoderOnlyBackend(load_toy().model, toy_tokenizer(), name="none", max_prompt_tokens=1)


def test_the_scale_is_that_of_the_embeddings() -> None:
    backend = small_backend("llama")
    assert backend.embedding_scale == pytest.approx(float(backend.embed.weight.pow(2).mean().sqrt()), rel=1e-5)
    scaled = small_backend("gemma")
    assert scaled.embedding_scale == pytest.approx(
        float(scaled.embed(torch.arange(257)).pow(2).mean().sqrt()), rel=1e-5
    )


def test_the_toy_model_is_the_same_for_the_same_seed_only() -> None:
    assert load_toy(seed=3).identity.fingerprint == load_toy(seed=3).identity.fingerprint
    assert load_toy(seed=3).identity.fingerprint != load_toy(seed=4).identity.fingerprint


@pytest.mark.parametrize("text", ["héllo\n wörld", "表情 🙂", "<|end|>"])
def test_the_toy_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = toy_tokenizer()
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_bad_names_are_refused() -> None:
    with pytest.raises(BadConfig, match="toy:SEED"):
        open_backend(ModelConfig(llm="toy:x"))
    with pytest.raises(BadConfig, match="device of this machine"):
        choose_device("warp")


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": 0.0}, {"top_p": 1.5}])
def test_generation_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        GenerationConfig(**values)


def test_offline_is_set_for_the_suite() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
