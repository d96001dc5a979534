"""Grammars of JSON schemas: which tokens may come next, so that a finished answer is valid JSON for the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personaplug.errors import ConfigError
from personaplug.llm.text_tokenizer import TextTokenizer
from personaplug.llm.token_bytes import TokenBytes

_LIMITS = {"max_lexer_states": 16_000, "max_grammar_size": 100_000, "verbose_errors": False}  # a state takes 2 KB
_MAX_MULTIPLE = 1000
# A model could write white space without end, so the form is that of Python's `json.dumps`. The other options are the
# library's defaults, because a schema may change options that are not given here.
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
    "json_allow_general_unicode_escapes": False,
}


class InvalidSchema(ValueError):
    """A schema that is invalid, that no answer can match, or that has a part without support; the text says why."""


class GrammarLimit(ValueError):
    """A grammar needs more memory than a limit allows, which may show only while an answer is written."""


class JsonGrammar:
    """The state of one answer: the tokens that it may continue with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> JsonGrammar:
        """Return a grammar in the same state for another answer."""
        return JsonGrammar(self._matcher.deep_copy())

    def masked(self, logits: Tensor) -> Tensor:
        """Return logits (V,) on the CPU with −∞ at tokens that cannot come next; GrammarLimit if that is too much."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():  # the mask would allow the end of the answer
            raise GrammarLimit("the grammar exceeds a limit")
        allowed = torch.from_numpy(bits[: len(logits)]).bool()
        masked = torch.full_like(logits, -torch.inf)
        masked[: len(allowed)] = torch.where(allowed, logits[: len(allowed)], -torch.inf)
        return masked

    def accept(self, token: int) -> None:
        """Append a token that can come next to the answer; GrammarLimit if that is too much."""
        if not self._matcher.consume_token(token):
            raise GrammarLimit("the grammar exceeds a limit")

    @property
    def is_complete(self) -> bool:
        """True if the answer is complete and nothing can follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class _Tokens:
    """A vocabulary in the form that llguidance reads: the bytes of each token, and the tokens that are not text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, *, size: int, end_ids: Sequence[int]) -> None:
        bytes_of = TokenBytes(tokenizer).of
        self.tokens = [bytes_of(token) for token in range(size)]
        self.eos_token_id = end_ids[0]
        self._texts = TextTokenizer.of(tokenizer)
        self.special_token_ids = sorted({*end_ids, *self._texts.control})

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a part of an answer; llguidance calls this where a schema leaves no choice."""
        return self._texts.encode(text, inside=True)


class JsonGrammars:
    """Builds grammars for the tokens of a model.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: number of logits of the model.
        end_ids: tokens that end an answer.

    Raises:
        ConfigError: if the extra `structured` is not installed, or if the bytes of the tokens are not known.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, end_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise ConfigError(
                "JSON schemas need llguidance. Install it on the server: pip install 'personaplug[structured]'."
            ) from None
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ConfigError("JSON schemas need a model with a tokenizer.json. Serve another model.")
        tokens: Any = _Tokens(tokenizer, size=max(vocabulary, len(tokenizer)), end_ids=end_ids)
        self._library: Any = llguidance
        self._tokens = llguidance.LLTokenizer(tokens, eos_token=list(end_ids))

    def grammar(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """Return the grammar of a JSON schema; InvalidSchema if it is invalid or has a part without support."""
        _check_multiples(schema)
        matcher = self._library.LLMatcher
        try:
            source = matcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
        except ValueError as error:
            raise InvalidSchema(str(error)) from None
        built = matcher(self._tokens, source, log_level=0, limits=self._library.LLParserLimits(**_LIMITS))
        if built.is_error():
            raise InvalidSchema(str(built.get_error()))
        built.compute_bitmask()  # some errors occur only here, such as those of a schema that refers to itself alone
        if built.is_error():
            raise InvalidSchema("no answer can match it, or it exceeds a limit")
        return JsonGrammar(built)


def _check_multiples(schema: Mapping[str, Any]) -> None:
    """Refuse values of `multipleOf` whose automaton would take seconds to build, or without end if they combine."""
    values = set(_multiples(schema))
    if len(values) > 1 or any(int("".join(filter(str.isdigit, str(value)))) > _MAX_MULTIPLE for value in values):
        raise InvalidSchema(
            f"multipleOf may have one value for the whole schema, of at most {_MAX_MULTIPLE} without its decimal point"
        )


def _multiples(value: object) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        multiple = value.get("multipleOf")
        if isinstance(multiple, int | float):
            yield multiple
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _multiples(item)
