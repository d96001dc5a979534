"""Synthetic samples: from a scripted model that follows requests, and from the toy model, which does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from personaplug.cli.main import main
from personaplug.data import load_task, open_dataset, write_lamp
from personaplug.data.records import Chat, HistoryItem, Sample, last_message
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT, lamp_task, parse_task
from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError
from personaplug.llm.base import Generation, GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.tiny import load_tiny_llm
from personaplug.run import Models
from personaplug.training.synthesis import SynthesisConfig, Synthesizer

STARS = lamp_task("LaMP_3")
OPENING = "Which score? review: "
_VOCABULARY = """
rain sun wind snow tea milk bread salt river lake hill road king queen child friend horse
sheep bird fish slow quick loud quiet warm cold old new red blue green dark walks sings
sleeps jumps finds loses builds burns under over near behind with without before after house tower garden
bridge paper stone glass wood clock lamp door window
"""
WORDS = _VOCABULARY.split()

Reply = Callable[[Chat, int], tuple[str, bool]]


def _text(seed: int, *, words: int = 0) -> str:
    """A text of 6 to 12 random words; equal seeds give equal texts."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, size=words or int(rng.integers(6, 13)), replace=False).tolist())


def _new(number: int) -> str:
    """A new text that shares five words with a real one."""
    words = _text(number % 4).split()[:5]
    return " ".join([*words, *_text(100 + number, words=4).split()])


def _item(number: int, user: int) -> HistoryItem:
    fields = (("text", f"own {user} {_text(900 + 10 * user + number)}"), ("score", str(1 + (user + number) % 2)))
    return HistoryItem(f"{user}-{number}", fields, "score")


def _real() -> list[Sample]:
    samples = []
    for user in range(6):
        history = tuple(_item(number, user) for number in range(5))
        for number in range(4):
            query, target = _text(10 * user + number), str(1 + number % 2)
            samples.append(Sample(f"{user}/{number}", f"u{user}", OPENING + query, query, target, history))
    return samples


class Writer(CausalLM):
    """The toy model with scripted replies, each from the conversation and the number of the request."""

    reply: Reply
    requests: list[Chat]

    def score(self, batch: PromptBatch, labels: Sequence[str]) -> Tensor:
        self.requests += [prompt for prompt in batch.prompts if isinstance(prompt, Chat)]
        return super().score(batch, labels)

    def generate(self, batch: PromptBatch, config: GenerationConfig) -> list[Generation]:
        assert config.do_sample
        replies = []
        for prompt in batch.prompts:
            assert isinstance(prompt, Chat)
            self.requests.append(prompt)
            replies.append(Generation(*self.reply(prompt, len(self.requests))))
        return replies


@pytest.fixture
def writer() -> Writer:
    llm: Any = load_tiny_llm(max_prompt_tokens=1024)
    llm.__class__, llm.requests, llm.reply = Writer, [], _good
    scripted: Writer = llm
    return scripted


def _is_for_an_input(prompt: Chat) -> bool:
    return last_message(prompt).startswith("Text ")


def _good(prompt: Chat, number: int) -> tuple[str, bool]:
    if _is_for_an_input(prompt):
        return _new(number), True
    return "", True


def _synthesizer(
    writer: CausalLM, real: Sequence[Sample] | None = None, *, task: Task = STARS, **settings: int
) -> Synthesizer:
    models = Models(HashEncoder(256), writer)
    return Synthesizer(real or _real(), task=task, models=models, config=SynthesisConfig(**settings))


def test_synthetic_sample_has_the_wording_and_history_of_a_real_user(writer: Writer) -> None:
    real = _real()
    synthesizer = _synthesizer(writer, real, samples=20)
    samples = synthesizer.write()
    assert len(samples) == synthesizer.report.kept >= 10, synthesizer.report.lines()
    histories = {sample.user_id: sample.history for sample in real}
    for sample in samples:
        assert sample.prompt == OPENING + sample.query
        assert sample.history == histories[sample.user_id]
        assert sample.target in ("1", "2")
    assert len({sample.id for sample in samples} | {sample.id for sample in real}) == len(samples) + 24
    assert len({sample.user_id for sample in samples}) > 3


def test_input_examples_are_from_all_users_and_answer_examples_from_one_user(writer: Writer) -> None:
    _synthesizer(writer, samples=8, examples=3).write()
    for prompt in writer.requests:
        questions = [text for role, text in prompt.turns if role == "user"]
        answers = [text for role, text in prompt.turns if role == "assistant"]
        assert len(answers) == 3
        if _is_for_an_input(prompt):
            assert set(answers) <= {sample.query for sample in _real()}
        else:
            assert questions[0].startswith(OPENING.strip())
            assert len({text.partition("own ")[2][0] for text in questions[:-1]}) == 1, "all of one user"
            assert set(answers) <= {"1", "2"}


def test_short_history_is_supplemented_with_answers_of_other_users(writer: Writer) -> None:
    real = [replace(sample, history=sample.history[:1]) for sample in _real()]
    _synthesizer(writer, real, samples=4).write()
    answered = [prompt for prompt in writer.requests if not _is_for_an_input(prompt)]
    assert answered
    for prompt in answered:
        *others, own, new = [text for role, text in prompt.turns if role == "user"]
        assert not any("own " in text for text in (*others, new))
        assert "own " in own, "the user's own answer stands next to the new input"


def test_equal_seeds_give_equal_samples(writer: Writer) -> None:
    first, again = (_synthesizer(writer, samples=6, seed=1).write() for _ in range(2))
    other = _synthesizer(writer, samples=6, seed=2).write()
    assert [s.user_id for s in first] == [s.user_id for s in again] != [s.user_id for s in other]


def test_each_filter_counts_the_samples_that_it_leaves_out(writer: Writer) -> None:
    copied = _text(3)
    inputs = [
        *map(_new, range(1, 5)),
        f"{_new(1).upper()}!",
        "",
        _new(5)[:30],
        "rain",
        f"{copied.capitalize()}.",
        _item(2, 3).fields[0][1],
        " ".join(sorted(copied.split())),
        "12,5 / 17 = 0,735; 3 + 4 × 5 – 6 = 17 (%)",
    ]
    writer.reply = lambda prompt, number: (inputs[-number], number != 6)
    synthesizer = _synthesizer(writer, samples=len(inputs))
    samples = synthesizer.write()
    assert dict(synthesizer.report.left_out) == {
        "examples too long for a prompt": 0,
        "inputs that are empty or cut": 2,
        "inputs that do not fit the task's prompt": 0,
        "inputs of an unusual length": 1,
        "inputs that repeat a real one": 2,
        "inputs that repeat each other": 1,
        "near copies of a real input": 1,
        "inputs unlike all real ones": 1,
        "input and answers too long for a prompt": 0,
        "answers beyond their label's share": 4 - len(samples),
    }


def test_labels_have_their_real_shares_although_the_model_prefers_one(writer: Writer) -> None:
    real = [replace(sample, target="4" if number % 4 else "2") for number, sample in enumerate(_real())]
    synthesizer = _synthesizer(writer, real, samples=24)
    labels = [sample.target for sample in synthesizer.write()]
    assert set(labels) == {"2", "4"}, "no label without a real answer"
    assert 0.15 <= labels.count("2") / len(labels) <= 0.35


def test_check_labels_compares_the_probability_of_right_labels_with_chance(writer: Writer) -> None:
    real = [replace(sample, history=()) for sample in _real()]
    line = _synthesizer(writer, real).check_labels()
    assert line.startswith("probability of the right label for 24 real inputs: ")
    assert line.endswith("% (chance: 50%)")
    for prompt in writer.requests:
        texts = [text.rpartition(". ")[2] for role, text in prompt.turns if role == "user"]
        assert texts[-1] not in texts[:-1], "the right answer is not among the examples"


def test_generated_answers_must_be_complete_and_of_usual_length(writer: Writer) -> None:
    task = parse_task({"name": "Sum", "kind": "text", "item_fields": ["text"], "query_after": "review: "})
    real = [replace(sample, target=_text(n, words=5), history=()) for n, sample in enumerate(_real())]
    fine = _text(3, words=5)
    answers = ["", fine, "cut off", "!", "as long as nothing " * 9]

    def reply(prompt: Chat, number: int) -> tuple[str, bool]:
        return _good(prompt, number) if _is_for_an_input(prompt) else (answers[number - 6], number != 8)

    writer.reply = reply
    synthesizer = _synthesizer(writer, real, task=task, samples=5)
    assert [sample.target for sample in synthesizer.write()] == [fine], synthesizer.report.lines()
    assert synthesizer.report.left_out["answers that are empty or cut"] == 2
    assert synthesizer.report.left_out["answers of an unusual length"] == 2


def test_examples_that_do_not_fit_the_prompt_are_left_out_and_counted(writer: Writer) -> None:
    narrow: Any = load_tiny_llm(max_prompt_tokens=200)
    narrow.__class__, narrow.requests, narrow.reply = Writer, [], _good
    _synthesizer(narrow, samples=4).write()
    example_counts = [sum(role == "assistant" for role, _ in prompt.turns) for prompt in narrow.requests]
    assert 0 < max(example_counts) < 4
    assert all(narrow.measure([prompt])[0].truncated is False for prompt in narrow.requests)
    tiny: Any = load_tiny_llm(max_prompt_tokens=40)
    synthesizer = _synthesizer(tiny, samples=4)
    assert synthesizer.write() == []
    assert synthesizer.report.left_out["examples too long for a prompt"] == 4


def test_chat_inputs_are_generated_from_the_users_messages_and_preferences(writer: Writer) -> None:
    preference = HistoryItem("p", (("preference", "Short, please."),), kind="preference")
    refused = HistoryItem("r", (("question", "Why?"), ("answer", "NO")), "answer", kind="rejection")
    real = []
    for user in range(6):
        own = tuple(
            HistoryItem(
                str(n),
                (("question", f"Is {_text(50 + 4 * user + n)} of {user} ok?"), ("answer", f"Yes, {user} {n}.")),
                "answer",
            )
            for n in range(4)
        )
        query = f"What does {_text(user, words=6 + user)} mean?"
        real.append(Sample(str(user), f"u{user}", query, query, f"Not much {user}", (*own, preference, refused)))

    def reply(prompt: Chat, number: int) -> tuple[str, bool]:
        return (
            f"What does {_text(70 + number, words=8)} mean?" if _is_for_an_input(prompt) else f"So much: {number}",
            True,
        )

    writer.reply = reply
    samples = _synthesizer(writer, real, task=CHAT, samples=6).write()
    assert samples
    assert all(sample.prompt == sample.query for sample in samples)
    for prompt in writer.requests:
        texts = [text for _, text in prompt.turns]
        assert not any("NO" in text for text in texts)
        examples = [text for role, text in prompt.turns if role == "assistant"]
        assert len({text.split()[-2] for text in examples}) == 1, "all of one user"
        assert all(("of" in text) == _is_for_an_input(prompt) for text in examples)
        if not _is_for_an_input(prompt):
            assert texts[0].startswith("Short, please.\n\n1. Is ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda real: real[:4], "found 4"),
        (lambda real: [replace(real[0], target=None), *real[1:]], "have none"),
        (lambda real: [replace(sample, query=f"x {sample.query}") for sample in real], "several pieces"),
    ],
)
def test_rejects_real_samples_that_cannot_be_examples(
    change: Callable[[list[Sample]], list[Sample]], message: str, writer: Writer
) -> None:
    with pytest.raises(ConfigError, match=message):
        _synthesizer(writer, change(_real()))


@pytest.mark.parametrize("settings", [{"examples": 2}, {"examples": 9}, {"samples": -1}, {"seed": -1}])
def test_rejects_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="found"):
        SynthesisConfig(**settings)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_lamp(_real(), folder, "train", task=STARS)
    write_lamp([replace(sample, id=f"dev-{sample.id}") for sample in _real()[:3]], folder, "dev", task=STARS)
    (folder / "dev_oracle.json").write_text("{}")
    return folder


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, ["synthesize", *map(str, words), "llm=toy", "encoder=hash"])


def test_command_fails_if_filters_remove_all_samples(data: Path, tmp_path: Path) -> None:
    done = _call("--data", data, "--out", tmp_path / "more", "--samples", 8)
    assert done.exit_code == 2, done.output
    assert "kept: 0 of 8" in done.output
    assert "no data set was written" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_command_writes_real_and_synthetic_samples_and_copies_dev(
    data: Path, tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personaplug.run.open_llm", lambda config: writer)
    done = _call("--data", data, "--out", tmp_path / "more", "--samples", 10, "--real", 9)
    assert done.exit_code == 0, done.output
    assert "9 real samples and 10 synthetic samples" in done.output
    train = list(open_dataset(tmp_path / "more", "train"))
    whole = {sample.id: sample for sample in _real()}
    assert [whole[sample.id] for sample in train[:9]] == train[:9]
    assert len(train) == 19
    assert len({sample.user_id for sample in train}) == 3, "two whole users and a part of the third"
    for name in ("dev_questions.json", "dev_outputs.json", "dev_oracle.json"):
        assert (tmp_path / "more" / name).read_bytes() == (data / name).read_bytes()
    assert load_task(tmp_path / "more") == STARS
    again = _call("--data", data, "--out", tmp_path / "more", "--samples", 0)
    assert (again.exit_code, "exists already" in again.output) == (2, True)


def test_samples_0_selects_real_samples_by_seed_without_a_model(data: Path, tmp_path: Path) -> None:
    def real_ids(limit: int, seed: int) -> set[str]:
        out = tmp_path / f"{limit}-{seed}"
        done = _call("--data", data, "--out", out, "--samples", 0, "--real", limit, "--seed", seed)
        assert done.exit_code == 0, done.output
        return {question["id"] for question in json.loads((out / "train_questions.json").read_text())}

    few, more, other = real_ids(5, 0), real_ids(9, 0), real_ids(9, 1)
    assert (len(few), len(more)) == (5, 9)
    assert few < more != other
    too_many = _call("--data", data, "--out", tmp_path / "x", "--samples", 0, "--real", 99)
    assert (too_many.exit_code, "from 1 to 24, found 99" in too_many.output) == (2, True)
