"""Items with pictures and vectors: how records are read, what is refused, and the fields that a task.json declares."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_rows import DECLARED, RED, data_url, packed, png

from personaplug.data import load_task, read_items
from personaplug.data.parsing import Flaw, item_of, numbers_of, record_of, vector_of
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem, ItemContent
from personaplug.data.task_registry import parse_task
from personaplug.errors import ConfigError, RecordError

SECRET = "zanzibar"
WITH_PARTS = {**DECLARED, "image_field": "photo", "vector_field": "embedding"}
TASK = parse_task(WITH_PARTS)
PNG = png(RED)


def _item(**values: object) -> HistoryItem:
    return item_of(TASK, {"id": "1", **values})[1]


def test_an_item_has_a_text_a_picture_and_a_vector() -> None:
    item = _item(product="lamp", verdict="kept", photo=data_url(PNG), embedding=[1, 0.5])
    assert (item.text, item.answer, item.picture) == ("product: lamp verdict: kept", "kept", Picture(PNG))
    assert item.vector == packed(1, 0.5)
    assert item.encoded(with_answer=False) == ItemContent("product: lamp", Picture(PNG), item.vector)
    assert record_of(item) == {"product": "lamp", "verdict": "kept"}
    assert SECRET not in repr(_item(product=SECRET, verdict="kept", photo=data_url(PNG)))


@pytest.mark.parametrize("part", [{"photo": data_url(PNG)}, {"embedding": [1, 2]}], ids=["picture", "vector"])
def test_texts_may_be_missing_beside_a_picture_or_a_vector(part: dict[str, Any]) -> None:
    item = _item(verdict="kept", **part)
    assert item.fields == (("product", ""), ("verdict", "kept"))
    content = item.encoded(with_answer=False)
    assert isinstance(content, ItemContent)
    assert content.text == ""
    assert _item(rejected="kept", **part).kind == "rejection"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"verdict": "kept"}, "its 'product' is missing"),
        ({"verdict": "kept", "photo": None, "embedding": None}, "its 'product' is missing"),
        ({"verdict": "kept", "photo": ""}, "its 'product' is missing"),
        ({"photo": data_url(PNG)}, "its 'verdict' is missing"),
        ({"photo": data_url(PNG), "preference": SECRET}, "both a 'preference' and a picture or a vector"),
        ({"embedding": [1], "preference": SECRET}, "both a 'preference' and a picture or a vector"),
        ({"product": SECRET, "verdict": "kept", "photo": SECRET}, "its 'photo' is no picture: expected a data URL"),
        ({"product": SECRET, "verdict": "kept", "embedding": SECRET}, "its 'embedding' is no vector: expected a list"),
    ],
)
def test_broken_items_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Flaw) as caught:
        _item(**values)
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value)


def test_other_tasks_ignore_keys_with_these_names() -> None:
    task = parse_task({**WITH_PARTS, "image_field": None, "vector_field": None})
    item = item_of(task, {"id": "1", "product": "lamp", "verdict": "kept", "photo": SECRET, "embedding": SECRET})[1]
    assert (item.picture, item.vector) == (None, None)


@pytest.mark.parametrize(
    "value",
    [
        [0.1, -2, 1e-30, 16_777_217],
        (0.1, -2.0, 1e-30, 16_777_216.0),
        np.array([0.1, -2, 1e-30, 2**24], dtype=np.float32),
    ],
)
def test_vectors_are_float32_and_keep_their_digits(value: object) -> None:
    packed = vector_of(value, "it")
    assert packed == np.array([0.1, -2, 1e-30, 2**24], dtype="<f4").tobytes()
    assert vector_of(json.loads(json.dumps(numbers_of(packed))), "it") == packed
    assert numbers_of(packed)[0] == pytest.approx(0.1, rel=1e-7)


def test_all_digits_of_single_precision_survive_json() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view("<f4")
    packed = bits[np.isfinite(bits)].tobytes()
    assert vector_of(json.loads(json.dumps(numbers_of(packed))), "it") == packed


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "expected a list of numbers"),
        ({}, "expected a list of numbers"),
        (1.0, "expected a list of numbers"),
        (b"\0\0\0\0", "expected a list of numbers"),
        ([1, SECRET], "a value of the list is no number"),
        ([1, None], "a value of the list is no number"),
        ([True], "a value of the list is no number"),
        ([[1.0]], "a value of the list is no number"),
        ([math.nan], "a value of the list is not finite"),
        ([math.inf], "a value of the list is not finite"),
        ([1e39], "a value of the list is not finite"),
        ([10**400], "a value of the list is not finite"),
        ([0, 0.0], "has only zeros"),
        ([0.0, -0.0], "has only zeros"),
    ],
)
def test_other_values_are_no_vectors(value: object, reason: str) -> None:
    with pytest.raises(Flaw) as caught:
        vector_of(value, "it")
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value)


def test_paths_of_items_start_in_the_folder_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(PNG)
    record = {"product": "lamp", "verdict": "kept", "photo": "photos/1.png"}
    (tmp_path / "items.jsonl").write_text(json.dumps(record))
    assert read_items(tmp_path / "items.jsonl", task=TASK)[0].picture == Picture(PNG)
    assert read_items([record], task=TASK, folder=tmp_path)[0].picture == Picture(PNG)
    with pytest.raises(RecordError, match="its 'photo' is no picture: expected a data URL"):
        read_items([record], task=TASK)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_field": "product"}, "name fields of their own"),
        ({"vector_field": "verdict"}, "name fields of their own"),
        ({"image_field": "embedding"}, "name fields of their own"),
        ({"image_field": "id"}, "'id' is a reserved key"),
        ({"vector_field": "preference"}, "'preference' is a reserved key"),
        ({"image_field": ""}, "image_field"),
        ({"image_field": ["photo"]}, "image_field"),
        ({"item_template": "{photo}"}, "'item_template' names {photo}"),
    ],
)
def test_wrong_fields_of_a_task_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({**WITH_PARTS, **changes}))
    with pytest.raises(ConfigError) as caught:
        load_task(tmp_path)
    assert reason in str(caught.value)
