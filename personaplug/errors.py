"""The package's errors. A message says what is wrong, what was expected and what to do; it holds no user text.

PersonaPlugError
├── UserError: the caller can correct it; the CLI prints it without a traceback
│   ├── ConfigError, RecordError, MissingData (DamagedFile), MissingModel, UnsupportedModel, MissingExtra
│   └── ShapeMismatch, EncoderMismatch, LLMMismatch, RunConflict, ItemError, StoreConflict, UserErased, RequestError
└── EngineFailure, TrainingDiverged, StorageError
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class PersonaPlugError(Exception):
    """Base class; the server replies with `http_status` and `code` if a request raises the error."""

    http_status: int = 500
    code: str = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        # The message, not the arguments of `__init__`, travels between processes.
        return Exception.__new__, (type(self), *self.args), self.__dict__


class UserError(PersonaPlugError):
    """The caller can correct something."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class RecordError(UserError):
    """A data file holds something that is not a record.

    Attributes:
        position: where in the file, in words ("question 12", "line 3").
        reason: what is wrong with it, without the text itself.
    """

    def __init__(self, file: str | Path, position: str, *, reason: str) -> None:
        self.file, self.position, self.reason = str(file), position, reason
        super().__init__(f"{self.file}, {position}: {reason}")


class MissingData(UserError):
    """A file, folder, split or stored user does not exist."""

    http_status, code = 404, "not_found"


class DamagedFile(MissingData):
    """A file that this package has written is cut off or changed, so that what it should hold is lost."""

    http_status, code = 503, "damaged"

    def __init__(self, path: str | Path, *, reason: str, remedy: str) -> None:
        super().__init__(f"{path} is damaged: {reason}. {remedy}")


class MissingModel(UserError):
    """A model is in none of the places that it may come from."""

    def __init__(self, name: str, *, tried: Iterable[str], hint: str = "") -> None:
        hint = hint or "Give a local folder that holds it, or run where the hub can be reached."
        super().__init__(f"The model {name!r} was not found. Tried: {'; '.join(tried)}. {hint}")


class UnsupportedModel(UserError):
    """A language model would give wrong numbers.

    Attributes:
        reason: what differs.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The language model {name!r} cannot be used: {reason}. Choose another model, or another version of "
            f"transformers."
        )


class MissingExtra(UserError):
    """An optional dependency is needed and not installed."""

    def __init__(self, feature: str, *, extra: str) -> None:
        # pip adds an extra to the version that is installed, from a checkout or a wheel.
        super().__init__(f"{feature} needs the extra {extra!r}. Install it: pip install 'personaplug[{extra}]'")


class ShapeMismatch(UserError):
    """The shapes of arrays do not fit together."""


class EncoderMismatch(UserError):
    """Vectors or a plug belong to another encoder."""

    http_status, code = 503, "store"

    def __init__(self, owner: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"{owner} was made with the encoder {expected}; the encoder given is {found}. "
            f"Load that encoder, or encode and train again with this one in a new folder."
        )


class LLMMismatch(UserError):
    """A plug belongs to another language model."""

    def __init__(self, *, trained_for: str, given: str) -> None:
        super().__init__(
            f"This plug was trained for the language model {trained_for}; the model given is {given}. "
            f"Soft tokens mean nothing to another model: load that model, or train a plug for this one."
        )


class RunConflict(UserError):
    """A run folder holds another run."""


class ItemError(UserError):
    """An item for a history store is invalid; nothing of its batch is stored."""

    http_status, code = 400, "item"


class StoreConflict(UserError):
    """A history store has other settings, or cannot do what they exclude."""


class UserErased(UserError):
    """A request came before its user was erased, so what it brings is not stored and its answer is withheld."""

    http_status, code = 409, "erased"

    def __init__(self) -> None:
        super().__init__("The user was erased after this request came; nothing was stored. Send it again if it is new.")


class RequestError(UserError):
    """The server cannot answer a request as it is; `http_status` is 4xx."""

    def __init__(self, message: str, *, http_status: int = 400, code: str = "invalid_request") -> None:
        self.http_status, self.code = http_status, code
        super().__init__(message)


class EngineFailure(PersonaPlugError):
    """The language model behind the server is unreachable or does not answer."""

    http_status, code = 502, "engine"


class TrainingDiverged(PersonaPlugError):
    """A loss became NaN or infinite; the last good checkpoint stays."""


class StorageError(PersonaPlugError):
    """The disk is full or not writable; complete files stay."""

    http_status, code = 503, "store"


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error's sentence about an unknown word: the known word that is meant, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}."
