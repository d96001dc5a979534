"""The config file of a run: what its checksum covers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from personaplug.config import Config
from personaplug.config_parsing import to_yaml, with_values
from personaplug.errors import DamagedFile
from personaplug.infra.checksums import json_checksum
from personaplug.infra.config_file import read_config, write_config


def test_config_without_a_setting_of_a_later_version_is_read(tmp_path: Path) -> None:
    path, config = tmp_path / "config.yaml", with_values(Config(), {"epochs": 7})
    settings = asdict(config)
    del settings["evaluation"]["sampled_answers"]
    lines = [line for line in to_yaml(config).splitlines() if "sampled_answers" not in line]
    path.write_text("\n".join([f"# checksum {json_checksum(settings)}", *lines]))
    assert read_config(path, unchecked=()) == config


@pytest.mark.parametrize(("old", "new"), [("epochs: 7", "epochs: 8"), ("  epochs: 7\n", "")])
def test_changed_and_removed_settings_are_damage(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "config.yaml"
    write_config(path, with_values(Config(), {"epochs": 7}), unchecked=())
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DamagedFile, match="do not match the checksum"):
        read_config(path, unchecked=())
