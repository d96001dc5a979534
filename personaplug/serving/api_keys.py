"""Who may use a server: API keys, each of a tenant whose users nobody else sees. Only hashes of keys are kept."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import secrets
from pathlib import Path

from personaplug.errors import ConfigError, MissingData
from personaplug.infra.atomic_io import write_json

OPEN_TENANT = "default"
"""Whose users they are on a server without keys."""

_PREFIX = "pp-"


class ApiKeys:
    """The keys of a server.

    Args:
        tenants: tenant by the SHA-256 of a key, in hex; None = an open server, where everybody is `OPEN_TENANT`.
    """

    def __init__(self, tenants: dict[str, str] | None = None) -> None:
        self._tenants = tenants

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """The keys of a file, which `new_key` makes.

        Raises:
            MissingData: if there is none, or it holds no keys.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MissingData(
                f"There is no file of keys at {path}; `personaplug key TENANT --keys {path}` makes one."
            ) from None
        except (OSError, ValueError) as error:
            raise MissingData(f"The file of keys at {path} cannot be read: {type(error).__name__}.") from None
        if not isinstance(found, dict) or not all(
            isinstance(tenant, str) and tenant and len(digest) == 64 for digest, tenant in found.items()
        ):
            raise MissingData(f"The file of keys at {path} is not one: it maps SHA-256 digests of keys to tenants.")
        return cls(found)

    @property
    def open(self) -> bool:
        """Whether everybody is let in."""
        return self._tenants is None

    def tenant_of(self, authorization: str | None) -> str | None:
        """The tenant of a request's Authorization header, `Bearer KEY`; None = nobody's."""
        if self._tenants is None:
            return OPEN_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _digest(key.strip()), None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest) and scheme.lower() == "bearer":
                found = tenant
        return found

    def check_address(self, host: str) -> None:
        """Refuse to be open to others than this machine.

        Raises:
            ConfigError: if there are no keys and the address is another than loopback.
        """
        if self.open and not is_loopback(host):
            raise ConfigError(
                f"Without keys, a server listens to this machine alone (--host 127.0.0.1); found {host!r}. Make keys "
                f"with `personaplug key TENANT --keys FILE` and give --keys FILE."
            )


def new_key(path: Path, tenant: str) -> str:
    """Make a key for a tenant, note its hash in a file, and return it: nobody can look it up again.

    Raises:
        ConfigError: if the tenant has no name.
        MissingData: if the file is there and is none of keys.
    """
    if not tenant.strip():
        raise ConfigError("A tenant has a name; found none.")
    known = ApiKeys.read(path)._tenants if path.exists() else {}
    key = _PREFIX + secrets.token_urlsafe(32)
    write_json(path, {**(known or {}), _digest(key): tenant})
    path.chmod(0o600)
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's own, and no other machine's."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
