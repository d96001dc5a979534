"""Turn pydantic's validation errors into one sentence."""

from __future__ import annotations

from pydantic import ValidationError

_MAX_SHOWN = 60  # characters


def first_error(error: ValidationError) -> str:
    """Describe the first error, without a full stop. It quotes the value, so never use it for a user's text."""
    details = error.errors(include_url=False)[0]
    key = ".".join(map(str, details["loc"]))
    kind, message = details["type"], details["msg"].replace("a valid tuple", "a list")
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind == "extra_forbidden":
        return f"the key {key!r} is unknown"
    if kind == "value_error":
        reason = str(details["ctx"]["error"])
        return f"{key!r}: {reason}" if key else reason
    if message.startswith("Input should"):
        return f"{key!r} {message.removeprefix('Input ')}, found {_shown(details['input'])}"
    return f"{key!r}: {message[:1].lower()}{message[1:]}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({type(value).__name__})"
