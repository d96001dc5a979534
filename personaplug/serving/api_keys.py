"""API keys: each belongs to a tenant or to one user of a tenant. No tenant can access another tenant's users.

Only hashes of keys are stored.

Plain SHA-256 is enough, because a key has 256 random bits.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pydantic.dataclasses
from pydantic import ConfigDict, Field, TypeAdapter

from personaplug.errors import ConfigError, MissingData
from personaplug.infra.atomic_io import atomic_write, storage_errors
from personaplug.serving.openai_protocol import Name
from personaplug.store.private_files import ensure_private

logger = logging.getLogger(__name__)

OPEN_TENANT = "default"
"""The tenant of all users on a server without keys."""

_KEY_PREFIX = "pp-"
_RELOAD_INTERVAL_S = 0.5


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KeyOwner:
    """The owner of a key: a tenant or, with `user`, one of its users, whom requests then need not name."""

    tenant: Name
    user: Name | None = None


_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_OWNERS = TypeAdapter(dict[_Digest, KeyOwner])
_NAME = TypeAdapter(Name)


@dataclass(eq=False)
class ApiKeys:
    """The API keys of a server; create it with `load`. A running server sees changes of the file within a second."""

    owners: dict[str, KeyOwner] | None = None  # by hex SHA-256 of a key; None = every caller is `OPEN_TENANT`
    path: Path | None = None
    _version: tuple[int, ...] = ()
    _checked_at: float = field(default_factory=time.monotonic)

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        version = _file_version(path)  # read before the keys, so that a later change is detected
        return cls(_load_owners(path), path, version)

    @property
    def is_open(self) -> bool:
        return self.owners is None

    def owner_of(self, authorization: str | None) -> KeyOwner | None:
        """Return the owner of the key in an Authorization header `Bearer KEY`; None if it is missing or unknown."""
        self._reload()
        if self.owners is None:
            return KeyOwner(OPEN_TENANT)
        scheme, _, key = (authorization or "").partition(" ")
        return self.owners.get(_digest(key.strip())) if scheme.lower() == "bearer" else None

    def check_address(self, host: str) -> None:
        """Check that a server without keys only accepts connections from this machine."""
        if self.is_open and not is_loopback(host):
            raise ConfigError(
                f"Without API keys, --host must be this machine (127.0.0.1); found {host!r}. Create a key with "
                f"`personaplug create-key TENANT --keys FILE`, then start the server with --keys FILE."
            )

    def _reload(self) -> None:
        """Reload the file if it has changed; keep the current keys if the file cannot be read."""
        now = time.monotonic()
        if self.path is None or now - self._checked_at < _RELOAD_INTERVAL_S:
            return
        self._checked_at = now
        version = _file_version(self.path)
        if version == self._version:
            return
        self._version = version
        try:
            self.owners = _load_owners(self.path)
            logger.info("reloaded the key file: %d keys", len(self.owners))
        except MissingData as error:
            logger.error("cannot reload the key file, so the current keys stay valid: %s", error)


def create_key(path: Path, tenant: str, *, user: str | None = None) -> str:
    """Create a key for a tenant or one of its users. Store only the hash in the file, and return the key."""
    for kind, name in {"tenant": tenant, **({} if user is None else {"user": user})}.items():
        _check_name(kind, name)
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    with _locked(path):
        owners = _load_owners(path) if path.exists() else {}
        _write_owners(path, owners | {_digest(key): KeyOwner(tenant, user)})
    return key


def _check_name(kind: str, name: str) -> None:
    try:
        _NAME.validate_python(name)
    except ValueError:
        message = f"The name of a {kind} must have 1 to 255 characters and no control characters. Choose another one."
        raise ConfigError(message) from None


def revoke_keys(path: Path, name: str) -> int:
    """Remove a key, or all keys of a tenant, from a file. Return their number; MissingData if there are none."""
    with _locked(path):
        owners = _load_owners(path)
        is_key = name.startswith(_KEY_PREFIX) and _digest(name) in owners
        revoked = {_digest(name)} if is_key else {digest for digest, owner in owners.items() if owner.tenant == name}
        if not revoked:
            raise MissingData(f"The key file {path} has neither this key nor a tenant with this name.")
        _write_owners(path, {digest: owner for digest, owner in owners.items() if digest not in revoked})
    return len(revoked)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the key file against other writers. The lock is on its folder, because each write replaces the file."""
    import fcntl  # not on Windows, where a server can still read a key file from elsewhere

    with storage_errors(path):
        folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write_owners(path: Path, owners: dict[str, KeyOwner]) -> None:
    content = _OWNERS.dump_json(owners, indent=2, exclude_none=True) + b"\n"

    def write(temporary: Path) -> None:
        ensure_private(temporary)
        temporary.write_bytes(content)

    atomic_write(path, write)


def _file_version(path: Path) -> tuple[int, ...]:
    """Return a value that differs after every change of a file; empty if the file does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _load_owners(path: Path) -> dict[str, KeyOwner]:
    if not path.is_file():  # reading a pipe would block the server
        hint = f"Create one with `personaplug create-key TENANT --keys {path}`."
        raise MissingData(f"There is no key file at {path}. {hint}")
    try:
        return _OWNERS.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        expected = 'It must map SHA-256 digests of keys to their owners, such as {"tenant": …, "user": …}'
        raise MissingData(f"Cannot read the key file {path} ({type(error).__name__}). {expected}.") from None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def is_loopback(host: str) -> bool:
    """True if an address or a name always means this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
