"""The folder of a run: damaged files are reported, files stay inside it, and a failed start changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from personaplug.config_parsing import load_config
from personaplug.data.task_registry import LAMP_TASKS
from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError, DamagedFile, MissingData, RunConflict
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.run import Run

TASK = LAMP_TASKS["LaMP_3"]
ENCODER = HashEncoder(16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return _create(tmp_path / "run")


def _create(folder: Path, *settings: str, **options: Any) -> Run:
    config = load_config(overrides=["llm=toy", "encoder=hash:16", *settings])
    return Run.create(folder, config=config, task=TASK, **options)


def _edit(path: Path, **values: object) -> None:
    """Change a checked file and update its checksum."""
    write_checked_json(path, read_json(path, remedy="") | values)


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_changed_value_is_detected(run: Run, name: str) -> None:
    path = run.folder / name
    text = path.read_text()
    for old, new in (('"LaMP_3"', '"LaMP_4"'), ("epochs: 5", "epochs: 4"), ("temperature: 0.1", "temperature: 0.5")):
        if old in text:
            path.write_text(text.replace(old, new))
            with pytest.raises(DamagedFile, match="checksum"):
                Run.open(run.folder)
    path.write_text(text)
    assert Run.open(run.folder) == run


def test_model_settings_of_a_run_may_be_edited(run: Run) -> None:
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("llm: toy", "llm: /elsewhere/toy").replace("device: auto", "device: cpu"))
    config = Run.open(run.folder).config
    assert (config.model.llm, config.model.device) == ("/elsewhere/toy", "cpu")


def test_file_without_a_checksum_is_refused(run: Run) -> None:
    about = read_json(run.folder / "run.json", remedy="")
    (run.folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(DamagedFile, match="older version"):
        Run.open(run.folder)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"steps": 3}', b"\xff"])
def test_broken_fit_json_is_refused(run: Run, content: bytes) -> None:
    folder = run.plug_folder("plug", seed=0)
    folder.mkdir(parents=True)
    (folder / "fit.json").write_bytes(content)
    for check in (run.trained, run.check_trained):
        with pytest.raises(DamagedFile, match=r"fit\.json is damaged.* train again"):
            check("plug", seed=0)


@pytest.mark.parametrize("place", ["/{outside}", "../outside", "vectors/../../outside", "~/outside"])
def test_opened_run_creates_no_folder_outside(run: Run, tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    vectors = str(outside) if place == "/{outside}" else str(run.folder / place)
    _edit(run.folder / "run.json", vectors=vectors)
    opened = Run.open(run.folder)
    if "~" in place:  # `~` is not expanded: this is a folder of that name inside the run
        assert opened.vectors == run.folder / place
        return
    with pytest.raises(MissingData, match="contains no item vectors"):
        opened.open_vectors(ENCODER)
    assert not outside.exists()
    assert _create(run.folder).creates_vectors is False
    assert _create(run.folder, vectors=outside).open_vectors(ENCODER).folder == outside


def test_opened_run_uses_the_vectors_folder_of_the_user(tmp_path: Path) -> None:
    run = _create(tmp_path / "run", vectors=tmp_path / "shared")
    run.open_vectors(ENCODER).add(["a"])
    assert len(Run.open(tmp_path / "run").open_vectors(ENCODER)) == 1


@pytest.mark.parametrize("name", ["vectors", "evaluations", "profiles.jsonl", "plug/seed-0"])
def test_a_link_out_of_a_run_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "target").mkdir()
    (run.folder / name).parent.mkdir(exist_ok=True)
    (run.folder / name).symlink_to(tmp_path / "target")
    with pytest.raises(RunConflict, match="is a link that leads out of the run"):
        Run.open(run.folder)


def test_a_link_to_itself_is_refused(run: Run) -> None:
    (run.folder / "loop").symlink_to(run.folder / "loop")
    with pytest.raises(RunConflict, match="is a link that leads out of the run"):
        Run.open(run.folder)


def test_a_config_that_an_editor_saved_with_a_byte_order_mark_is_read(run: Run) -> None:
    path = run.folder / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"device: auto", b"device: cpu"))
    assert Run.open(run.folder).config.model.device == "cpu"


def test_a_link_to_a_run_is_followed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.folder)
    opened = Run.open(tmp_path / "link")
    assert opened.creates_vectors


def test_plan_writes_nothing(tmp_path: Path) -> None:
    config = load_config(overrides=["llm=toy", "encoder=hash:16"])
    run = Run.plan(tmp_path / "run", config=config, task=TASK)
    assert not list(tmp_path.iterdir())
    run.start()
    assert Run.open(tmp_path / "run") == run


@pytest.mark.parametrize(
    ("begin", "is_bound"),
    [
        (lambda run: None, False),
        (lambda run: run.open_vectors(ENCODER), False),
        (lambda run: _touch(run.plug_folder("plug", seed=0) / "log.jsonl"), False),
        (lambda run: _touch(run.plug_folder("plug", seed=0) / "state-00000001" / "state.json"), True),
        (lambda run: _touch(run.folder / "evaluations" / "dev" / "plain.json"), True),
        (lambda run: _touch(run.folder / "profiles.jsonl"), True),
    ],
)
def test_settings_of_a_run_may_change_until_training_starts(
    run: Run, begin: Callable[[Run], object], is_bound: bool
) -> None:
    begin(run)
    _touch(run.folder / "data.json")
    if is_bound:
        with pytest.raises(RunConflict, match=r"training\.epochs"):
            _create(run.folder, "epochs=1")
        assert Run.open(run.folder).config.training.epochs == 5
    else:
        assert _create(run.folder, "epochs=1").config.training.epochs == 1
        assert not (run.folder / "data.json").exists()


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(("metric", "message"), [("rouge", "no metric 'rouge'"), ("mae", "needs finite numbers")])
def test_invalid_metric_is_refused_before_training(tmp_path: Path, metric: str, message: str) -> None:
    task = replace(LAMP_TASKS["LaMP_4"], metrics=(metric,))
    with pytest.raises(ConfigError, match=message):
        Run.create(tmp_path / "run", config=load_config(overrides=["llm=toy"]), task=task)
    assert not (tmp_path / "run").exists()
