"""What an erasure hands out: a receipt that anyone may keep, which names nobody, and the secret that signs it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personaplug.errors import ConfigError, MissingData, UserError
from personaplug.infra.atomic_io import storage_errors

_SHORTEST = 16


@dataclass(frozen=True)
class Receipt:
    """That everything of a user was erased.

    Attributes:
        tenant: whose user it was.
        user: a keyed hash of the user's id, 64 hex digits; without the secret it says nothing of the id.
        items: how many items of history there were.
        erased_at: when their removal was committed, ISO 8601 in UTC.
        wiped: which files were cleared of the bytes: `tables`, and `log` where the database let us.
        signature: 64 hex digits over all of this.
    """

    tenant: str
    user: str
    items: int
    erased_at: str
    wiped: tuple[str, ...]
    signature: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self) | {"wiped": list(self.wiped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Receipt:
        """The reverse of `to_dict`.

        Raises:
            UserError: if these are not a receipt's fields.
        """
        try:
            return cls(**{**values, "wiped": tuple(values["wiped"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"A receipt has exactly these fields: {', '.join(cls.__annotations__)}.") from error


class Secret:
    """What only the keepers of a store know: it signs receipts, and hashes what must not be guessed from its hash.

    Args:
        key: at least 16 bytes.
    Raises:
        ConfigError: if it is shorter.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < _SHORTEST:
            raise ConfigError(f"The secret of a store needs {_SHORTEST} bytes or more, not {len(key)}.")
        self._key = key

    @classmethod
    def of_file(cls, path: Path, *, create: bool) -> Secret:
        """Read the secret from a file of hex digits.

        Args:
            path: where it is.
            create: make a new one, which only the owner of the file may read, if it is not there.
        Raises:
            MissingData: if it is not there and shall not be made.
            ConfigError: if it holds something else.
            StorageError: if it cannot be written or read.
        """
        if not path.exists():
            if not create:
                raise MissingData(
                    f"The store's secret {path} is not there: put it back. Without it no receipt can be verified."
                )
            _write_once(path, secrets.token_hex(32))
        with storage_errors(path):
            held = path.read_text(encoding="ascii", errors="replace")
        try:
            return cls(bytes.fromhex(held))
        except ValueError as error:
            raise ConfigError(f"{path} holds no secret of a store, which is written in hex digits.") from error

    def hashed(self, purpose: str, *parts: str) -> str:
        """A keyed hash of some words, 64 hex digits; another purpose gives another."""
        return hmac.new(self._key, json.dumps([purpose, *parts]).encode("ascii"), hashlib.sha256).hexdigest()

    def derived(self, purpose: str) -> bytes:
        """A key of 32 bytes for one purpose."""
        return bytes.fromhex(self.hashed("key", purpose))

    def signed(self, receipt: Receipt) -> Receipt:
        """The receipt with its signature."""
        return replace(receipt, signature=self._signature(receipt))

    def verifies(self, receipt: Receipt) -> bool:
        """Whether the receipt was signed with this secret and nothing in it was changed."""
        return hmac.compare_digest(self._signature(receipt).encode(), str(receipt.signature).encode())

    def _signature(self, receipt: Receipt) -> str:
        fields = receipt.to_dict()
        del fields["signature"]
        return self.hashed("receipt", json.dumps(fields, sort_keys=True))

    def __repr__(self) -> str:
        return "Secret(…)"


def _write_once(path: Path, text: str) -> None:
    """Write a file that only its owner may read; where two processes do, one of them wins and both read the same."""
    attempt = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        with os.fdopen(os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(attempt, path)
        attempt.unlink()
