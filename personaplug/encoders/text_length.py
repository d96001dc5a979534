"""Lengths of texts in a sentence-transformers model: how many tokens it reads, and how many a text has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from personaplug.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_ENDLESS = 10**6  # tokenizers without a limit report an astronomic number
_TOKENIZED_AT_ONCE = 256  # a tokenizer's output takes a hundred times the memory of the lengths
_SHORTEST = 3


def limit_length(model: SentenceTransformer, max_length: int | None) -> None:
    """Cut texts at `max_length` tokens, special ones included; None = at the model's own limit.

    Some models' files name more tokens than there are positions for.

    Raises:
        ConfigError: if the model does not read so many tokens.
    """
    own, learned = max_length_of(model), _learned_positions(model)
    named = getattr(getattr(model[0], "config", None), "max_position_embeddings", None)
    longest = learned or named or own or _ENDLESS
    if max_length is not None and not _SHORTEST <= max_length <= longest:
        raise ConfigError(f"max_length={max_length}: this encoder reads {_SHORTEST} to {longest} tokens.")
    limit = max_length or min(own or _ENDLESS, learned or _ENDLESS)
    if limit == (own or _ENDLESS):
        return
    if _is_bare(model.tokenizer):
        model.tokenizer.enable_truncation(limit)
    else:
        model.max_seq_length = limit


def max_length_of(model: SentenceTransformer) -> int | None:
    """Return the tokens after which a model cuts texts; None = never."""
    truncation = model.tokenizer.truncation if _is_bare(model.tokenizer) else None
    length = truncation["max_length"] if truncation else model.max_seq_length
    return int(length) if length is not None and length < _ENDLESS else None


class TokenCounter:
    """Counts the tokens of uncut texts.

    It has a tokenizer to itself: switching truncation off and on is not safe between threads.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        if _is_bare(tokenizer):
            self._tokenizer.no_truncation()

    def count(self, texts: Sequence[str]) -> list[int]:
        starts = range(0, len(texts), _TOKENIZED_AT_ONCE)
        return [length for start in starts for length in self._count(list(texts[start : start + _TOKENIZED_AT_ONCE]))]

    def _count(self, texts: list[str]) -> list[int]:
        from transformers import PreTrainedTokenizerBase

        if _is_bare(self._tokenizer):
            return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        if isinstance(self._tokenizer, PreTrainedTokenizerBase):
            return [len(ids) for ids in self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        return [len(self._tokenizer.tokenize(text)) for text in texts]  # a list of words


def _learned_positions(model: SentenceTransformer) -> int | None:
    """Return for how many tokens a model has learned positions; None = it computes them.

    RoBERTa and its kin count positions from behind the padding token: 514 rows are 512 positions.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2] and "vision" not in name:
            padding = module.padding_idx
            return module.num_embeddings - int(getattr(module, "offset", 0 if padding is None else padding + 1))
    return None


def _is_bare(tokenizer: Any) -> bool:
    """True for a tokenizer of the tokenizers library, which static embeddings have."""
    from tokenizers import Tokenizer

    return isinstance(tokenizer, Tokenizer)
