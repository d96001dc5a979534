"""Personalize a frozen language model: a small trained plug turns a user's history into a few soft tokens.

The public names are below; torch loads when the first of them is used. The files, in reading order, each importing only
from those above it, are mapped in docs/files.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from personaplug.backends import open_backend
    from personaplug.backends.base import GenerationConfig
    from personaplug.config import Config, PlugConfig
    from personaplug.config_text import load_config
    from personaplug.data import load_task, open_dataset
    from personaplug.encoder import open_encoder
    from personaplug.errors import PersonaPlugError
    from personaplug.evaluation import evaluate
    from personaplug.personalizer import Personalizer
    from personaplug.plug import PersonaPlug
    from personaplug.recipes import train
    from personaplug.records import HistoryItem, Sample
    from personaplug.run import Run, open_models
    from personaplug.soft_prompt import SoftPrompt
    from personaplug.vectors import VectorTable

_HOME = {
    "Config": "config",
    "GenerationConfig": "backends.base",
    "HistoryItem": "records",
    "PersonaPlug": "plug",
    "PersonaPlugError": "errors",
    "Personalizer": "personalizer",
    "PlugConfig": "config",
    "Run": "run",
    "Sample": "records",
    "SoftPrompt": "soft_prompt",
    "VectorTable": "vectors",
    "evaluate": "evaluation",
    "load_config": "config_text",
    "load_task": "data",
    "open_backend": "backends",
    "open_dataset": "data",
    "open_encoder": "encoder",
    "open_models": "run",
    "train": "recipes",
}

__all__ = [
    "Config",
    "GenerationConfig",
    "HistoryItem",
    "PersonaPlug",
    "PersonaPlugError",
    "Personalizer",
    "PlugConfig",
    "Run",
    "Sample",
    "SoftPrompt",
    "VectorTable",
    "evaluate",
    "load_config",
    "load_task",
    "open_backend",
    "open_dataset",
    "open_encoder",
    "open_models",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'personaplug' has no attribute {name!r}")
    return getattr(import_module(f"personaplug.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
