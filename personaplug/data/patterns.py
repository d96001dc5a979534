"""Regular expressions of a task.json. RE2 matches them in linear time, so untrusted patterns are safe."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import re2

from personaplug.data.values import Flaw

MAX_PATTERN_LENGTH = 1000
MAX_MATCHED_LENGTH = 100_000
"""Maximum length of a prompt. The search time grows with this length and with the size of the pattern."""

_MAX_BYTES = 1 << 16  # of a compiled pattern: about 2,700 instructions
_MAX_GROUPS = 32  # the time also grows with the number of groups: 200 take 2 s
_PYTHON_END = re.compile(r"((?:^|[^\\])(?:\\\\)*)\\Z")


def group_count(pattern: str) -> int:
    """Count the groups of a pattern; raise ValueError with the reason if RE2 does not accept the pattern."""
    return int(_compiled(pattern).groups)


def search(pattern: str, text: str) -> Any:
    """Return the first match of a pattern or None; `.` also matches line breaks."""
    if len(text) > MAX_MATCHED_LENGTH:
        raise Flaw(
            f"its input has {len(text):,} characters; a task with a 'query_pattern' accepts at most "
            f"{MAX_MATCHED_LENGTH:,}"
        )
    try:
        return _compiled(pattern).search(text)
    except UnicodeError:
        raise Flaw("its input is not valid Unicode, or the 'query_pattern' matches a part of a character") from None


@lru_cache(64)
def _compiled(pattern: str) -> Any:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"it has {len(pattern):,} characters; at most {MAX_PATTERN_LENGTH:,} are allowed")
    options = re2.Options()
    options.dot_nl, options.log_errors, options.max_mem = True, False, _MAX_BYTES
    try:
        # Python writes the end of the text as \Z, RE2 as \z.
        compiled = re2.compile(_PYTHON_END.sub(r"\1\\z", pattern), options)
    except re2.error as error:
        reason = error.args[0]
        raise ValueError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from None
    except UnicodeEncodeError:
        raise ValueError("it is not valid Unicode") from None
    if compiled.groups > _MAX_GROUPS:
        raise ValueError(f"it has {compiled.groups} groups; at most {_MAX_GROUPS} are allowed")
    return compiled
