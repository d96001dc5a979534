"""Score a file of predictions: LaMP's rules on known cases, and files that do not match."""

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

SECRET = "zanzibar is a user's text that must not appear in a message"


def write_outputs(path: Path, answers: list[Any], *, task: Any = "LaMP_3") -> Path:
    golds = [{"id": str(number), "output": answer} for number, answer in enumerate(answers, 1)]
    path.write_text(json.dumps({"task": task, "golds": golds}))
    return path


def write_pair(folder: Path, golds: list[Any], predictions: list[Any], *, task: Any = "LaMP_3") -> tuple[Path, Path]:
    """Write the right answers and the predictions; return both files."""
    gold = write_outputs(folder / "gold.json", golds, task=task)
    return gold, write_outputs(folder / "predictions.json", predictions, task=task)


def score(folder: Path, predictions: list[Any], golds: list[Any], *, task: str = "LaMP_3", **settings: Any) -> Results:
    gold, predicted = write_pair(folder, golds, predictions, task=task)
    return score_lamp(gold, predicted, resamples=50, **settings)


def metrics(results: Results) -> dict[str, float]:
    (row,) = results.rows
    return row.metrics


# ---- LaMP's rules on known cases

# Answers with their errors in LaMP-3 if the gold is 3. A text that is not a number counts as 5.
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


@pytest.mark.parametrize(("predictions", "error"), RATINGS)
def test_lamp_3_does_not_clip_numbers_and_counts_texts_as_the_farthest_end(
    tmp_path: Path, predictions: object, error: float
) -> None:
    # The second sample is right, so the errors are averaged over two samples.
    results = score(tmp_path, [predictions, "1"], ["3", "1"])
    scores = metrics(results)
    assert scores["mae"] == pytest.approx(error / 2, nan_ok=True)
    assert scores["rmse"] == pytest.approx(math.sqrt(error * error / 2), nan_ok=True)
    is_right = predictions in ("3", " 3 ", 3)
    assert scores["accuracy"] == (1.0 if is_right else 0.5)
    is_valid = is_right or predictions == 4.0
    assert results.rows[0].invalid_rate == (0.0 if is_valid else 0.5)


@pytest.mark.parametrize(("gold", "error"), [("1", 4.0), ("2", 3.0), ("4", 3.0), ("5", 4.0)])
def test_lamp_3_counts_a_text_as_the_farthest_end(tmp_path: Path, gold: str, error: float) -> None:
    assert metrics(score(tmp_path, ["4 stars"], [gold]))["mae"] == error


LABELS = {"LaMP_1": ("[1]", "[2]"), "LaMP_2": ("comedy", "action")}


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize(
    ("template", "is_right"),
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
def test_labels_are_stripped_and_matched_exactly(tmp_path: Path, task: str, template: str, is_right: bool) -> None:
    first, second = LABELS[task]
    # Four samples, two of each label. All are right, except possibly the first.
    results = score(
        tmp_path, [template.format(first), first, second, second], [first, first, second, second], task=task
    )
    scores = metrics(results)
    assert scores["accuracy"] == (1.0 if is_right else 0.75)
    # If the first is wrong, F1 of its label is 2·1 / (1 + 2). Labels that do not occur count 0.
    assert scores["f1"] == pytest.approx((1.0 + (1.0 if is_right else 2 / 3)) / len(LAMP_TASKS[task].labels))
    assert results.rows[0].invalid_rate == (0.0 if is_right else 0.25)


def test_lamp_1_counts_other_brackets_and_bare_numbers_as_wrong(tmp_path: Path) -> None:
    scores = metrics(score(tmp_path, ["[1]", " [1] ", "1", "[3]"], ["[1]", "[1]", "[1]", "[1]"], task="LaMP_1"))
    # F1 of [1] is 2·2 / (2 + 4), and F1 of [2], which does not occur, is 0.
    assert scores == {"accuracy": 0.5, "f1": pytest.approx(1 / 3)}


def test_lamp_2_is_case_sensitive(tmp_path: Path) -> None:
    scores = metrics(score(tmp_path, ["Comedy", "comedy", "SCI-FI"], ["comedy", "comedy", "sci-fi"], task="LaMP_2"))
    assert scores == {"accuracy": pytest.approx(1 / 3), "f1": pytest.approx(2 / 3 / 15)}


@pytest.mark.parametrize(
    ("predictions", "golds", "rouge_1", "rouge_l"),
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
def test_lamp_4_compares_words(tmp_path: Path, predictions: object, golds: str, rouge_1: float, rouge_l: float) -> None:
    results = score(tmp_path, [predictions], [golds], task="LaMP_4")
    assert metrics(results) == {"rouge_1": pytest.approx(rouge_1), "rouge_l": pytest.approx(rouge_l)}
    assert results.rows[0].invalid_rate == float(predictions == "")


# ---- the results object


def test_results_can_be_printed_and_written_as_json(tmp_path: Path) -> None:
    results = score(tmp_path, ["nan", "inf", "3"], ["1", "2", "3"])
    assert (results.about.task, results.about.split, results.pairs) == ("LaMP_3", "", [])
    (row,) = results.rows
    assert (row.name, row.n) == ("predictions.json", 3)
    assert all(map(math.isnan, row.intervals["mae"]))
    table = results_table(results)
    assert "predictions.json" in table
    assert "MAE" in table.upper()
    assert "nan" in table
    assert "name no users" in table
    write_json(tmp_path / "results.json", results.to_json())
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"][0]["metrics"]["mae"] is None
    assert written["rows"][0]["metrics"]["accuracy"] == pytest.approx(1 / 3)
    assert results_table(Results.from_json(written))


def test_intervals_are_over_samples_and_repeat_with_the_seed(tmp_path: Path) -> None:
    predictions, golds = ["[1]"] * 30, ["[1]"] * 20 + ["[2]"] * 10
    first = score(tmp_path, predictions, golds, task="LaMP_1").rows[0].intervals["accuracy"]
    again = score(tmp_path, predictions, golds, task="LaMP_1").rows[0].intervals["accuracy"]
    other = score(tmp_path, predictions, golds, task="LaMP_1", seed=3).rows[0].intervals
    assert first == again
    assert 0.3 < first[0] < 2 / 3 < first[1] < 1.0
    assert other["f1"] != score(tmp_path, predictions, golds, task="LaMP_1").rows[0].intervals["f1"]


# ---- the files


def test_answers_are_joined_by_id_and_may_be_gzipped(tmp_path: Path) -> None:
    gold = write_outputs(tmp_path / "gold.json", ["1", "2", "3"])
    mixed = {
        "golds": [{"id": 3, "output": "3"}, {"id": "1", "output": "1"}, {"id": 2.0, "output": 2}],
        "task": "LaMP-3",
    }
    packed = tmp_path / "predictions.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(mixed).encode()))
    for predicted in (packed, tmp_path / "predictions.json"):
        assert metrics(score_lamp(gold, predicted, resamples=5))["accuracy"] == 1.0


def test_task_comes_from_a_file_beside_the_golds_or_from_its_name(tmp_path: Path) -> None:
    assert score(tmp_path, ["a"], ["a"], task="LaMP-4").about.task == "LaMP_4"
    declared = {"name": "News", "kind": "label", "labels": ["a", "b"], "item_fields": ["text"], "metrics": ["accuracy"]}
    with pytest.raises(ConfigError, match=r"gold\.json: .*'LaMP_9'.*put its task\.json"):
        score(tmp_path, ["a"], ["a"], task="LaMP_9")
    (tmp_path / "task.json").write_text(json.dumps(declared))
    assert metrics(score(tmp_path, ["a"], ["a"], task="Mine")) == {"accuracy": 1.0}
    assert score(tmp_path, ["a"], ["b"], task="LaMP_2").about.task == "News"
    gold = write_outputs(tmp_path / "gold.json", ["a"], task="LaMP_2")
    assert (
        score_lamp(gold, write_outputs(tmp_path / "predictions.json", ["a"], task="News"), resamples=5).about.task
        == "News"
    )


def test_likelihood_metrics_are_skipped_beside_other_metrics(tmp_path: Path) -> None:
    declared = {"name": "Closed", "kind": "chat", "metrics": ["answered", "divergence"]}
    (tmp_path / "task.json").write_text(json.dumps(declared))
    assert metrics(score(tmp_path, ["It is 4."], ["4"], task="Closed")) == {"answered": 1.0}
    (tmp_path / "task.json").write_text(json.dumps(declared | {"metrics": ["divergence"]}))
    with pytest.raises(ConfigError, match="divergence needs a model's probabilities"):
        score(tmp_path, ["It is 4."], ["4"], task="Closed")


def test_files_of_different_tasks_are_an_error(tmp_path: Path) -> None:
    gold, predicted = (
        write_outputs(tmp_path / "gold.json", ["1"]),
        write_outputs(tmp_path / "predictions.json", ["1"], task="LaMP_4"),
    )
    with pytest.raises(
        ConfigError, match=r"gold\.json has the task LaMP_3, but .*predictions\.json has the task LaMP_4"
    ):
        score_lamp(gold, predicted)


def test_error_counts_missing_ids_and_names_three(tmp_path: Path) -> None:
    gold, predicted = write_pair(tmp_path, ["1"] * 7, ["1"] * 2)
    with pytest.raises(
        MissingData, match=r'predictions\.json: of 7 golds, 5 ids \("3", "4", "5", …\) are without'
    ) as caught:
        score_lamp(gold, predicted)
    assert '"6"' not in str(caught.value)
    write_outputs(predicted, ["1"] * 6)
    with pytest.raises(MissingData, match=r'1 id \("7"\) is without a prediction\. '):
        score_lamp(gold, predicted)


def test_unknown_ids_are_refused(tmp_path: Path) -> None:
    gold, predicted = write_pair(tmp_path, ["1"] * 2, ["1"] * 4)
    with pytest.raises(
        RecordError, match=r'predictions\.json, its ids: 2 ids \("3", "4"\) are not among the golds of .*gold'
    ):
        score_lamp(gold, predicted)
    predicted.write_text(
        json.dumps({"task": "LaMP_3", "golds": [{"id": "1", "output": 1}, {"id": SECRET, "output": 1}]})
    )
    with pytest.raises(MissingData, match=r'1 id \("2"\) is without a prediction; 1 id .* is not among') as caught:
        score_lamp(gold, predicted)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("broken", ["gold.json", "predictions.json"])
def test_repeated_ids_are_refused_in_both_files(tmp_path: Path, broken: str) -> None:
    gold, predicted = write_pair(tmp_path, ["1"] * 2, ["1"] * 2)
    # 1 and "1" are the same id.
    golds = [{"id": each, "output": "1"} for each in ("1", 1, "2", "2", "2")]
    (tmp_path / broken).write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    with pytest.raises(RecordError, match=rf'{broken}, its ids: 2 ids \("1", "2"\) are repeated'):
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
        ([], "the key 'golds': expected a list"),
        ({"1": SECRET}, "the key 'golds': expected a list"),
    ],
)
def test_error_for_a_broken_record_does_not_contain_its_text(tmp_path: Path, golds: Any, message: str) -> None:
    gold, predicted = write_outputs(tmp_path / "gold.json", ["1"]), tmp_path / "predictions.json"
    predicted.write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    with pytest.raises(RecordError, match=message) as caught:
        score_lamp(gold, predicted)
    assert "predictions.json" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"golds": []}', '{"task": 3, "golds": []}'])
def test_file_without_the_expected_keys_is_refused(tmp_path: Path, content: str) -> None:
    gold, predicted = write_outputs(tmp_path / "gold.json", ["1"]), tmp_path / "predictions.json"
    predicted.write_text(content)
    with pytest.raises(RecordError, match=r"predictions\.json"):
        score_lamp(gold, predicted)


def test_gold_outside_the_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecordError, match=r"gold\.json, the gold with id 2: its answer is not one of the 5 labels"
    ) as caught:
        score(tmp_path, ["1", "1"], ["1", SECRET])
    assert SECRET not in str(caught.value)


def test_missing_files_and_zero_resamples_are_refused(tmp_path: Path) -> None:
    gold = write_outputs(tmp_path / "gold.json", ["1", "2"])
    with pytest.raises(MissingData, match=r"no file .*predictions\.json"):
        score_lamp(gold, tmp_path / "predictions.json")
    with pytest.raises(ConfigError, match="at least 1 resample"):
        score_lamp(gold, gold, resamples=0)
