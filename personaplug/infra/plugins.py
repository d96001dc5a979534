"""Registries of parts, and plugins that extend them: installed packages with entry points of the group "personaplug".

An entry point names a module that registers its parts on import, or a function that `load_plugins` calls.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from personaplug.errors import ConfigError

T = TypeVar("T")


def register(registry: dict[str, T], name: str, part: T, *, kind: str) -> None:
    """Add a part to a registry.

    Raises:
        ConfigError: if the name is taken, because a replaced part would silently change results.
    """
    if registry.setdefault(name, part) is not part:
        raise ConfigError(f"The {kind} {name!r} already exists. Choose another name.")


@cache
def load_plugins() -> None:
    """Load all plugins once. A registry calls this before it reports an unknown name."""
    for entry in entry_points(group="personaplug"):
        try:
            plugin = entry.load()
            if callable(plugin):
                plugin()
        except Exception as error:  # a plugin may raise any error
            name = entry.dist.name if entry.dist else "unknown"
            raise ConfigError(
                f"The plugin {entry.name!r} ({entry.value}) of the distribution {name!r} cannot be loaded: "
                f"{type(error).__name__}: {error}. Update or uninstall that distribution."
            ) from error
