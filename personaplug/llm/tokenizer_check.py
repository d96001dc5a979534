"""Check at load that a model's tokenizer decodes a text to the same text."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence

from personaplug.errors import ConfigError
from personaplug.llm.text_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_ENGLISH = "I don't know, she said: it's 5 (or 6!) of \"the best\" films."
_OTHERS = {
    "accents": "Ein naïves Café für Żółć",
    "Cyrillic": "Привет, мир",
    "Greek": "Καλημέρα κόσμε",
    "Chinese": "你好，世界",
    "Arabic": "مرحبا بالعالم",
    "Hindi": "नमस्ते दुनिया",
    "emoji": "fine 🙂 fine",
    "line breaks": "one\ntwo\n\nthree",
    "runs of spaces": "one  two   three",
    "braces and angles": "{one} <two>",
}


def check_round_trip(texts: TextTokenizer, decode: Callable[[Sequence[int]], str]) -> None:
    """Raise ConfigError unless decoding restores an English text; log the kinds of text that it does not restore."""
    decoded = decode(texts.encode(_ENGLISH))
    if _normalize(decoded) != _normalize(_ENGLISH):
        raise ConfigError(
            f"The model's tokenizer must restore a text that it encoded, but it turns {_ENGLISH!r} into {decoded!r}. "
            f"Use a model with another tokenizer."
        )
    lost = [kind for kind, text in {"capitals": _ENGLISH, **_OTHERS}.items() if decode(texts.encode(text)) != text]
    if lost:
        logger.info("the model's tokenizer does not restore: %s", ", ".join(lost))


def _normalize(text: str) -> str:
    """Remove differences that many tokenizers make on purpose: case, runs of white space, letter styles."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
