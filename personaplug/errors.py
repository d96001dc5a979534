"""The tree of errors. Each class builds its own sentence: what was expected, what was found, what to do.

PersonaPlugError
├── UserError                 something the caller can put right; the CLI prints it without a traceback
│   ├── ConfigError             a setting is unknown, of the wrong type or out of range
│   ├── RecordError             a data file holds something that cannot be read as a record
│   ├── MissingData           a file, folder or split that was asked for is not there
│   ├── MissingModel          a model could not be found in any of the places it may come from
│   ├── MissingExtra          an optional dependency is needed and not installed
│   ├── ShapeMismatch         tensors made by different parts do not fit together
│   ├── EncoderMismatch       vectors or a plug belong to another encoder
│   ├── LLMMismatch           a plug belongs to another language model
│   ├── RunConflict           a run folder holds something else than what was asked for
│   ├── ItemError               an item for a store of histories has a wrong id, or holds NaN
│   ├── StoreConflict         a store of histories was made with other settings than those given
│   └── RequestError          a request to the server cannot be answered as it is
├── EngineFailure             the language model behind the server is not there, or does not answer
├── TrainingDiverged          a loss became NaN or infinite; the last good checkpoint stays
└── StorageError              the disk is full or not writable; what was complete before stays

No message ever carries a user's text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class PersonaPlugError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        http_status: status of the server's reply to a request that raised it.
        code: the error's name in that reply, for programs.
    """

    http_status: int = 500
    code: str = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        # The sentence, not the arguments it was built from, travels between processes.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[PersonaPlugError], args: tuple[Any, ...], attributes: dict[str, Any]) -> PersonaPlugError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class UserError(PersonaPlugError):
    """Something the caller can put right."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class RecordError(UserError):
    """A data file holds something that cannot be read as a record.

    Attributes:
        file: the file it stands in.
        position: where in the file, in words ("question 12", "line 3").
        reason: what is wrong with it, without the text itself.
    """

    def __init__(self, file: str | Path, position: str, *, reason: str) -> None:
        self.file, self.position, self.reason = str(file), position, reason
        super().__init__(f"{self.file}, {position}: {reason}")


class MissingData(UserError):
    """A file, folder or split that was asked for is not there."""

    http_status = 404
    code = "not_found"


class MissingModel(UserError):
    """A model could not be found in any of the places it may come from."""

    def __init__(self, name: str, *, tried: Iterable[str], hint: str = "") -> None:
        places = "; ".join(tried)
        hint = hint or "Give a local folder that holds it, or run where the hub can be reached."
        super().__init__(f"The model {name!r} was not found. Tried: {places}. {hint}")


class MissingExtra(UserError):
    """An optional dependency is needed and not installed."""

    def __init__(self, feature: str, *, extra: str) -> None:
        super().__init__(f"{feature} needs: pip install 'personaplug[{extra}]'")


class ShapeMismatch(UserError):
    """Tensors made by different parts do not fit together."""


class EncoderMismatch(UserError):
    """Vectors or a plug belong to another encoder than the one given."""

    http_status = 503
    code = "store"

    def __init__(self, owner: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"{owner} was made with the encoder {expected}; the encoder given is {found}. "
            f"Load that encoder, or encode and train again with this one in a new folder."
        )


class LLMMismatch(UserError):
    """A plug belongs to another language model than the one given."""

    def __init__(self, *, trained_for: str, given: str) -> None:
        super().__init__(
            f"This plug was trained for the language model {trained_for}; the model given is {given}. "
            f"Soft tokens mean nothing to another model: load that model, or train a plug for this one."
        )


class RunConflict(UserError):
    """A run folder holds something else than what was asked for."""


class ItemError(UserError):
    """An item for a store of histories cannot be stored as it is; nothing of its batch was."""

    http_status = 400
    code = "item"


class StoreConflict(UserError):
    """A store of histories was made with other settings than those given, or cannot do what they exclude."""


class RequestError(UserError):
    """A request to the server cannot be answered as it is.

    Attributes:
        http_status: 4xx.
    """

    def __init__(self, message: str, *, http_status: int = 400, code: str = "invalid_request") -> None:
        self.http_status, self.code = http_status, code
        super().__init__(message)


class EngineFailure(PersonaPlugError):
    """The language model behind the server is not there, or does not answer."""

    http_status = 502
    code = "engine"


class TrainingDiverged(PersonaPlugError):
    """A loss became NaN or infinite; the last good checkpoint stays."""


class StorageError(PersonaPlugError):
    """The disk is full or not writable; what was complete before stays."""

    http_status = 503
    code = "store"


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, or list them all: the end of a sentence about an unknown one."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}."
