"""The bytes of single tokens. A character may be split into several tokens, so a token alone may not be valid text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens for bytes
_CACHED_TOKENS = 16_384


class TokenBytes:
    """Maps the tokens of a transformers tokenizer to their bytes in an answer; control tokens to their names."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = "" if backend is None or backend.decoder is None else backend.decoder.__getstate__().decode()  # JSON
        self._has_backend, self._is_byte_level = backend is not None, '"ByteLevel"' in decoder
        self._has_byte_tokens = '"ByteFallback"' in decoder
        self._names = (
            {} if backend is None else {i: added.content for i, added in tokenizer.added_tokens_decoder.items()}
        )
        self._of = lru_cache(_CACHED_TOKENS)(self._compute)

    def of(self, token: int) -> bytes:
        return self._of(token)

    def _compute(self, token: int) -> bytes:
        name = self._names.get(token)
        if name is None and self._has_backend:
            name = self._tokenizer.convert_ids_to_tokens(token)
            if name is None:  # a row of the model without a token
                return b""
            if self._is_byte_level and all(symbol in _BYTE_OF_SYMBOL for symbol in name):
                return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in name)
            if self._has_byte_tokens and (match := _BYTE.fullmatch(name)):
                return bytes([int(match[1], 16)])
            name = name.replace("▁", " ")
        return str(self._tokenizer.decode([token]) if name is None else name).encode(errors="replace")


def _byte_of_symbol() -> dict[str, int]:
    """Return the byte of each symbol of a byte-level vocabulary: printable bytes are their own symbols."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_of_symbol()
