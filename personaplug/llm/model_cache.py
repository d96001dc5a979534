"""Find a model's cache of keys and values; its name differs between families and versions of transformers."""

from __future__ import annotations

import inspect
from typing import Any

_NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(module: Any) -> str:
    """Return the name of the cache argument of a module's forward pass."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in _NAMES if name in accepted), _NAMES[1])


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a forward pass, or None."""
    return next((output[name] for name in _NAMES if name in output), None)
