"""Bind the server's address before the models are loaded: a taken port is an error of the first second."""

from __future__ import annotations

import os
import socket

from personaplug.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; it does not listen yet, so callers are refused until it does.

    Raises:
        ConfigError: if the port is taken or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(_reason(host, port, error)) from error
    try:
        if os.name != "nt":  # there, the option would share a port that is in use
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(_reason(host, port, error)) from error
    return listener


def _reason(host: str, port: int, error: Exception) -> str:
    cause = getattr(error, "strerror", None) or error
    return (
        f"The address {host}:{port} cannot be served ({cause}). Give another --port (0 = a free one) or --host, or "
        f"stop the program that uses it."
    )
