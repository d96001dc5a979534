"""Trackers of a training: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from training_settings import TINY, new_run, write_small_data

from personaplug.cli.main import main
from personaplug.config import Config
from personaplug.config_parsing import with_values
from personaplug.data import open_dataset
from personaplug.errors import MissingExtra
from personaplug.infra import trackers
from personaplug.infra.checksums import json_checksum
from personaplug.infra.config_file import read_config
from personaplug.infra.trackers import Trackers, check_trackers
from personaplug.run import Run, open_models
from personaplug.training.parts import PLUG, train
from personaplug.training.trainings import Trainings

TRAIN_TAGS = {"train/loss", "train/grad_norm", "train/learning_rate", "train/samples_per_second"}
EVAL_TAGS = {"eval/loss", "eval/personal_gain"}
SETTINGS = ("controls=false", "validation_share=0.4", "save_steps=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


def _train(folder: Path, data: Path, *settings: str) -> Run:
    run, models = new_run(folder, data, *SETTINGS, *settings)
    train(run, open_dataset(data, "train", task=run.task), models=models)
    return run


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the values in TensorBoard's events, by tag and step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def _logged(folder: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def test_tensorboard_has_the_values_of_the_log(tmp_path: Path, data: Path) -> None:
    run = _train(tmp_path / "run", data, "report_to=tensorboard")
    folder = run.plug_folder("plug", seed=0)
    scalars = _scalars(folder / "tensorboard")
    assert set(scalars) == TRAIN_TAGS | EVAL_TAGS
    for tag, name in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("eval/loss", "validation_loss"),
        ("eval/personal_gain", "personal_gain"),
    ):
        assert scalars[tag] == pytest.approx(_logged(folder, name), rel=1e-6)
    assert [path.name.split(".")[0] for path in (folder / "tensorboard").iterdir()] == ["events"]


def test_resumed_training_continues_the_events(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, models = new_run(tmp_path / "run", data, *SETTINGS, "save_steps=4", "report_to=tensorboard")
    reader = open_dataset(data, "train", task=run.task)
    original = Trackers.log

    def stop(self: Trackers, values: dict[str, float], *, step: int) -> None:
        original(self, values, step=step)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trackers, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        train(run, reader, models=models)
    monkeypatch.undo()
    train(run, reader, models=models)
    folder = run.plug_folder("plug", seed=0)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    losses = _scalars(folder / "tensorboard")["train/loss"]
    assert list(losses) == list(range(1, len(losses) + 1))
    assert losses == pytest.approx(_logged(folder, "loss"), rel=1e-6)


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that Weights & Biases writes to, without a network."""
    pytest.importorskip("wandb")
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name, value in {"MODE": "offline", "DIR": str(folder), "SILENT": "true", "PROJECT": "mine"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for place in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{place}_DIR", str(tmp_path / place.lower()))
    return folder


def test_wandb_gets_values_and_settings_but_no_user_text(tmp_path: Path, data: Path, offline_wandb: Path) -> None:
    run = _train(tmp_path / "the-run", data, "report_to=all")
    (folder,) = offline_wandb.glob("wandb/offline-run-*")
    (recorded,) = folder.glob("*.wandb")
    content = recorded.read_bytes()
    for tag in (*TRAIN_TAGS, *EVAL_TAGS, "subsample_history_prob", "the-run/plug/seed-0", "mine"):
        assert tag.encode() in content, tag
    sample = Trainings(run, open_dataset(data, "train", task=run.task), models=open_models(run.config)).samples[0]
    files = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for text in (sample.query, sample.owner, sample.id):
        assert str(text).encode() not in files
    assert _scalars(run.plug_folder("plug", seed=0) / "tensorboard")
    Run.open(tmp_path / "the-run")  # no link leads out of the run


def test_wandb_without_an_account_says_what_to_do(
    tmp_path: Path, data: Path, offline_wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = ["train", "--data", data, "--out", tmp_path / "run", *TINY, *SETTINGS, "report_to=wandb"]
    # In another process, because Weights & Biases reads its variables once.
    done = subprocess.run([sys.executable, "-m", "personaplug", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search("error: Weights & Biases did not start .*wandb login.*WANDB_MODE=offline", done.stderr)
    assert not (tmp_path / "run" / "plug" / "seed-0" / "log.jsonl").exists(), "no step was trained"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_missing_package_is_an_error_before_anything_is_written(
    tmp_path: Path, data: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda each: None if each == name else importlib.util.find_spec(each))
    with pytest.raises(MissingExtra, match=rf"report_to=all.*personaplug\[{name}\]"):
        check_trackers("all")
    words = {
        "train": ["--data", str(data), "--out", str(tmp_path / "run"), *TINY],
        "quickstart": ["--out", str(tmp_path / "run")],
    }
    done = CliRunner().invoke(main, [command, *words[command], f"report_to={name}"])
    assert done.exit_code == 2
    assert f"personaplug[{name}]" in done.output
    assert not (tmp_path / "run").exists()


def test_finished_run_accepts_another_tracker(tmp_path: Path, data: Path) -> None:
    run = _train(tmp_path / "run", data, "max_steps=1")
    again = _train(tmp_path / "run", data, "max_steps=1", "report_to=tensorboard")
    assert again.trained(PLUG.name, seed=0)
    assert run.id == again.id


def test_config_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    config = with_values(Config(), {"epochs": 3})
    settings = asdict(config)
    del settings["training"]["report_to"]
    settings["training"]["tensorboard"] = False
    lines = [f"# checksum {json_checksum(settings)}", json.dumps(settings)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert read_config(tmp_path / "config.yaml", unchecked=("training.report_to",)) == config
