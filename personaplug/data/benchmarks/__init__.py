"""Readers of published benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from personaplug.data.benchmarks.lamp_qa import LampQAReader
from personaplug.data.benchmarks.longlamp import LongLampReader
from personaplug.data.benchmarks.peft_u import PeftUReader
from personaplug.data.benchmarks.personal_llm import PersonalLLMReader
from personaplug.data.task import Reader
from personaplug.errors import ConfigError, nearest
from personaplug.infra.plugins import load_plugins

ReaderFactory = Callable[..., Reader]
"""Opens a split; called with a path, the split's name, and the keywords `skip_bad` and `max_history`."""

_READERS: dict[str, ReaderFactory] = {
    "lamp-qa": LampQAReader,
    "longlamp": LongLampReader,
    "peft-u": PeftUReader,
    "personal-llm": PersonalLLMReader,
}
BENCHMARKS: Mapping[str, ReaderFactory] = MappingProxyType(_READERS)
"""The readers by name, with those that `register_reader` added."""


def register_reader(name: str, factory: ReaderFactory) -> None:
    """Add a reader, so that `open_benchmark` and `personaplug convert` know its name."""
    key = _key(name)
    if _READERS.setdefault(key, factory) is not factory:
        raise ConfigError(f"There is already a reader of the benchmark {key!r}. Choose another name.")


def open_benchmark(name: str, path: str | Path, split: str, *, skip_bad: int = 0, max_history: int = 512) -> Reader:
    """Open one split ("train", "dev" or "test") of a benchmark's published file or folder; see its reader.

    Args:
        name: one of BENCHMARKS, or a plugin's; case and underscores do not matter.
        skip_bad: the number of broken records that may be skipped.
        max_history: the number of latest items that a history keeps.
    """
    key = _key(name)
    if key not in _READERS:
        load_plugins()
    if key not in _READERS:
        raise ConfigError(f"There is no benchmark {name!r}; {nearest(key, _READERS)}")
    return _READERS[key](path, split, skip_bad=skip_bad, max_history=max_history)


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")
