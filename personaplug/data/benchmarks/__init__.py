"""Other benchmarks than LaMP by name, each read from its published files by a reader of its own."""

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
    {
        "lamp-qa": LampQAReader,
        "longlamp": LongLampReader,
        "peft-u": PeftUReader,
        "personal-llm": PersonalLLMReader,
    }
)
"""The readers by name. Their further settings are arguments of their own."""


def open_benchmark(name: str, path: str | Path, split: str, *, skip_bad: int = 0, max_history: int = 512) -> Reader:
    """Open one split of a benchmark's published files, with the reader's own settings as they come.

    Args:
        name: one of BENCHMARKS; underscores and capitals do not matter.
        path: a file or folder as published; each reader says which.
        split: "train", "dev" or "test".
        skip_bad: how many broken records may be passed over.
        max_history: how many of the latest items of a history are kept.

    Raises:
        ConfigError: if there is no such benchmark or split, or a setting is out of range.
        MissingData: if the files are not there.
        MissingExtra: if they are Parquet and pyarrow is not installed.
        RecordError: if a file that must be read to open it is broken.
    """
    wanted = name.strip().lower().replace("_", "-")
    if wanted not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}; {nearest(wanted, BENCHMARKS)}")
    return BENCHMARKS[wanted](path, split, skip_bad=skip_bad, max_history=max_history)
