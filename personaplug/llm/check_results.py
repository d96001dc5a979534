"""Results of model checks, cached in memory and in the user's cache folder, so that each check runs once."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personaplug.errors import DamagedFile, StorageError
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.gguf import cache_folder
from personaplug.llm.prompt_state import Layout

if TYPE_CHECKING:
    from personaplug.llm.base import LanguageModel

_FILE = "model-checks.json"
_MAX_RESULTS = 256  # in the file; the oldest are dropped
_MIN_SECONDS = 1.0  # the results of faster checks are not written to the file

_in_memory: dict[str, ModelCheck] = {}


@dataclass(frozen=True)
class ModelCheck:
    """Result of a model check. Its reasons do not name the model."""

    way: str  # a key of `LanguageModel.ways`; empty = the model is refused
    why_not_faster: str = ""  # why faster runners failed, or why the model is refused
    layout: Layout | None = None  # of cached prompt states
    why_no_prompt_cache: str = ""
    prefix_way: str = ""  # a key of `LanguageModel.prefix_ways`


def result_key(llm: LanguageModel, texts: list[Any]) -> str:
    """Return a hash of everything that a result depends on: weights, config, dtype, code, versions, device, texts."""
    parts = [
        *(llm.identity.fingerprint, type(llm.model).__name__, llm.dtype, llm.device.type, _code_digest(), texts),
        *(version("torch"), version("transformers"), llm.model.config._attn_implementation),
        json.dumps(llm.model.config.to_dict(), sort_keys=True, default=str),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def find_result(key: str) -> ModelCheck | None:
    """Return a cached result, or None if it is missing or damaged."""
    if key not in _in_memory:
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            entry = dict(_read()[key])
            layout = entry.pop("layout")
            _in_memory[key] = ModelCheck(**entry, layout=None if layout is None else Layout.from_json(layout))
    return _in_memory.get(key)


def keep_result(key: str, result: ModelCheck, *, seconds: float) -> None:
    """Cache a result in memory. Also write it to the file if the check was slow and the folder is writable."""
    _in_memory[key] = result
    if seconds < _MIN_SECONDS:
        return
    layout = None if result.layout is None else result.layout.as_json()
    results = {**_read(), key: {**asdict(result), "layout": layout}}
    with suppress(StorageError):
        write_checked_json(cache_folder() / _FILE, dict(list(results.items())[-_MAX_RESULTS:]))


def _read() -> dict[str, Any]:
    with suppress(OSError, DamagedFile):
        return read_json(cache_folder() / _FILE, remedy="")
    return {}


@cache
def _code_digest() -> str:
    """Hash the code of this folder, so that a change of the code invalidates all results."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
