"""fit.json: marks a finished training, and records its facts, its owner and the checksums of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personaplug.errors import DamagedFile
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.tensor_files import stored_checksum

FIT = "fit.json"


def write_facts(folder: Path, facts: Mapping[str, Any], *, owner: str) -> None:
    """Write the facts of a training, with its owner and the checksums of the weights in the same folder."""
    weights = {
        path.name: stored_checksum(path, remedy=_remedy(folder)) for path in sorted(folder.glob("*.safetensors"))
    }
    write_checked_json(folder / FIT, {**facts, "owner": owner, "weights": weights})


def read_facts(folder: Path, *, owner: str) -> dict[str, Any] | None:
    """Return the facts of a training; None if it has not finished.

    Raises:
        DamagedFile: if the file is damaged, or the file or the weights belong to another training.
    """
    if not (folder / FIT).exists():
        return None
    facts = read_json(folder / FIT, remedy=_remedy(folder))
    if facts.pop("owner", None) != owner:
        raise DamagedFile(folder / FIT, reason="it belongs to another training", remedy=_remedy(folder))
    for name, stored in facts.pop("weights", {}).items():
        if stored_checksum(folder / name, remedy=_remedy(folder)) != stored:
            raise DamagedFile(folder / name, reason="it belongs to another training", remedy=_remedy(folder))
    return facts


def _remedy(folder: Path) -> str:
    return f"Restore it, or delete {folder} and train again."
