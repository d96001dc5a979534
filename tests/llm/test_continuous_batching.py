"""Answers written side by side are those that would be written alone, whoever comes and goes meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Row
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["one", "a somewhat longer prompt", "", "x y z " * 9, "rate this film", "and this"]


def _soft(llm: CausalLM, seed: int, *, placement: str | None, tokens: int = 3) -> SoftPrompt | None:
    if placement is None:
        return None
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, tokens, llm.identity.width, generator=draw) * llm.embedding_scale
    return SoftPrompt(vectors, placement=placement)


def _row(llm: CausalLM, number: int, *, placement: str | None, config: GenerationConfig) -> Row:
    prompt = llm.prompt_tokenizer.prompt(PROMPTS[number])
    return Row(prompt, _soft(llm, number, placement=placement), config)


def _alone(llm: CausalLM, number: int, *, placement: str | None, config: GenerationConfig) -> str:
    soft = _soft(llm, number, placement=placement)
    return llm.generate([PROMPTS[number]], soft=soft, config=config)[0].text


def _finish(running: ContinuousBatch, rows: Sequence[Row]) -> None:
    while any(row.ended is None for row in rows):
        running.step()


@pytest.mark.parametrize("placement", [None, "prefix", "suffix"])
def test_they_are_the_answers_that_are_written_alone(toy: CausalLM, placement: str | None) -> None:
    lengths = [1, 12, 5, 20, 3, 8]
    configs = [GenerationConfig(max_new_tokens=length) for length in lengths]
    rows = [_row(toy, number, placement=placement, config=config) for number, config in enumerate(configs)]
    running = ContinuousBatch(toy)
    running.admit(rows[:2])
    for _ in range(3):
        running.step()
    running.admit(rows[2:5])  # while others go on
    running.step()
    running.admit(rows[5:])
    _finish(running, rows)
    for number, (row, config) in enumerate(zip(rows, configs, strict=True)):
        assert toy.prompt_tokenizer.decode(row.ids) == _alone(toy, number, placement=placement, config=config)
    assert len(running) == 0


def test_placements_and_widths_of_soft_tokens_may_be_mixed(toy: CausalLM) -> None:
    config = GenerationConfig(max_new_tokens=10)
    kinds = [None, "prefix", "suffix", "prefix", "suffix", None]
    rows = [_row(toy, number, placement=kind, config=config) for number, kind in enumerate(kinds)]
    running = ContinuousBatch(toy)
    running.admit(rows)
    _finish(running, rows)
    for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        assert toy.prompt_tokenizer.decode(row.ids) == _alone(toy, number, placement=kind, config=config)


def test_a_draw_is_the_same_in_any_company(toy: CausalLM) -> None:
    config = GenerationConfig(max_new_tokens=15, do_sample=True, temperature=1.5, top_p=0.9, seed=7)
    greedy = GenerationConfig(max_new_tokens=9)
    one, other = (_row(toy, 1, placement="suffix", config=config) for _ in range(2))
    running = ContinuousBatch(toy)
    running.admit([one])
    _finish(running, [one])
    company = [_row(toy, number, placement="prefix", config=greedy) for number in (0, 3, 4)]
    running.admit(company[:2])
    running.step()
    running.admit([other, company[2]])
    _finish(running, [other, *company])
    assert one.ids == other.ids
    assert one.ids != _row_of(toy, 8, config=config).ids


def _row_of(toy: CausalLM, seed: int, *, config: GenerationConfig) -> Row:
    row = _row(toy, 1, placement="suffix", config=GenerationConfig(**{**vars(config), "seed": seed}))
    running = ContinuousBatch(toy)
    running.admit([row])
    _finish(running, [row])
    return row


def test_the_end_of_text_ends_an_answer_and_is_no_part_of_it(toy: CausalLM) -> None:
    long = GenerationConfig(max_new_tokens=60, do_sample=True, temperature=3.0, seed=2)
    rows = [
        Row(toy.prompt_tokenizer.prompt(f"prompt {n}"), None, GenerationConfig(**{**vars(long), "seed": n}))
        for n in range(24)
    ]
    running = ContinuousBatch(toy)
    running.admit(rows)
    _finish(running, rows)
    ended = {row.ended for row in rows}
    assert ended == {"stop", "length"}  # at this temperature some of them meet the end of text
    assert not any(token in toy.end_ids() for row in rows for token in row.ids)
    assert all(len(row.ids) == 60 for row in rows if row.ended == "length")


def test_choices_are_kept_to(toy: CausalLM) -> None:
    labels = ["1", "2 stars", "23", "zebra"]
    choices = toy.prompt_tokenizer.answers(labels)
    rows = []
    for seed in range(12):
        config = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=2.0, seed=seed)
        rows.append(Row(toy.prompt_tokenizer.prompt("which"), None, config, choices))
    running = ContinuousBatch(toy)
    running.admit(rows)
    _finish(running, rows)
    written = {toy.prompt_tokenizer.decode(row.ids) for row in rows}
    assert written <= set(labels)
    assert len(written) > 1
    assert {row.ended for row in rows} == {"stop"}


def test_a_row_that_is_given_up_is_no_longer_run(toy: CausalLM) -> None:
    config = GenerationConfig(max_new_tokens=10)
    rows = [_row(toy, number, placement="suffix", config=config) for number in (0, 1, 3)]
    running = ContinuousBatch(toy)
    running.admit(rows)
    running.step()
    rows[1].ended = "stop"
    assert len(running) == 2
    _finish(running, rows)
    assert len(rows[1].ids) == 2
    assert toy.prompt_tokenizer.decode(rows[2].ids) == _alone(toy, 3, placement="suffix", config=config)


def test_rows_come_and_go_at_random(toy: CausalLM) -> None:
    draw = random.Random(0)
    running, waiting, rows = ContinuousBatch(toy), list(range(40)), []
    made = {}
    while waiting or len(running):
        if waiting and draw.random() < 0.5:
            several = [waiting.pop() for _ in range(min(len(waiting), draw.randint(1, 4)))]
            for number in several:
                made[number] = (number % len(PROMPTS), GenerationConfig(max_new_tokens=draw.randint(1, 15)))
            coming = [_row(toy, made[n][0], placement="suffix", config=made[n][1]) for n in several]
            rows += list(zip(several, coming, strict=True))
            running.admit(coming)
        running.step()
    assert len(rows) == 40
    for number, row in rows:
        prompt, config = made[number]
        assert toy.prompt_tokenizer.decode(row.ids) == _alone(toy, prompt, placement="suffix", config=config)


def test_a_row_with_a_users_phrases_writes_them_beside_others(toy: CausalLM) -> None:
    config, soft = GenerationConfig(max_new_tokens=20), [_soft(toy, n, placement="suffix") for n in range(3)]
    mine = [toy.phrases(["Why Music, Part 2"] * 90), None, toy.phrases(["On tea"] * 90)]
    rows = [Row(toy.prompt_tokenizer.prompt(PROMPTS[n]), soft[n], config, phrases=mine[n]) for n in range(3)]
    running = ContinuousBatch(toy)
    running.admit(rows)
    _finish(running, rows)
    said = [toy.prompt_tokenizer.decode(row.ids) for row in rows]
    assert said == ["Why Music, Part 2", _alone(toy, 1, placement="suffix", config=config), "On tea"]
    alone = toy.generate([PROMPTS[0]], soft=soft[0], config=config, phrases=[toy.phrases(["Why Music, Part 2"] * 90)])
    assert alone[0].text == said[0]
