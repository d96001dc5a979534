"""Tokenization of users' texts, in which no text becomes a control token.

Every text of a user goes through `TextTokenizer`. A transformers tokenizer reads `<|im_end|>` in a text as the token
that ends a turn. Its option to ignore special tokens does not cover added tokens such as `</think>`. This module copies
the tokenizer and gives its control tokens secret names, so that no text can spell them.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personaplug.errors import ConfigError, MissingModel, first_line

Offsets = list[tuple[int, int]]


def load_tokenizer(folder: Path, *, name: str) -> Any:
    """Load the tokenizer of a model's folder, or raise MissingModel with the reason."""
    from transformers import AutoTokenizer

    is_tekken = (folder / "tekken.json").exists() and not (folder / "tokenizer.json").exists()
    hint = "Its tokenizer is Mistral's tekken.json. Run: pip install mistral-common." if is_tekken else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each tokenizer family raises its own errors
        tried = [f"the tokenizer in {folder} (error of transformers: {first_line(error)})"]
        raise MissingModel(name, tried=tried, hint=hint) from error
    if is_tekken and not is_mistral_common(tokenizer) and not tokenizer.chat_template:
        raise MissingModel(name, tried=[f"the tokenizer in {folder} (it has no chat template)"], hint=hint)
    return tokenizer


def is_mistral_common(tokenizer: Any) -> bool:
    """Return True for a tokenizer of mistral-common, which has no chat template and takes few options."""
    names = {base.__name__ for base in type(tokenizer).__mro__}
    return bool(names & {"MistralCommonBackend", "MistralCommonTokenizer"})


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that decoding skips."""
    added = {} if is_mistral_common(tokenizer) else tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the control tokens by id: tokens with a meaning to the model beyond their text.

    These are the special tokens, the tokens that the chat template names, and added tokens with punctuation. Other
    added tokens only extend the vocabulary by words or white space. A single character is always text.
    """
    special = sorted(special_ids(tokenizer))
    control = dict(zip(special, tokenizer.convert_ids_to_tokens(special), strict=True))
    if not is_mistral_common(tokenizer):
        template = str(tokenizer.chat_template or "")
        for token_id, token in tokenizer.added_tokens_decoder.items():
            text = token.content.replace("▁", " ")
            is_in_template = bool(text.strip()) and token.content in template
            if is_in_template or not all(character.isalnum() or character.isspace() for character in text):
                control[token_id] = token.content
    return {token_id: content for token_id, content in control.items() if len(content) > 1}


class TextTokenizer(ABC):
    """Tokenizes texts without special tokens around them. Thread-safe. Create one with `of`.

    SentencePiece puts a space before every text. With `inside`, a text follows another text and gets no space.

    Attributes:
        control: control tokens by id.
        harmless_ids: control tokens that a text may contain: the token for unknown text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.control = tokenizer, control_tokens(tokenizer)
        # In GPT-2, the token for unknown text also ends an answer, so it is not harmless.
        self.harmless_ids = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}

    @staticmethod
    def of(tokenizer: Any) -> TextTokenizer:
        """Return the text tokenizer for a transformers tokenizer, or raise ConfigError if it reads control tokens."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        texts = _PythonTokenizer(tokenizer) if backend is None else _RustTokenizer(tokenizer, backend)
        texts._check_control_tokens()
        return texts

    @abstractmethod
    def encode_many(self, texts: Sequence[str], *, inside: bool = False) -> list[list[int]]: ...

    def offsets(self, text: str) -> Offsets | None:
        """Return the character range (start, end) of each token; None if the tokenizer has no offsets."""
        return None

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        return self.encode_many([text], inside=inside)[0] if text else []

    def encode_template(self, part: str, *, inside: bool) -> list[int]:
        """Tokenize a part of a chat template. Its control tokens stay control tokens."""
        starts = (part.find(content) for content in self.control.values() if content in part)
        start = min(starts, default=len(part)) if inside else 0
        rest = self._tokenizer(part[start:], add_special_tokens=False)["input_ids"] if part[start:] else []
        return [*self.encode(part[:start], inside=True), *rest]

    def _check_control_tokens(self) -> None:
        texts = [*self.control.values(), *(f"so {content} it" for content in self.control.values())]
        encoded = {token for ids in self.encode_many(texts) for token in ids}
        if leaked := (encoded & self.control.keys()) - self.harmless_ids:
            raise ConfigError(
                f"The model's tokenizer reads {self.control[min(leaked)]!r} in a user's text as a control token, and "
                f"this cannot be switched off. Use a model with a tokenizer.json."
            )


class _RustTokenizer(TextTokenizer):
    """A `tokenizers.Tokenizer` whose control tokens have secret names."""

    def __init__(self, tokenizer: Any, backend: Any) -> None:
        from tokenizers import Tokenizer

        super().__init__(tokenizer)
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        secret = secrets.token_hex(16)
        names = {content: f"{secret}{token_id}" for token_id, content in self.control.items()}
        for token in state["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        _rename_vocabulary(state["model"], names)
        source, bare = json.dumps(state), json.dumps(_without_first_space(state))
        self._first: Any = Tokenizer.from_str(source)
        self._inside: Any = self._first if source == bare else Tokenizer.from_str(bare)

    def encode_many(self, texts: Sequence[str], *, inside: bool = False) -> list[list[int]]:
        backend = self._inside if inside else self._first
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> Offsets:
        return list(self._first.encode(text, add_special_tokens=False).offsets)


class _PythonTokenizer(TextTokenizer):
    """A tokenizer in Python. The check at load fails if it reads control tokens in texts."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        # Tokenizers of mistral-common read no control tokens in texts and lack this option.
        self._options = {} if is_mistral_common(tokenizer) else {"split_special_tokens": True}

    def encode_many(self, texts: Sequence[str], *, inside: bool = False) -> list[list[int]]:
        options = {"add_special_tokens": False, "verbose": False, **self._options}
        return [list(self._tokenizer.encode(text, **options)) for text in texts]


def _without_first_space(part: Any) -> Any:
    """Return a serialized tokenizer without the steps that put a space before a text."""
    if isinstance(part, list):
        return [_without_first_space(one) for one in part if not _is_first_space(one)]
    if not isinstance(part, dict):
        return part
    changes: dict[str, Any] = {"prepend_scheme": "never"} if part.get("type") == "Metaspace" else {}
    changes |= {"add_prefix_space": False} if part.get("type") == "ByteLevel" else {}
    steps = {
        name: part[name] for name in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers") if name in part
    }
    changes |= {name: None if _is_first_space(step) else _without_first_space(step) for name, step in steps.items()}
    return part | changes


def _is_first_space(step: Any) -> bool:
    return isinstance(step, dict) and step.get("type") == "Prepend"


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
