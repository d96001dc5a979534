"""Tokenization of users' texts: whatever a user writes stays text and never becomes a control token.

Every text of a user goes through `TextTokenizer`. Tokenizers of transformers read `<|im_end|>` in a text as the token
that ends a turn; switching special tokens off still leaves added tokens such as `</think>`. Here the control tokens of
a copy of the tokenizer get names that nobody can guess, so no text spells one.
"""

from __future__ import annotations

import copy
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personaplug.errors import ConfigError, MissingModel

Offsets = list[tuple[int, int]]


def load_tokenizer(folder: Path, *, name: str) -> Any:
    """Load the tokenizer of a model's folder; MissingModel with the reason if transformers cannot."""
    from transformers import AutoTokenizer

    is_tekken = (folder / "tekken.json").exists() and not (folder / "tokenizer.json").exists()
    hint = "Its tokenizer is Mistral's tekken.json: pip install mistral-common." if is_tekken else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any type: each family of tokenizers has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        tried = [f"the tokenizer in {folder}, where transformers says: {reason}"]
        raise MissingModel(name, tried=tried, hint=hint) from error
    if is_tekken and not is_mistral_common(tokenizer) and not tokenizer.chat_template:
        raise MissingModel(name, tried=[f"the tokenizer in {folder}, which has no chat template"], hint=hint)
    return tokenizer


def is_mistral_common(tokenizer: Any) -> bool:
    """True for tokenizers that mistral-common runs: they have no template and take few options."""
    names = {kind.__name__ for kind in type(tokenizer).__mro__}
    return bool(names & {"MistralCommonBackend", "MistralCommonTokenizer"})


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that mean something to the model beside their text, by id.

    These are the special tokens, those that the chat template names, and all other added tokens except words and
    white space: a vocabulary may be extended by words, but no word has brackets. A single character is always text.
    """
    control = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    if not is_mistral_common(tokenizer):
        template = str(getattr(tokenizer, "chat_template", None) or "")
        for token_id, token in tokenizer.added_tokens_decoder.items():
            words = token.content.replace("▁", " ")
            is_named = bool(words.strip()) and token.content in template
            if token.special or is_named or not all(sign.isalnum() or sign.isspace() for sign in words):
                control[token_id] = token.content
    return {token_id: content for token_id, content in control.items() if len(content) > 1}


class TextTokenizer(ABC):
    """Tokenizes texts, without special tokens around them; safe between threads. Make one with `of`.

    Attributes:
        control: the tokens that no text becomes, by id.
        unknown_id: the token of what has no other.
    """

    has_offsets = True

    def __init__(self, tokenizer: Any) -> None:
        self.control = control_tokens(tokenizer)
        # The token for what has no other means nothing, unless it also ends an answer, as in GPT-2.
        self.unknown_id: int | None = tokenizer.unk_token_id
        self._harmless = {self.unknown_id} - {tokenizer.eos_token_id}

    @staticmethod
    def of(tokenizer: Any) -> TextTokenizer:
        """Return the text tokenizer of a tokenizer of transformers.

        Raises:
            ConfigError: if it cannot keep control tokens out of a text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        texts = _PythonTokenizer(tokenizer) if backend is None else _RustTokenizer(tokenizer, backend)
        texts._check_control_tokens()
        return texts

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def offsets(self, text: str) -> Offsets:
        """Return the first character of each token and the one after its last; only with `has_offsets`."""

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def _check_control_tokens(self) -> None:
        spelled = [*self.control.values(), *(f"so {content} it" for content in self.control.values())]
        found = {token for ids in self.encode_many(spelled) for token in ids}
        if became := (found & self.control.keys()) - self._harmless:
            raise ConfigError(
                f"The model's tokenizer reads {self.control[min(became)]!r} in a user's text as a control token, and "
                f"nothing switches that off. Use a model with a tokenizer.json."
            )


class _RustTokenizer(TextTokenizer):
    """A `tokenizers.Tokenizer` whose control tokens have secret names."""

    def __init__(self, tokenizer: Any, backend: Any) -> None:
        from tokenizers import Tokenizer

        super().__init__(tokenizer)
        state = json.loads(backend.to_str())
        secret = secrets.token_hex(16)
        names = {content: f"{secret}{token_id}" for token_id, content in self.control.items()}
        for token in state["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        _rename_vocabulary(state["model"], names)
        self._backend: Any = Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> Offsets:
        return self._backend.encode(text, add_special_tokens=False).offsets  # type: ignore[no-any-return]


class _PythonTokenizer(TextTokenizer):
    """A tokenizer in Python, of which the check at load shows whether it keeps control tokens out."""

    has_offsets = False

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._tokenizer = copy.deepcopy(tokenizer)
        # Those of mistral-common read no control tokens in texts, and know no such option.
        self._options = {} if is_mistral_common(tokenizer) else {"split_special_tokens": True}

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "verbose": False, **self._options}
        return [list(self._tokenizer.encode(text, **options)) for text in texts]

    def offsets(self, text: str) -> Offsets:
        raise NotImplementedError


def _rename_vocabulary(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename entries of a serialized model's vocabulary, so that no text is split into them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        return
    hidden = names.keys() & vocabulary.keys()
    model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    if model.get("unk_token") in hidden:
        model["unk_token"] = names[model["unk_token"]]
    if hidden and "merges" in model:
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if hidden.isdisjoint([*pair, "".join(pair)])]
