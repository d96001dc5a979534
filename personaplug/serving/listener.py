"""Bind the server's address before the models are loaded, so that a port in use is reported at once."""

from __future__ import annotations

import os
import socket

from personaplug.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address. It refuses connections until the server listens on it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(_reason(host, port, error)) from error
    try:
        if os.name != "nt":  # on Windows, SO_REUSEADDR would share a port that is in use
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(_reason(host, port, error)) from error
    return listener


def _reason(host: str, port: int, error: Exception) -> str:
    cause = getattr(error, "strerror", None) or error
    return (
        f"Cannot listen on {host}:{port} ({cause}). Choose another --port (0 = any free port) or --host, or stop the "
        f"program that uses the port."
    )
