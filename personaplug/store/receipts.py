"""Signed receipts of erasures, and the secret that signs them. A receipt names no user."""

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
from personaplug.store.private_files import create_private, make_private_folder, restrict

_MIN_SECRET_BYTES = 16


@dataclass(frozen=True)
class Receipt:
    """A statement that all data of a user was erased.

    Attributes:
        user: keyed hash of the user's id, 64 hex digits.
        erased_at: when the deletion was committed, ISO 8601 in UTC.
        wiped: the files from which the bytes were removed: `tables`, and `log` if the database permits it.
        signature: signature of all other fields, 64 hex digits.
    """

    tenant: str
    user: str
    items: int
    erased_at: str
    wiped: tuple[str, ...]
    signature: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"wiped": list(self.wiped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Receipt:
        """Reverse `to_dict`; raise UserError if a field is missing or unknown."""
        try:
            return cls(**{**values, "wiped": tuple(values["wiped"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"A receipt has exactly these fields: {', '.join(cls.__annotations__)}.") from error


class Secret:
    """The key of a store. It signs receipts, and hashes ids and items so that a hash cannot be guessed without it."""

    def __init__(self, key: bytes) -> None:
        if len(key) < _MIN_SECRET_BYTES:
            raise ConfigError(f"A store's secret needs at least {_MIN_SECRET_BYTES} bytes; found {len(key)}.")
        self.key = key
        self.item_key = bytes.fromhex(self.hash("key", "items"))

    @classmethod
    def from_file(cls, path: Path, *, create: bool) -> Secret:
        """Load the secret from a file of hex digits; with `create`, generate the file if it is missing."""
        if create:
            cls(secrets.token_bytes(32)).save(path)
        elif not path.exists():
            raise MissingData(
                f"The store's secret {path} is missing, and the store cannot open without it. Put the file there, or "
                f"name it with --secret (in Python, secret=)."
            )
        with storage_errors(path):
            restrict(path)
            text = path.read_text(encoding="ascii", errors="replace")
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            raise ConfigError(
                f"{path} is not a store's secret: expected hex digits. Name the file of the secret."
            ) from error

    def save(self, path: Path) -> None:
        """Write the secret to a file that only its owner may read; an existing file stays unchanged."""
        if path.exists():
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        make_private_folder(path.parent)
        with storage_errors(path):
            with os.fdopen(create_private(temporary), "w") as file:
                file.write(self.key.hex())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # another process was faster; both use its file
                os.link(temporary, path)
            temporary.unlink()

    def hash(self, purpose: str, *parts: str) -> str:
        """Return a keyed hash of the purpose and the parts, 64 hex digits."""
        return hmac.new(self.key, json.dumps([purpose, *parts]).encode("ascii"), hashlib.sha256).hexdigest()

    def sign(self, receipt: Receipt) -> Receipt:
        return replace(receipt, signature=self._signature(receipt))

    def has_signed(self, receipt: Receipt) -> bool:
        """Return whether this secret signed the receipt, and no field was changed since."""
        signature = str(receipt.signature).encode("ascii", "replace")
        return hmac.compare_digest(self._signature(receipt).encode(), signature)

    def _signature(self, receipt: Receipt) -> str:
        fields = {name: value for name, value in receipt.to_dict().items() if name != "signature"}
        return self.hash("receipt", json.dumps(fields, sort_keys=True))
