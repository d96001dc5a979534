"""The package's errors. A message states the problem, what was expected and what to do. It contains no user text.

PersonaPlugError
├── UserError: the caller can fix it; the CLI prints it without a traceback
│   ├── ConfigError, RecordError, MissingData (DamagedFile), MissingModel, UnsupportedModel, MissingExtra
│   ├── ShapeMismatch, EncoderMismatch, LLMMismatch, RunConflict, ItemError (PartError), StoreConflict, UserErased
│   └── RequestError
└── EngineFailure, TrainingDiverged, StorageError, WorkerFailure
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class PersonaPlugError(Exception):
    """Base class. The server replies with `http_status` and `code` if a request raises the error."""

    http_status: int = 500
    code: str = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle the message: subclasses have other arguments in `__init__`.
        return Exception.__new__, (type(self), *self.args), self.__dict__


class UserError(PersonaPlugError):
    """An error that the caller can fix."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class RecordError(UserError):
    """A data file contains an invalid record.

    Attributes:
        position: position of the record in the file, such as "question 12" or "line 3".
        reason: the problem, without the text of the record.
    """

    def __init__(self, file: str | Path, position: str, *, reason: str) -> None:
        self.file, self.position, self.reason = str(file), position, reason
        super().__init__(f"{self.file}, {position}: {reason}")


class MissingData(UserError):
    """A file, folder, split or stored user does not exist."""

    http_status, code = 404, "not_found"


class DamagedFile(MissingData):
    """A file that this package wrote is truncated or changed, so its content is lost."""

    http_status, code = 503, "damaged"

    def __init__(self, path: str | Path, *, reason: str, remedy: str) -> None:
        super().__init__(f"{path} is damaged: {reason}. {remedy}")


class MissingModel(UserError):
    """A model was not found in any place."""

    def __init__(self, name: str, *, tried: Iterable[str], hint: str = "") -> None:
        hint = hint or "Give a local folder with the model, or connect to the network to reach the hub."
        super().__init__(f"The model {name!r} was not found. Tried: {'; '.join(tried)}. {hint}")


class UnsupportedModel(UserError):
    """This package cannot compute correct results with a language model.

    Attributes:
        reason: the difference from supported models.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The language model {name!r} cannot be used: {reason}. Choose another model, or another version of "
            f"transformers."
        )


class MissingExtra(UserError):
    """A required optional dependency is not installed."""

    def __init__(self, feature: str, *, extra: str) -> None:
        # pip adds an extra to the installed version, both for a checkout and for a wheel.
        super().__init__(f"{feature} needs the extra {extra!r}. Install it: pip install 'personaplug[{extra}]'")


class ShapeMismatch(UserError):
    """The shapes of arrays do not match."""


class EncoderMismatch(UserError):
    """Vectors or a plug belong to another encoder."""

    http_status, code = 503, "store"

    def __init__(self, owner: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"{owner} was made with the encoder {expected}, but the given encoder is {found}. "
            f"Load the first encoder, or encode and train again with the given one in a new folder."
        )


class LLMMismatch(UserError):
    """A plug belongs to another language model."""

    def __init__(self, *, trained_for: str, given: str) -> None:
        super().__init__(
            f"This plug was trained for the language model {trained_for}, but the given model is {given}. Soft tokens "
            f"work only with the model of their training. Load that model, or train a plug for the given one."
        )


class RunConflict(UserError):
    """A run folder contains another run."""


class ItemError(UserError):
    """An item for a history store is invalid; no item of its batch is stored."""

    http_status, code = 400, "item"


class PartError(ItemError):
    """An encoder cannot encode a part of an item.

    Attributes:
        part: the picture or the vector, by which a caller finds the item.
    """

    def __init__(self, message: str, part: object) -> None:
        super().__init__(message)
        self.part = part


class StoreConflict(UserError):
    """A history store has conflicting settings, or its settings exclude an operation."""


class UserErased(UserError):
    """The user was erased while a request was in progress, so its items are not stored and its answer is withheld."""

    http_status, code = 409, "erased"

    def __init__(self) -> None:
        super().__init__(
            "The user was erased during this request, so nothing was stored. To store new data, send it again."
        )


class RequestError(UserError):
    """A request is invalid or unsupported; `http_status` is 4xx."""

    def __init__(self, message: str, *, http_status: int = 400, code: str = "invalid_request") -> None:
        self.http_status, self.code = http_status, code
        super().__init__(message)


class EngineFailure(PersonaPlugError):
    """The language model behind the server is unreachable or does not answer."""

    http_status, code = 502, "engine"


class TrainingDiverged(PersonaPlugError):
    """A loss became NaN or infinite. The last good checkpoint is kept."""


class StorageError(PersonaPlugError):
    """The disk is full or not writable. Complete files are unchanged."""

    http_status, code = 503, "store"


class WorkerFailure(PersonaPlugError):
    """A worker of an offline job failed. Finished shards are kept."""

    def __init__(self, work: str, cause: str) -> None:
        super().__init__(
            f"{work} could not be computed ({cause}). Finished shards are kept: remove the cause, then run the same "
            f"command again."
        )


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for an error message about an unknown word: the most similar known word, or all known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(names)}."
