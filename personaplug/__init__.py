"""Personalize a frozen language model: a small trained plug turns a user's history into a few soft tokens.

The public names are below; torch loads when the first of them is used. docs/house.md has a line for each room.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from personaplug.config import Config, PlugConfig
    from personaplug.config_parsing import load_config
    from personaplug.data import load_task, open_dataset
    from personaplug.data.records import HistoryItem, Sample
    from personaplug.encoders import open_encoder
    from personaplug.encoders.embedding_store import EmbeddingStore
    from personaplug.errors import PersonaPlugError
    from personaplug.evaluation.evaluator import evaluate
    from personaplug.llm.base import GenerationConfig
    from personaplug.llm.loading import open_llm
    from personaplug.llm.soft_prompt import SoftPrompt
    from personaplug.plug.model import PersonaPlug
    from personaplug.plug.personalizer import Personalizer
    from personaplug.run import Run, open_models
    from personaplug.training.parts import train

_HOME = {
    "Config": "config",
    "GenerationConfig": "llm.base",
    "HistoryItem": "data.records",
    "PersonaPlug": "plug.model",
    "PersonaPlugError": "errors",
    "Personalizer": "plug.personalizer",
    "PlugConfig": "config",
    "Run": "run",
    "Sample": "data.records",
    "SoftPrompt": "llm.soft_prompt",
    "EmbeddingStore": "encoders.embedding_store",
    "evaluate": "evaluation.evaluator",
    "load_config": "config_parsing",
    "load_task": "data",
    "open_llm": "llm.loading",
    "open_dataset": "data",
    "open_encoder": "encoders",
    "open_models": "run",
    "train": "training.parts",
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
    "EmbeddingStore",
    "evaluate",
    "load_config",
    "load_task",
    "open_llm",
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
