"""The names that versions and families of transformers give to a model's cache of keys, values and other states."""

from __future__ import annotations

import inspect
from typing import Any

_NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(module: Any) -> str:
    """Return the name of the argument of a module's forward pass that takes a cache."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in _NAMES if name in accepted), _NAMES[1])


def cache_of(output: Any) -> Any:
    """Return the cache in a forward pass's output, or None."""
    return next((output[name] for name in _NAMES if name in output), None)
