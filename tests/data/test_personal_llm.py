"""PersonalLLM: simulated users follow their weights, train has no request of dev, and a seed determines all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import SECRET, choice, shape, write

from personaplug.data import open_dataset, write_lamp
from personaplug.data.benchmarks.personal_llm import PersonalLLMReader, SimulatedUsers
from personaplug.errors import ConfigError, RecordError

FEW = SimulatedUsers(count=3, shortest=4, longest=6, queries_per_user=2)


def published(folder: Path) -> Path:
    write(folder / "data" / "train.jsonl", [choice(number) for number in range(30)])
    write(folder / "data" / "test.jsonl", [choice(number) for number in range(100, 103)])
    return folder


def best(user: int, number: int, alpha: float = FEW.alpha) -> str:
    """Return the response that a user prefers among those of `choice`; each reward model prefers one response."""
    weights = np.random.default_rng([FEW.seed, user]).dirichlet([alpha] * 10)
    scores = np.zeros(8)
    np.add.at(scores, (np.arange(10) + number) % 8, weights)
    return f"answer {scores.argmax() + 1} to {number}"


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_target_is_the_response_with_the_best_weighted_score(tmp_path: Path, split: str) -> None:
    samples = list(PersonalLLMReader(published(tmp_path), split, users=FEW))
    assert {sample.user_id for sample in samples} == {"user-0", "user-1", "user-2"}
    for sample in samples:
        user, number = int(str(sample.user_id)[5:]), int(sample.id.split("/")[1])
        request, *options = sample.query.split("\n\n")
        assert request == f"Tell of {SECRET} {number}"
        responses = dict(option.split(": ") for option in options)
        assert list(responses) == list("ABCDEFGH")
        assert set(responses.values()) == {f"answer {index} to {number}" for index in range(1, 9)}
        assert responses[str(sample.target)] == best(user, number)
        for item in sample.history:
            assert item.fields == (
                ("request", f"Tell of {SECRET} {item.id}"),
                ("response", best(user, int(item.id))),
            )
    assert len({sample.target for sample in samples}) > 1


def test_scores_are_standardized_before_weighting(tmp_path: Path) -> None:
    mixed = SimulatedUsers(count=20, alpha=1.0, shortest=4, longest=6)
    for sample in PersonalLLMReader(published(tmp_path), "dev", users=mixed):
        for item in sample.history:
            assert dict(item.fields)["response"] == best(int(str(sample.user_id)[5:]), int(item.id), alpha=1.0)


def test_train_has_no_request_of_dev_or_test(tmp_path: Path) -> None:
    train, dev, test = (
        list(PersonalLLMReader(published(tmp_path), split, users=FEW)) for split in ("train", "dev", "test")
    )
    train_ids = {item.id for sample in train + dev + test for item in sample.history}
    train_ids |= {sample.id.split("/")[1] for sample in train}
    assert {sample.id.split("/")[1] for sample in dev} <= {"9", "19", "29"}
    assert {sample.id.split("/")[1] for sample in test} <= {"100", "101", "102"}
    assert train_ids.isdisjoint({"9", "19", "29", "100", "101", "102"})
    assert [len(dev), len(test), len(train)] == [3, 3, 6]
    for earlier, later, dev_sample in zip(train[::2], train[1::2], dev, strict=True):
        assert 4 <= len(earlier.history) <= 6
        assert shape([later])[0][1] == [*shape([earlier])[0][1], earlier.id.split("/")[1]]
        assert shape([dev_sample])[0][1] == [*shape([later])[0][1], later.id.split("/")[1]]


def test_user_does_not_depend_on_the_number_of_users(tmp_path: Path) -> None:
    folder = published(tmp_path)
    alone = SimulatedUsers(count=1, shortest=4, longest=6, queries_per_user=2)
    assert list(PersonalLLMReader(folder, "dev", users=alone)) == list(PersonalLLMReader(folder, "dev", users=FEW))[:1]
    others = SimulatedUsers(count=3, seed=1, shortest=4, longest=6, queries_per_user=2)
    assert list(PersonalLLMReader(folder, "dev", users=others)) != list(PersonalLLMReader(folder, "dev", users=FEW))


def test_fewer_choices_give_fewer_labels(tmp_path: Path) -> None:
    two = SimulatedUsers(count=2, shortest=1, longest=2, choices=2)
    reader = PersonalLLMReader(published(tmp_path), "train", users=two)
    assert reader.task.labels == ("A", "B")
    for sample in reader:
        assert len(sample.query.split("\n\n")) == 3
    write_lamp(reader, tmp_path / "lamp", "train", task=reader.task)
    assert list(open_dataset(tmp_path / "lamp", "train")) == list(reader)


BROKEN_CHOICES: dict[str, tuple[Any, str]] = {
    "no prompt": ({"prompt_id": 2, "x": SECRET}, "line 2 (id 2): its 'prompt' is missing"),
    "no response": (choice(2, response_8=None), "line 2 (id 2): its 'response_8' is null"),
    "text as score": (
        choice(2, response_3_gemma_2b=SECRET),
        "(id 2): its 'response_3_gemma_2b' is not a finite number",
    ),
    "nan as score": (choice(2, response_3_gemma_2b=float("nan")), "its 'response_3_gemma_2b' is not a finite number"),
    "id twice": (choice(0), "line 2 (id 0): an earlier record has the same id"),
}


@pytest.mark.parametrize("name", BROKEN_CHOICES)
def test_broken_choice_is_reported_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    broken, message = BROKEN_CHOICES[name]
    path = write(tmp_path / "train.jsonl", [choice(0), broken, *(choice(number) for number in range(3, 30))])
    with pytest.raises(RecordError) as caught:
        list(PersonalLLMReader(path, "train", users=FEW))
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = PersonalLLMReader(path, "train", users=FEW, skip_bad=1)
    assert len(list(reader)) == reader.report.samples == 6
    assert reader.report.skipped == 1


def test_unusable_file_or_setting_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path)
    with pytest.raises(ConfigError, match="'test' needs the folder"):
        PersonalLLMReader(folder / "data" / "train.jsonl", "test")
    with pytest.raises(ConfigError, match="makes up to 53 choices, but there are 27 rows"):
        list(PersonalLLMReader(folder, "dev"))
    for wrong in ({"count": 0}, {"alpha": 0.0}, {"seed": -1}, {"shortest": 50}, {"choices": 1}, {"choices": 9}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SimulatedUsers(**wrong)
