"""API keys: each belongs to a tenant, whose users no other tenant sees. Only hashes of keys are stored.

A plain SHA-256 is enough: a key is 256 random bits, which nobody can guess.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from personaplug.errors import ConfigError, MissingData
from personaplug.infra.atomic_io import write_json

OPEN_TENANT = "default"
"""The tenant of all users on a server without keys."""

_TENANTS = TypeAdapter(dict[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], Annotated[str, Field(min_length=1)]])


class ApiKeys:
    """The keys of a server."""

    def __init__(self, tenants: dict[str, str] | None = None) -> None:
        self._tenants = tenants  # by the SHA-256 of a key, in hex; None = everybody is `OPEN_TENANT`

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        return cls(_load_tenants(path))

    @property
    def is_open(self) -> bool:
        return self._tenants is None

    def tenant_of(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header, `Bearer KEY`; None if the key is missing or unknown."""
        if self._tenants is None:
            return OPEN_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, digest)]
        return matches[0] if matches and scheme.lower() == "bearer" else None

    def check_address(self, host: str) -> None:
        """Check that a server without keys listens to this machine only."""
        if self.is_open and not is_loopback(host):
            raise ConfigError(
                f"Without keys, a server listens to this machine alone (--host 127.0.0.1); found {host!r}. Make keys "
                f"with `personaplug create-key TENANT --keys FILE` and give --keys FILE."
            )


def create_key(path: Path, tenant: str) -> str:
    """Create a key for a tenant, store its hash in a file, and return the key, which is stored nowhere."""
    if not tenant.strip():
        raise ConfigError("A tenant has a name; found none.")
    tenants = _load_tenants(path) if path.exists() else {}
    key = "pp-" + secrets.token_urlsafe(32)
    write_json(path, tenants | {_digest(key): tenant})
    path.chmod(0o600)
    return key


def _load_tenants(path: Path) -> dict[str, str]:
    try:
        return _TENANTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        hint = f"`personaplug create-key TENANT --keys {path}` makes one."
        raise MissingData(f"There is no file of keys at {path}; {hint}") from None
    except (OSError, ValueError) as error:
        expected = "it maps SHA-256 digests of keys to tenants"
        raise MissingData(f"The file of keys at {path} cannot be read ({type(error).__name__}): {expected}.") from None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's own, and no other machine's."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
