"""Anyone's predictions file scored: LaMP's rules with values worked out by hand, and files that disagree."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from personaplug.analysis.results_file import Results
from personaplug.analysis.score_predictions import score_lamp
from personaplug.analysis.tables import results_table
from personaplug.data import LAMP_TASKS
from personaplug.errors import ConfigError, MissingData, RecordError
from personaplug.infra.atomic_io import write_json

SECRET = "zanzibar is a user's own text that must never stand in any message"


def put(path: Path, answers: list[Any], *, task: Any = "LaMP_3") -> Path:
    golds = [{"id": str(number), "output": answer} for number, answer in enumerate(answers, 1)]
    path.write_text(json.dumps({"task": task, "golds": golds}))
    return path


def score(folder: Path, said: list[Any], meant: list[Any], *, task: str = "LaMP_3", **settings: Any) -> Results:
    gold, predicted = put(folder / "gold.json", meant, task=task), put(folder / "said.json", said, task=task)
    return score_lamp(gold, predicted, resamples=50, **settings)


def metrics(results: Results) -> dict[str, float]:
    (row,) = results.rows
    return row.metrics


# ---- LaMP's rules, by hand

# What stands beside each answer is how far LaMP-3 is off where the gold is 3: a text that is no number counts as 5.
RATINGS = [
    ("3", 0.0),
    ("3.", 0.0),
    (" 3 ", 0.0),
    (" [1] ", 2.0),
    ("", 2.0),
    ("three", 2.0),
    ("42", 39.0),
    ("inf", math.inf),
    ("nan", math.nan),
    ("²", 2.0),
    (3, 0.0),
    (4.0, 1.0),
]


@pytest.mark.parametrize(("said", "off"), RATINGS)
def test_lamp_3_takes_numbers_as_they_are_and_else_the_farthest_end(tmp_path: Path, said: object, off: float) -> None:
    # A second sample is right, so MAE is half of it and RMSE its root.
    results = score(tmp_path, [said, "1"], ["3", "1"])
    found = metrics(results)
    assert found["mae"] == pytest.approx(off / 2, nan_ok=True)
    assert found["rmse"] == pytest.approx(math.sqrt(off * off / 2), nan_ok=True)
    right = said in ("3", " 3 ", 3)
    assert found["accuracy"] == (1.0 if right else 0.5)
    legal = right or said == 4.0
    assert results.rows[0].invalid_rate == (0.0 if legal else 0.5)


@pytest.mark.parametrize(("gold", "error"), [("1", 4.0), ("2", 3.0), ("4", 3.0), ("5", 4.0)])
def test_lamp_3_rates_a_text_with_the_farthest_end(tmp_path: Path, gold: str, error: float) -> None:
    assert metrics(score(tmp_path, ["4 stars"], [gold]))["mae"] == error


LABELS = {"LaMP_1": ("[1]", "[2]"), "LaMP_2": ("comedy", "action")}


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize(
    ("form", "right"),
    [
        ("{}", True),
        (" {} ", True),
        ("{}\n", True),
        ("{}.", False),
        ("3.", False),
        ("nan", False),
        ("", False),
        ("42", False),
        ("inf", False),
        ("²", False),
    ],
)
def test_labels_are_stripped_and_else_matched_exactly(tmp_path: Path, task: str, form: str, right: bool) -> None:
    first, second = LABELS[task]
    # Four samples: two of each label; the second label's are right, and one of the first's.
    results = score(tmp_path, [form.format(first), first, second, second], [first, first, second, second], task=task)
    found = metrics(results)
    assert found["accuracy"] == (1.0 if right else 0.75)
    # Wrong: F1 of the first label is 2·1 / (1 + 2); labels that never occur count 0.
    assert found["f1"] == pytest.approx((1.0 + (1.0 if right else 2 / 3)) / len(LAMP_TASKS[task].labels))
    assert results.rows[0].invalid_rate == (0.0 if right else 0.25)


def test_lamp_1_takes_another_bracket_or_the_bare_number_for_wrong(tmp_path: Path) -> None:
    found = metrics(score(tmp_path, ["[1]", " [1] ", "1", "[3]"], ["[1]", "[1]", "[1]", "[1]"], task="LaMP_1"))
    # F1 of [1]: 2·2 / (2 + 4); of [2], which never occurs: 0.
    assert found == {"accuracy": 0.5, "f1": pytest.approx(1 / 3)}


def test_lamp_2_minds_the_case(tmp_path: Path) -> None:
    found = metrics(score(tmp_path, ["Comedy", "comedy", "SCI-FI"], ["comedy", "comedy", "sci-fi"], task="LaMP_2"))
    assert found == {"accuracy": pytest.approx(1 / 3), "f1": pytest.approx(2 / 3 / 15)}


@pytest.mark.parametrize(
    ("said", "meant", "rouge_1", "rouge_l"),
    [
        ("the Cat SAT", "The cat sat", 1.0, 1.0),
        (" [1] ", "chapter 1", 2 / 3, 2 / 3),
        ("3.", "3", 1.0, 1.0),
        ("b a", "a b", 1.0, 0.5),
        ("", "a b", 0.0, 0.0),
        ("²", "2", 0.0, 0.0),
        ("nan", "nan", 1.0, 1.0),
        ("inf", "a", 0.0, 0.0),
        (42, "42 is it", 0.5, 0.5),
    ],
)
def test_lamp_4_counts_words(tmp_path: Path, said: object, meant: str, rouge_1: float, rouge_l: float) -> None:
    results = score(tmp_path, [said], [meant], task="LaMP_4")
    assert metrics(results) == {"rouge_1": pytest.approx(rouge_1), "rouge_l": pytest.approx(rouge_l)}
    assert results.rows[0].invalid_rate == float(said == "")


# ---- the results object


def test_results_are_printed_and_survive_the_json_writer(tmp_path: Path) -> None:
    results = score(tmp_path, ["nan", "inf", "3"], ["1", "2", "3"])
    assert (results.about.task, results.about.split, results.pairs) == ("LaMP_3", "", [])
    (row,) = results.rows
    assert (row.name, row.n) == ("said.json", 3)
    assert all(map(math.isnan, row.intervals["mae"]))
    table = results_table(results)
    assert "said.json" in table
    assert "MAE" in table.upper()
    assert "nan" in table
    assert "name no users" in table
    write_json(tmp_path / "results.json", results.to_json())
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["rows"][0]["metrics"]["mae"] is None
    assert kept["rows"][0]["metrics"]["accuracy"] == pytest.approx(1 / 3)
    assert results_table(Results.from_json(kept))


def test_intervals_are_of_samples_and_repeat_with_the_seed(tmp_path: Path) -> None:
    said, meant = ["[1]"] * 30, ["[1]"] * 20 + ["[2]"] * 10
    first = score(tmp_path, said, meant, task="LaMP_1").rows[0].intervals["accuracy"]
    again = score(tmp_path, said, meant, task="LaMP_1").rows[0].intervals["accuracy"]
    other = score(tmp_path, said, meant, task="LaMP_1", seed=3).rows[0].intervals
    assert first == again
    assert 0.3 < first[0] < 2 / 3 < first[1] < 1.0
    assert other["f1"] != score(tmp_path, said, meant, task="LaMP_1").rows[0].intervals["f1"]


# ---- the files


def test_answers_are_joined_by_id_and_may_be_gzipped(tmp_path: Path) -> None:
    gold = put(tmp_path / "gold.json", ["1", "2", "3"])
    mixed = {
        "golds": [{"id": 3, "output": "3"}, {"id": "1", "output": "1"}, {"id": 2.0, "output": 2}],
        "task": "LaMP-3",
    }
    packed = tmp_path / "said.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(mixed).encode()))
    for predicted in (packed, tmp_path / "said.json"):
        assert metrics(score_lamp(gold, predicted, resamples=5))["accuracy"] == 1.0


def test_task_is_declared_beside_the_golds_or_named_in_them(tmp_path: Path) -> None:
    assert score(tmp_path, ["a"], ["a"], task="LaMP-4").about.task == "LaMP_4"
    declared = {"name": "News", "kind": "label", "labels": ["a", "b"], "item_fields": ["text"], "metrics": ["accuracy"]}
    with pytest.raises(ConfigError, match=r"gold\.json: .*'LaMP_9'.*needs a task\.json"):
        score(tmp_path, ["a"], ["a"], task="LaMP_9")
    (tmp_path / "task.json").write_text(json.dumps(declared))
    assert metrics(score(tmp_path, ["a"], ["a"], task="Mine")) == {"accuracy": 1.0}
    assert score(tmp_path, ["a"], ["b"], task="LaMP_2").about.task == "News"
    gold = put(tmp_path / "gold.json", ["a"], task="LaMP_2")
    assert score_lamp(gold, put(tmp_path / "said.json", ["a"], task="News"), resamples=5).about.task == "News"


def test_metrics_of_a_models_probabilities_are_left_out_beside_others(tmp_path: Path) -> None:
    declared = {"name": "Closed", "kind": "chat", "metrics": ["answered", "divergence"]}
    (tmp_path / "task.json").write_text(json.dumps(declared))
    assert metrics(score(tmp_path, ["It is 4."], ["4"], task="Closed")) == {"answered": 1.0}
    (tmp_path / "task.json").write_text(json.dumps(declared | {"metrics": ["divergence"]}))
    with pytest.raises(ConfigError, match="divergence is of a model's probabilities"):
        score(tmp_path, ["It is 4."], ["4"], task="Closed")


def test_files_of_different_tasks_are_an_error(tmp_path: Path) -> None:
    gold, predicted = put(tmp_path / "gold.json", ["1"]), put(tmp_path / "said.json", ["1"], task="LaMP_4")
    with pytest.raises(ConfigError, match=r"gold\.json is of the task LaMP_3 and .*said\.json of LaMP_4"):
        score_lamp(gold, predicted)


def test_missing_ids_are_counted_and_three_of_them_named(tmp_path: Path) -> None:
    gold, predicted = put(tmp_path / "gold.json", ["1"] * 7), put(tmp_path / "said.json", ["1"] * 2)
    with pytest.raises(MissingData, match=r'said\.json: of 7 golds, 5 ids \("3", "4", "5", …\) are without') as caught:
        score_lamp(gold, predicted)
    assert '"6"' not in str(caught.value)
    put(predicted, ["1"] * 6)
    with pytest.raises(MissingData, match=r'1 id \("7"\) is without a prediction\. '):
        score_lamp(gold, predicted)


def test_unknown_ids_are_an_error_of_the_predictions(tmp_path: Path) -> None:
    gold, predicted = put(tmp_path / "gold.json", ["1"] * 2), put(tmp_path / "said.json", ["1"] * 4)
    with pytest.raises(RecordError, match=r'said\.json, its ids: 2 ids \("3", "4"\) are not among the golds of .*gold'):
        score_lamp(gold, predicted)
    predicted.write_text(
        json.dumps({"task": "LaMP_3", "golds": [{"id": "1", "output": 1}, {"id": SECRET, "output": 1}]})
    )
    with pytest.raises(MissingData, match=r'1 id \("2"\) is without a prediction; 1 id .* is not among') as caught:
        score_lamp(gold, predicted)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("broken", ["gold.json", "said.json"])
def test_ids_that_stand_twice_are_an_error_in_either_file(tmp_path: Path, broken: str) -> None:
    gold, predicted = put(tmp_path / "gold.json", ["1"] * 2), put(tmp_path / "said.json", ["1"] * 2)
    # 1 and "1" are one id, as where golds are joined with questions.
    golds = [{"id": each, "output": "1"} for each in ("1", 1, "2", "2", "2")]
    (tmp_path / broken).write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    with pytest.raises(RecordError, match=rf'{broken}, its ids: 2 ids \("1", "2"\) are more than once'):
        score_lamp(gold, predicted)


@pytest.mark.parametrize(
    ("golds", "message"),
    [
        ([{"id": "1", "output": None}], r"gold 1 \(id 1\): its 'output' is null, expected a text or a number"),
        ([{"id": "1", "output": [SECRET]}], "its 'output' is a list"),
        ([{"id": "1", "output": True}], "its 'output' is true or false"),
        ([{"id": "1"}], "its 'output' is missing"),
        ([{"output": SECRET}], "gold 1: its 'id' is missing"),
        ([SECRET], "gold 1: it is not a JSON object"),
        ([], "the key 'golds': it should hold a list"),
        ({"1": SECRET}, "the key 'golds': it should hold a list"),
    ],
)
def test_broken_record_is_an_error_without_its_text(tmp_path: Path, golds: Any, message: str) -> None:
    gold, predicted = put(tmp_path / "gold.json", ["1"]), tmp_path / "said.json"
    predicted.write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    with pytest.raises(RecordError, match=message) as caught:
        score_lamp(gold, predicted)
    assert "said.json" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"golds": []}', '{"task": 3, "golds": []}'])
def test_file_of_another_shape_is_an_error(tmp_path: Path, content: str) -> None:
    gold, predicted = put(tmp_path / "gold.json", ["1"]), tmp_path / "said.json"
    predicted.write_text(content)
    with pytest.raises(RecordError, match=r"said\.json"):
        score_lamp(gold, predicted)


def test_gold_that_is_no_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        RecordError, match=r"gold\.json, the gold with id 2: its answer is not one of the 5 labels"
    ) as caught:
        score(tmp_path, ["1", "1"], ["1", SECRET])
    assert SECRET not in str(caught.value)


def test_files_and_settings_that_are_not_there(tmp_path: Path) -> None:
    gold = put(tmp_path / "gold.json", ["1", "2"])
    with pytest.raises(MissingData, match=r"no file .*said\.json"):
        score_lamp(gold, tmp_path / "said.json")
    with pytest.raises(ConfigError, match="at least 1 resample"):
        score_lamp(gold, gold, resamples=0)
