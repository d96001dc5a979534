"""Responses decoded in a batch equal responses decoded alone, while slots join and leave."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Slot, SlotCopying
from personaplug.llm.copied_answers import copy_source
from personaplug.llm.copy_head import Copying
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["one", "a somewhat longer prompt", "", "x y z " * 9, "rate this film", "and this"]


def _soft(llm: CausalLM, seed: int, *, placement: str | None, tokens: int = 3) -> SoftPrompt | None:
    if placement is None:
        return None
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, tokens, llm.identity.width, generator=draw) * llm.embedding_scale
    return SoftPrompt(vectors, placement=placement)


def _slot(llm: CausalLM, number: int, *, placement: str | None, config: GenerationConfig) -> Slot:
    prompt = llm.prompt_tokenizer.encode_prompt(PROMPTS[number])
    return Slot(prompt, _soft(llm, number, placement=placement), config)


def _alone(llm: CausalLM, number: int, *, placement: str | None, config: GenerationConfig) -> str:
    soft = _soft(llm, number, placement=placement)
    return llm.generate(PromptBatch([PROMPTS[number]], soft), config)[0].text


def _finish(batch: ContinuousBatch, slots: Sequence[Slot]) -> None:
    while any(slot.ended is None for slot in slots):
        batch.step()


@pytest.mark.parametrize("placement", [None, "prefix", "suffix"])
def test_slots_that_join_later_equal_generate(toy: CausalLM, placement: str | None) -> None:
    lengths = [1, 12, 5, 20, 3, 8]
    configs = [GenerationConfig(max_new_tokens=length) for length in lengths]
    slots = [_slot(toy, number, placement=placement, config=config) for number, config in enumerate(configs)]
    batch = ContinuousBatch(toy)
    batch.add(slots[:2])
    for _ in range(3):
        batch.step()
    batch.add(slots[2:5])  # while others are active
    batch.step()
    batch.add(slots[5:])
    _finish(batch, slots)
    for number, (slot, config) in enumerate(zip(slots, configs, strict=True)):
        assert toy.prompt_tokenizer.decode(slot.ids) == _alone(toy, number, placement=placement, config=config)
    assert len(batch) == 0


def test_slots_with_different_placements_equal_generate(toy: CausalLM) -> None:
    config = GenerationConfig(max_new_tokens=10)
    kinds = [None, "prefix", "suffix", "prefix", "suffix", None]
    slots = [_slot(toy, number, placement=kind, config=config) for number, kind in enumerate(kinds)]
    batch = ContinuousBatch(toy)
    batch.add(slots)
    _finish(batch, slots)
    for number, (slot, kind) in enumerate(zip(slots, kinds, strict=True)):
        assert toy.prompt_tokenizer.decode(slot.ids) == _alone(toy, number, placement=kind, config=config)


def test_sampling_does_not_depend_on_other_slots(toy: CausalLM) -> None:
    config = GenerationConfig(max_new_tokens=15, do_sample=True, temperature=1.5, top_p=0.9, seed=7)
    greedy = GenerationConfig(max_new_tokens=9)
    one, other = (_slot(toy, 1, placement="suffix", config=config) for _ in range(2))
    batch = ContinuousBatch(toy)
    batch.add([one])
    _finish(batch, [one])
    other_slots = [_slot(toy, number, placement="prefix", config=greedy) for number in (0, 3, 4)]
    batch.add(other_slots[:2])
    batch.step()
    batch.add([other, other_slots[2]])
    _finish(batch, [other, *other_slots])
    assert one.ids == other.ids
    assert one.ids != _finished_slot(toy, 8, config=config).ids


def _finished_slot(toy: CausalLM, seed: int, *, config: GenerationConfig) -> Slot:
    slot = _slot(toy, 1, placement="suffix", config=GenerationConfig(**{**vars(config), "seed": seed}))
    batch = ContinuousBatch(toy)
    batch.add([slot])
    _finish(batch, [slot])
    return slot


def test_end_token_ends_slot_and_is_not_in_ids(toy: CausalLM) -> None:
    long = GenerationConfig(max_new_tokens=60, do_sample=True, temperature=3.0, seed=2)
    slots = [
        Slot(toy.prompt_tokenizer.encode_prompt(f"prompt {n}"), None, GenerationConfig(**{**vars(long), "seed": n}))
        for n in range(24)
    ]
    batch = ContinuousBatch(toy)
    batch.add(slots)
    _finish(batch, slots)
    ended = {slot.ended for slot in slots}
    assert ended == {"stop", "length"}  # at this temperature, some slots draw the end token
    assert not any(token in toy.end_ids for slot in slots for token in slot.ids)
    assert all(len(slot.ids) == 60 for slot in slots if slot.ended == "length")


def test_choices_limit_responses(toy: CausalLM) -> None:
    labels = ["1", "2 stars", "23", "zebra"]
    choices = toy.prompt_tokenizer.encode_labels(labels)
    slots = []
    for seed in range(12):
        config = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=2.0, seed=seed)
        slots.append(Slot(toy.prompt_tokenizer.encode_prompt("which"), None, config, choices))
    batch = ContinuousBatch(toy)
    batch.add(slots)
    _finish(batch, slots)
    responses = {toy.prompt_tokenizer.decode(slot.ids) for slot in slots}
    assert responses <= set(labels)
    assert len(responses) > 1
    assert {slot.ended for slot in slots} == {"stop"}


def test_slot_that_a_caller_ends_stops_decoding(toy: CausalLM) -> None:
    config = GenerationConfig(max_new_tokens=10)
    slots = [_slot(toy, number, placement="suffix", config=config) for number in (0, 1, 3)]
    batch = ContinuousBatch(toy)
    batch.add(slots)
    batch.step()
    slots[1].ended = "stop"
    assert len(batch) == 2
    _finish(batch, slots)
    assert len(slots[1].ids) == 2
    assert toy.prompt_tokenizer.decode(slots[2].ids) == _alone(toy, 3, placement="suffix", config=config)


def test_slots_that_join_at_random_equal_generate(toy: CausalLM) -> None:
    draw = random.Random(0)
    batch, waiting, slots = ContinuousBatch(toy), list(range(40)), []
    settings = {}
    while waiting or len(batch):
        if waiting and draw.random() < 0.5:
            numbers = [waiting.pop() for _ in range(min(len(waiting), draw.randint(1, 4)))]
            for number in numbers:
                settings[number] = (number % len(PROMPTS), GenerationConfig(max_new_tokens=draw.randint(1, 15)))
            new_slots = [_slot(toy, settings[n][0], placement="suffix", config=settings[n][1]) for n in numbers]
            slots += list(zip(numbers, new_slots, strict=True))
            batch.add(new_slots)
        batch.step()
    assert len(slots) == 40
    for number, slot in slots:
        prompt, config = settings[number]
        assert toy.prompt_tokenizer.decode(slot.ids) == _alone(toy, prompt, placement="suffix", config=config)


def test_slots_with_a_copy_head_equal_generate(toy: CausalLM) -> None:
    config, soft = GenerationConfig(max_new_tokens=20), [_soft(toy, n, placement="suffix") for n in range(3)]
    head = toy.new_copy_head(seed=0)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor([0.0, 0.0, 6.0]))
    own = [copy_source(toy, head, answers) for answers in (["Why Music, Part 2"], [], ["On tea"])]
    copying = [Copying(head, [own[0]]), None, Copying(head, [own[2]])]
    slots = [
        Slot(
            toy.prompt_tokenizer.encode_prompt(PROMPTS[n]),
            soft[n],
            config,
            copying=None if copying[n] is None else SlotCopying(head, own[n]),
        )
        for n in range(3)
    ]
    batch = ContinuousBatch(toy)
    batch.add(slots)
    _finish(batch, slots)
    texts = [toy.prompt_tokenizer.decode(slot.ids) for slot in slots]
    alone = [toy.generate(PromptBatch([PROMPTS[n]], soft[n], copying=copying[n]), config)[0].text for n in range(3)]
    assert texts == alone
    assert alone[0] != _alone(toy, 0, placement="suffix", config=config)
