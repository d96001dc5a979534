"""Load installed packages that extend this one: entry points of the group "personaplug", each a module or function.

A module registers its parts (rows, readers, encoders, engines) when it is imported, a function when it is called.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from personaplug.errors import ConfigError


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
