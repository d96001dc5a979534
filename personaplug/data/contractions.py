"""English contractions ("don't") and full forms ("do not"): write contractions, and detect which form a text has."""

from __future__ import annotations

import re
from functools import partial

# The order matters: "you will not" becomes "you won't", "it is not" becomes "it's not".
_SHORT_FORMS = {
    "will not": "won't",
    "cannot": "can't",
    "can not": "can't",
    **{f"{verb} not": f"{verb}n't" for verb in ("do", "does", "did", "would", "should", "could", "has", "have", "had")},
    **{f"{word} is": f"{word}'s" for word in ("it", "that", "there", "what", "here")},
    **{f"{word} are": f"{word}'re" for word in ("you", "they", "we")},
    "i am": "i'm",
    **{f"{word} will": f"{word}'ll" for word in ("it", "you", "they", "we", "that", "there", "i")},
    **{f"{verb} not": f"{verb}n't" for verb in ("is", "are", "was", "were")},
}
# "There it is." has no short form.
_FORMS = {full: re.compile(rf"\b{full}\b" + ("" if "not" in full else r"(?= \w)"), re.I) for full in _SHORT_FORMS}
_FULL = re.compile("|".join(form.pattern for form in _FORMS.values()), re.IGNORECASE)
_SHORT = re.compile(
    r"\b\w+(?:n't|'re|'ll|'ve|'m|'d)\b|\b(?:it|that|there|what|who|here|he|she|how|where|let)'s\b", re.IGNORECASE
)


def contract(text: str) -> str:
    """Replace full forms with contractions; keep a capital first letter."""
    for full, form in _FORMS.items():
        text = form.sub(partial(_cased_like, short=_SHORT_FORMS[full]), text)
    return text


def read_contractions(text: str) -> str | None:
    """Return "short" if a text has a contraction, "full" if it has only full forms, None if it has neither."""
    if _SHORT.search(text.replace("’", "'")):
        return "short"
    return "full" if _FULL.search(text) else None


def _cased_like(form: re.Match[str], *, short: str) -> str:
    return short[0].upper() + short[1:] if form[0][0].isupper() else short
