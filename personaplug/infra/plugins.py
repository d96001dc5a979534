"""Registries of parts, and installed packages that add to them: entry points of the group "personaplug".

Such a package names a module, which registers its parts when it is imported, or a function, which is called.
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
        ConfigError: if the name is taken: a part that replaced another would change numbers silently.
    """
    if registry.setdefault(name, part) is not part:
        raise ConfigError(f"The {kind} {name!r} exists already. Choose another name.")


@cache
def load_plugins() -> None:
    """Load every plugin once. A registry calls this before it reports an unknown name."""
    for entry in entry_points(group="personaplug"):
        try:
            plugin = entry.load()
            if callable(plugin):
                plugin()
        except Exception as error:  # a plugin may raise anything
            name = entry.dist.name if entry.dist else "unknown"
            raise ConfigError(
                f"The plugin {entry.name!r} ({entry.value}) of the distribution {name!r} cannot be loaded: "
                f"{type(error).__name__}: {error}. Update or uninstall that distribution."
            ) from error
