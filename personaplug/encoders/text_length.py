"""Token limits of sentence-transformers models, and token counts of texts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from personaplug.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_ENDLESS = 10**6  # tokenizers without a limit report a larger number
_TOKENIZED_AT_ONCE = 256  # a tokenizer's output takes a hundred times more memory than the lengths
_SHORTEST = 3


def limit_length(model: SentenceTransformer, max_length: int | None) -> None:
    """Make a model cut texts at `max_length` tokens, special ones included; None = at the model's own limit.

    The files of some models give a limit above the number of positions; the number of positions is used then.
    """
    own, learned = max_length_of(model), _learned_positions(model)
    named = getattr(getattr(model[0], "config", None), "max_position_embeddings", None)
    longest = learned or named or own or _ENDLESS
    if max_length is not None and not _SHORTEST <= max_length <= longest:
        raise ConfigError(f"max_length of this encoder must be {_SHORTEST} to {longest} tokens; found {max_length}.")
    limit = max_length or min(own or _ENDLESS, learned or _ENDLESS)
    if limit == (own or _ENDLESS):
        return
    if _is_bare(model.tokenizer):
        model.tokenizer.enable_truncation(limit)
    else:
        model.max_seq_length = limit


def max_length_of(model: SentenceTransformer) -> int | None:
    """Return the number of tokens at which a model cuts texts; None = never."""
    truncation = model.tokenizer.truncation if _is_bare(model.tokenizer) else None
    length = truncation["max_length"] if truncation else model.max_seq_length
    return int(length) if length is not None and length < _ENDLESS else None


class TokenCounter:
    """Counts the tokens of uncut texts.

    It copies the tokenizer, because switching truncation off and on is not thread-safe.
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
        return [len(self._tokenizer.tokenize(text)) for text in texts]  # a tokenizer of sentence-transformers


def _learned_positions(model: SentenceTransformer) -> int | None:
    """Return the number of learned positions of a model; None = it computes positions.

    RoBERTa and similar models start after the padding index, so 514 rows give 512 positions.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2] and "vision" not in name:
            padding = module.padding_idx
            return module.num_embeddings - int(getattr(module, "offset", 0 if padding is None else padding + 1))
    return None


def _is_bare(tokenizer: Any) -> bool:
    """Return True for a tokenizer of the tokenizers library, as in static embeddings."""
    from tokenizers import Tokenizer

    return isinstance(tokenizer, Tokenizer)
