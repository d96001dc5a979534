"""Check when a model is loaded that its tokenizer gives back the texts that it is given."""

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
    """Check that decoding gives what was written; log what the tokenizer has no tokens for.

    Raises:
        ConfigError: if an English text comes back as another one.
    """
    written = decode(texts.encode(_ENGLISH))
    if _plain(written) != _plain(_ENGLISH):
        raise ConfigError(
            f"The model's tokenizer turns {_ENGLISH!r} into {written!r}, so answers would not be what the model "
            f"writes. Use a model whose tokenizer decodes what it encodes."
        )
    lost = [kind for kind, text in {"capitals": _ENGLISH, **_OTHERS}.items() if decode(texts.encode(text)) != text]
    if lost:
        logger.info("the model's tokenizer does not keep: %s", ", ".join(lost))


def _plain(text: str) -> str:
    """Return the text without what many tokenizers drop on purpose: case, runs of white space, styles of letters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
