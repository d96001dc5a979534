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

BENCHMARKS: Mapping[str, Callable[..., Reader]] = MappingProxyType(
    {"lamp-qa": LampQAReader, "longlamp": LongLampReader, "peft-u": PeftUReader, "personal-llm": PersonalLLMReader}
)


def open_benchmark(name: str, path: str | Path, split: str, *, skip_bad: int = 0, max_history: int = 512) -> Reader:
    """Open one split of a benchmark's published files, with the reader's default settings.

    Args:
        name: one of BENCHMARKS; case and underscores do not matter.
        path: a file or folder as published; see the reader.
        split: "train", "dev" or "test".
        skip_bad: the number of broken records that may be skipped.
        max_history: the number of latest items that a history keeps.
    """
    key = name.strip().lower().replace("_", "-")
    if key not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}; {nearest(key, BENCHMARKS)}")
    return BENCHMARKS[key](path, split, skip_bad=skip_bad, max_history=max_history)
