"""Personalize a frozen language model: a small trained plug maps a user's history to a few soft tokens.

Imports are lazy: torch loads on the first use of a public name. docs/house.md describes each room of the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from personaplug.api import Plug
    from personaplug.config import Config, PlugConfig
    from personaplug.config_parsing import load_config
    from personaplug.data import load_task, open_dataset
    from personaplug.data.event_log import EventLogReader
    from personaplug.data.records import HistoryItem, Sample
    from personaplug.encoders import open_encoder
    from personaplug.encoders.embedding_store import EmbeddingStore
    from personaplug.errors import PersonaPlugError
    from personaplug.evaluation.evaluator import evaluate
    from personaplug.inference import generate
    from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
    from personaplug.llm.loading import open_llm
    from personaplug.llm.soft_prompt import SoftPrompt
    from personaplug.methods import parse_methods, register_method
    from personaplug.methods.base import Method
    from personaplug.plug.model import PersonaPlug
    from personaplug.plug.personalizer import Personalizer
    from personaplug.run import Run, open_models
    from personaplug.store.history_store import HistoryStore
    from personaplug.training.parts import train

_HOME = {
    "Config": "config",
    "EmbeddingStore": "encoders.embedding_store",
    "EventLogReader": "data.event_log",
    "GenerationConfig": "llm.base",
    "HistoryItem": "data.records",
    "HistoryStore": "store.history_store",
    "LanguageModel": "llm.base",
    "Method": "methods.base",
    "PersonaPlug": "plug.model",
    "PersonaPlugError": "errors",
    "Personalizer": "plug.personalizer",
    "Plug": "api",
    "PlugConfig": "config",
    "PromptBatch": "llm.base",
    "Run": "run",
    "Sample": "data.records",
    "SoftPrompt": "llm.soft_prompt",
    "evaluate": "evaluation.evaluator",
    "generate": "inference",
    "load_config": "config_parsing",
    "load_task": "data",
    "open_dataset": "data",
    "open_encoder": "encoders",
    "open_llm": "llm.loading",
    "open_models": "run",
    "parse_methods": "methods",
    "register_method": "methods",
    "train": "training.parts",
}

__all__ = [
    "Config",
    "EmbeddingStore",
    "EventLogReader",
    "GenerationConfig",
    "HistoryItem",
    "HistoryStore",
    "LanguageModel",
    "Method",
    "PersonaPlug",
    "PersonaPlugError",
    "Personalizer",
    "Plug",
    "PlugConfig",
    "PromptBatch",
    "Run",
    "Sample",
    "SoftPrompt",
    "evaluate",
    "generate",
    "load_config",
    "load_task",
    "open_dataset",
    "open_encoder",
    "open_llm",
    "open_models",
    "parse_methods",
    "register_method",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'personaplug' has no attribute {name!r}")
    return getattr(import_module(f"personaplug.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
