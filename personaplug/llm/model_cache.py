"""A model's cache of keys, values and recurrent states. Its name differs between families and transformers versions."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.cache_utils import DynamicCache

_NAMES = ("cache", "past_key_values", "cache_params")
_RECURRENT = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}  # transformers' names in `config.layer_types`


def cache_argument(module: Any) -> str:
    """Return the name of the cache argument of a module's forward pass."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in _NAMES if name in accepted), _NAMES[1])


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a forward pass, or None."""
    return next((output[name] for name in _NAMES if name in output), None)


def empty_cache(config: Any) -> DynamicCache:
    """Return an empty cache that also keeps tokens beyond a sliding window; `config` is that of the text model."""
    if _RECURRENT.isdisjoint(getattr(config, "layer_types", None) or ()):
        return DynamicCache()  # without a config, all layers keep all tokens
    from personaplug.llm.recurrent_layers import empty_recurrent_cache  # older versions of transformers lack its layers

    return empty_recurrent_cache(config)
