"""Open published benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Unpack

from personaplug.data.benchmarks.lamp_qa import LampQAReader
from personaplug.data.benchmarks.longlamp import LongLampReader
from personaplug.data.benchmarks.peft_u import PeftUReader
from personaplug.data.benchmarks.personal_llm import PersonalLLMReader
from personaplug.data.benchmarks.prefeval import PrefEvalReader
from personaplug.data.benchmarks.rap import RapReader
from personaplug.data.record_reader import Limits
from personaplug.data.task import Reader
from personaplug.errors import ConfigError, nearest
from personaplug.infra.plugins import load_plugins, register

ReaderFactory = Callable[..., Reader]
"""Opens a split; called with a path, the split's name, and the keywords of Limits."""

BENCHMARKS: dict[str, ReaderFactory] = {
    "lamp-qa": LampQAReader,
    "longlamp": LongLampReader,
    "peft-u": PeftUReader,
    "personal-llm": PersonalLLMReader,
    "prefeval-explicit": partial(PrefEvalReader, form="explicit"),
    "prefeval-choice": partial(PrefEvalReader, form="choice"),
    "prefeval-persona": partial(PrefEvalReader, form="persona"),
    "rap": RapReader,
}


def register_reader(name: str, factory: ReaderFactory) -> None:
    """Add a reader to `open_benchmark` and `personaplug convert`."""
    register(BENCHMARKS, _key(name), factory, kind="reader")


def open_benchmark(name: str, path: str | Path, split: str, **limits: Unpack[Limits]) -> Reader:
    """Open one split ("train", "dev" or "test") of a benchmark's published file or folder; see its reader.

    The name is one of BENCHMARKS, or a plugin's; case and underscores do not matter.
    """
    key = _key(name)
    if key not in BENCHMARKS:
        load_plugins()
    if key not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}; {nearest(key, BENCHMARKS)}")
    return BENCHMARKS[key](path, split, **limits)


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")
