"""Registry of engines. An engine answers a request with a given persona.

To add an engine, subclass `Engine` and call `register_engine`.
"""

from __future__ import annotations

from typing import NamedTuple

from personaplug.errors import ConfigError
from personaplug.infra.plugins import load_plugins, register
from personaplug.serving.engines.base import EngineOpener
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.engines.llamacpp import LlamaCppEngine
from personaplug.serving.engines.vllm import VLLMEngine


class RegisteredEngine(NamedTuple):
    open: EngineOpener
    supports_copy_head: bool


_ENGINES: dict[str, RegisteredEngine] = {}


def register_engine(name_or_scheme: str, opener: EngineOpener, *, supports_copy_head: bool = False) -> None:
    """Register an engine for `--engine NAME` or `--engine SCHEME://ADDRESS`.

    Args:
        supports_copy_head: True if the engine implements `load_copy_head`.
    """
    register(_ENGINES, name_or_scheme, RegisteredEngine(opener, supports_copy_head), kind="engine")


def find_engine(name_or_url: str) -> RegisteredEngine:
    """Return the engine for a name or for the scheme of a URL."""
    scheme = name_or_url.partition("://")[0].lower()
    if not _ENGINES.keys() & {name_or_url, scheme}:
        load_plugins()
    name = name_or_url if name_or_url in _ENGINES else scheme
    if name not in _ENGINES:
        # The message omits the name, because it may be an address with a password.
        raise ConfigError(
            f"Unknown engine. Choose one of {', '.join(_ENGINES)}, or an address such as http://127.0.0.1:8123."
        )
    return _ENGINES[name]


register_engine("local", InProcessEngine.open, supports_copy_head=True)
register_engine("llamacpp", LlamaCppEngine.open)
register_engine("http", VLLMEngine.open)
register_engine("https", VLLMEngine.open)
