"""Answers written side by side are those that would be written alone, whoever comes and goes meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import DecoderOnlyBackend
from personaplug.llm.continuous_batching import Row, RunningRows
from personaplug.llm.soft_prompt import SoftPrompt

PROMPTS = ["one", "a somewhat longer prompt", "", "x y z " * 9, "rate this film", "and this"]


def _soft(backend: DecoderOnlyBackend, seed: int, *, placement: str | None, tokens: int = 3) -> SoftPrompt | None:
    if placement is None:
        return None
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, tokens, backend.identity.width, generator=draw) * backend.embedding_scale
    return SoftPrompt(vectors, placement=placement)


def _row(backend: DecoderOnlyBackend, number: int, *, placement: str | None, config: GenerationConfig) -> Row:
    prompt = backend.renderer.prompt(PROMPTS[number])
    return Row(prompt, _soft(backend, number, placement=placement), config)


def _alone(backend: DecoderOnlyBackend, number: int, *, placement: str | None, config: GenerationConfig) -> str:
    soft = _soft(backend, number, placement=placement)
    return backend.generate([PROMPTS[number]], soft=soft, config=config)[0].text


def _finish(running: RunningRows, rows: Sequence[Row]) -> None:
    while any(row.ended is None for row in rows):
        running.step()


@pytest.mark.parametrize("placement", [None, "prefix", "suffix"])
def test_they_are_the_answers_that_are_written_alone(toy: DecoderOnlyBackend, placement: str | None) -> None:
    lengths = [1, 12, 5, 20, 3, 8]
    configs = [GenerationConfig(max_new_tokens=length) for length in lengths]
    rows = [_row(toy, number, placement=placement, config=config) for number, config in enumerate(configs)]
    running = RunningRows(toy)
    running.admit(rows[:2])
    for _ in range(3):
        running.step()
    running.admit(rows[2:5])  # while others go on
    running.step()
    running.admit(rows[5:])
    _finish(running, rows)
    for number, (row, config) in enumerate(zip(rows, configs, strict=True)):
        assert toy.renderer.decode(row.ids) == _alone(toy, number, placement=placement, config=config)
    assert len(running) == 0


def test_placements_and_widths_of_soft_tokens_may_be_mixed(toy: DecoderOnlyBackend) -> None:
    config = GenerationConfig(max_new_tokens=10)
    kinds = [None, "prefix", "suffix", "prefix", "suffix", None]
    rows = [_row(toy, number, placement=kind, config=config) for number, kind in enumerate(kinds)]
    running = RunningRows(toy)
    running.admit(rows)
    _finish(running, rows)
    for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        assert toy.renderer.decode(row.ids) == _alone(toy, number, placement=kind, config=config)


def test_a_draw_is_the_same_in_any_company(toy: DecoderOnlyBackend) -> None:
    config = GenerationConfig(max_new_tokens=15, do_sample=True, temperature=1.5, top_p=0.9, seed=7)
    greedy = GenerationConfig(max_new_tokens=9)
    one, other = (_row(toy, 1, placement="suffix", config=config) for _ in range(2))
    running = RunningRows(toy)
    running.admit([one])
    _finish(running, [one])
    company = [_row(toy, number, placement="prefix", config=greedy) for number in (0, 3, 4)]
    running.admit(company[:2])
    running.step()
    running.admit([other, company[2]])
    _finish(running, [other, *company])
    assert one.ids == other.ids
    assert one.ids != _row_of(toy, 8, config=config).ids


def _row_of(toy: DecoderOnlyBackend, seed: int, *, config: GenerationConfig) -> Row:
    row = _row(toy, 1, placement="suffix", config=GenerationConfig(**{**vars(config), "seed": seed}))
    running = RunningRows(toy)
    running.admit([row])
    _finish(running, [row])
    return row


def test_the_end_of_text_ends_an_answer_and_is_no_part_of_it(toy: DecoderOnlyBackend) -> None:
    long = GenerationConfig(max_new_tokens=60, do_sample=True, temperature=3.0, seed=2)
    rows = [
        Row(toy.renderer.prompt(f"prompt {n}"), None, GenerationConfig(**{**vars(long), "seed": n})) for n in range(24)
    ]
    running = RunningRows(toy)
    running.admit(rows)
    _finish(running, rows)
    ended = {row.ended for row in rows}
    assert ended == {"stop", "length"}  # at this temperature some of them meet the end of text
    assert not any(token in toy.end_ids() for row in rows for token in row.ids)
    assert all(len(row.ids) == 60 for row in rows if row.ended == "length")


def test_choices_are_kept_to(toy: DecoderOnlyBackend) -> None:
    labels = ["1", "2 stars", "23", "zebra"]
    choices = toy.renderer.answers(labels)
    rows = []
    for seed in range(12):
        config = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=2.0, seed=seed)
        rows.append(Row(toy.renderer.prompt("which"), None, config, choices))
    running = RunningRows(toy)
    running.admit(rows)
    _finish(running, rows)
    written = {toy.renderer.decode(row.ids) for row in rows}
    assert written <= set(labels)
    assert len(written) > 1
    assert {row.ended for row in rows} == {"stop"}


def test_a_row_that_is_given_up_is_no_longer_run(toy: DecoderOnlyBackend) -> None:
    config = GenerationConfig(max_new_tokens=10)
    rows = [_row(toy, number, placement="suffix", config=config) for number in (0, 1, 3)]
    running = RunningRows(toy)
    running.admit(rows)
    running.step()
    rows[1].ended = "stop"
    assert len(running) == 2
    _finish(running, rows)
    assert len(rows[1].ids) == 2
    assert toy.renderer.decode(rows[2].ids) == _alone(toy, 3, placement="suffix", config=config)


def test_rows_come_and_go_at_random(toy: DecoderOnlyBackend) -> None:
    draw = random.Random(0)
    running, waiting, rows = RunningRows(toy), list(range(40)), []
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
        assert toy.renderer.decode(row.ids) == _alone(toy, prompt, placement="suffix", config=config)


def test_a_row_with_a_users_phrases_writes_them_beside_others(toy: DecoderOnlyBackend) -> None:
    config, soft = GenerationConfig(max_new_tokens=20), [_soft(toy, n, placement="suffix") for n in range(3)]
    mine = [toy.phrases(["Why Music, Part 2"] * 90), None, toy.phrases(["On tea"] * 90)]
    rows = [Row(toy.renderer.prompt(PROMPTS[n]), soft[n], config, phrases=mine[n]) for n in range(3)]
    running = RunningRows(toy)
    running.admit(rows)
    _finish(running, rows)
    said = [toy.renderer.decode(row.ids) for row in rows]
    assert said == ["Why Music, Part 2", _alone(toy, 1, placement="suffix", config=config), "On tea"]
    alone = toy.generate([PROMPTS[0]], soft=soft[0], config=config, phrases=[toy.phrases(["Why Music, Part 2"] * 90)])
    assert alone[0].text == said[0]
