"""Convert pydantic's validation errors to one sentence."""

from __future__ import annotations

from pydantic import ValidationError

_MAX_SHOWN = 60  # characters


def first_error(error: ValidationError) -> str:
    """Describe the first error, without a full stop. The text quotes the value, so never use it for a user's text."""
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
        value = repr(details["input"])
        if len(value) > _MAX_SHOWN:
            value = f"{value[:_MAX_SHOWN]}… ({type(details['input']).__name__})"
        return f"{key!r} {message.removeprefix('Input ')}, found {value}"
    return f"{key!r}: {message[:1].lower()}{message[1:]}"
