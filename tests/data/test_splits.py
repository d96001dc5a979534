"""Splits of the training set have every sample once and no user in both parts; equal seeds give equal parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from personaplug.cli.main import main
from personaplug.data import open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.splits import split_by_user
from personaplug.errors import ConfigError, RunConflict


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_simulation(SimulationConfig(users=10, queries_per_user=3, dev_users=1), folder)
    return folder


def test_split_keeps_every_sample_and_separates_users(whole: Path, tmp_path: Path) -> None:
    reader = open_dataset(whole, "train")
    parts = split_by_user(reader, tmp_path, share=0.3, seed=1)
    assert (parts.train, parts.dev, parts.train_users, parts.dev_users) == (21, 9, 7, 3)
    train, dev = (list(open_dataset(tmp_path, split)) for split in ("train", "dev"))
    assert not {sample.owner for sample in train} & {sample.owner for sample in dev}
    written = {sample.id: sample for sample in [*train, *dev]}
    assert written == {sample.id: sample for sample in reader}
    assert len(train) + len(dev) == 30


def _ids(folder: Path) -> list[str]:
    return [sample.id for sample in open_dataset(folder, "dev")]


def test_seed_determines_the_users(whole: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split_by_user(open_dataset(whole, "train"), tmp_path / name, share=0.3, seed=seed)
    assert _ids(tmp_path / "a") == _ids(tmp_path / "b") != _ids(tmp_path / "c")


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_share_out_of_range_is_refused(whole: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_by_user(open_dataset(whole, "train"), tmp_path / "out", share=share)
    assert not (tmp_path / "out").exists()


def test_folder_with_a_data_set_is_not_changed(whole: Path, tmp_path: Path) -> None:
    split_by_user(open_dataset(whole, "train"), tmp_path, share=0.3)
    before = _ids(tmp_path)
    with pytest.raises(RunConflict, match="already holds a data set"):
        split_by_user(open_dataset(whole, "train"), tmp_path, share=0.3, seed=1)
    assert _ids(tmp_path) == before


def test_negative_seed_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 or more, found -1"):
        split_by_user(open_dataset(whole, "train"), tmp_path, share=0.3, seed=-1)


def test_single_user_is_refused(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(users=1, queries_per_user=3, dev_users=1), tmp_path / "one")
    with pytest.raises(ConfigError, match="2 or more users, found 1"):
        split_by_user(open_dataset(tmp_path / "one", "train"), tmp_path / "out", share=0.5)


def test_split_command_prints_what_it_wrote(whole: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["split", "--data", str(whole), "--out", str(tmp_path / "s"), "--share", "0.3"])
    assert done.exit_code == 0, done.output
    assert "train 21 samples of 7 users, dev 9 of 3" in done.output
    assert _ids(tmp_path / "s")
