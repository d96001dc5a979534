"""The config of a run as a YAML file, with a checksum in a comment on the first line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from personaplug.config import Config
from personaplug.config_parsing import flatten, load_config, read_yaml, to_yaml
from personaplug.errors import DamagedFile
from personaplug.infra.atomic_io import write_text
from personaplug.infra.checksums import json_checksum

_REMOVED = ("training.tensorboard",)
"""Settings in files of earlier versions that no longer exist and that no result depends on."""


def write_config(path: Path, config: Config, *, unchecked: Sequence[str], run: str = "") -> None:
    """Write the config of a run atomically; its checksum excludes the settings in `unchecked`."""
    write_text(path, f"{_first_line(config, unchecked, run)}\n{to_yaml(config)}")


def read_config(path: Path, *, unchecked: Sequence[str], run: str = "") -> Config:
    """Read a config from a file of `write_config`.

    Raises:
        DamagedFile: if a setting that the checksum covers was changed, or the file belongs to another run.
        MissingData, ConfigError: see `load_config`.
    """
    config = load_config(path, ignored=_REMOVED)
    first_line = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    expected = _first_line(config, unchecked, run, written=flatten(read_yaml(path)))
    if first_line != expected:
        is_from_other_run = first_line.split()[:3] == expected.split()[:3]
        mismatch = "its settings do not match the checksum in its first line"
        reason = "it belongs to another run" if is_from_other_run else mismatch
        raise DamagedFile(path, reason=reason, remedy="Restore it, or train again in a new folder.")
    return config


def _first_line(config: Config, unchecked: Sequence[str], run: str, *, written: Mapping[str, Any] | None = None) -> str:
    """Return the first line of a file.

    Args:
        written: the settings in the file, which may differ from today's in the file of an earlier version; None = all.
    """
    settings = {
        section: {
            key: value
            for key, value in values.items()
            if (name := f"{section}.{key}") not in unchecked and (written is None or name in written)
        }
        for section, values in asdict(config).items()
        if written is None or any(name.startswith(f"{section}.") for name in written)
    }
    for name in _REMOVED:
        if written is not None and name in written:
            section, _, key = name.partition(".")
            settings[section][key] = written[name]
    return f"# checksum {json_checksum(settings)} of run {run}".removesuffix(" of run ")
