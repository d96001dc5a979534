"""Tokenization of users' texts: whatever a user writes stays text and never becomes a control token.

Every text of a user goes through `TextTokenizer`. Tokenizers of transformers read `<|im_end|>` in a text as the token
that ends a turn; switching special tokens off still leaves added tokens such as `</think>`. Here the control tokens of
a copy of the tokenizer get names that nobody can guess, so no text spells one.
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
    """Load the tokenizer of a model's folder; MissingModel with the reason if transformers cannot."""
    from transformers import AutoTokenizer

    is_tekken = (folder / "tekken.json").exists() and not (folder / "tokenizer.json").exists()
    hint = "Its tokenizer is Mistral's tekken.json: pip install mistral-common." if is_tekken else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any type: each family of tokenizers has its own
        tried = [f"the tokenizer in {folder}, where transformers says: {first_line(error)}"]
        raise MissingModel(name, tried=tried, hint=hint) from error
    if is_tekken and not is_mistral_common(tokenizer) and not tokenizer.chat_template:
        raise MissingModel(name, tried=[f"the tokenizer in {folder}, which has no chat template"], hint=hint)
    return tokenizer


def is_mistral_common(tokenizer: Any) -> bool:
    """True for tokenizers that mistral-common runs: they have no template and take few options."""
    names = {kind.__name__ for kind in type(tokenizer).__mro__}
    return bool(names & {"MistralCommonBackend", "MistralCommonTokenizer"})


def special_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that decoding leaves out."""
    added = {} if is_mistral_common(tokenizer) else tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that mean something to the model beside their text, by id.

    These are the special tokens, those that the chat template names, and all other added tokens except words and
    white space: a vocabulary may be extended by words, but no word has brackets. A single character is always text.
    """
    special = sorted(special_ids(tokenizer))
    control = dict(zip(special, tokenizer.convert_ids_to_tokens(special), strict=True))
    if not is_mistral_common(tokenizer):
        template = str(tokenizer.chat_template or "")
        for token_id, token in tokenizer.added_tokens_decoder.items():
            words = token.content.replace("▁", " ")
            is_named = bool(words.strip()) and token.content in template
            if is_named or not all(sign.isalnum() or sign.isspace() for sign in words):
                control[token_id] = token.content
    return {token_id: content for token_id, content in control.items() if len(content) > 1}


class TextTokenizer(ABC):
    """Tokenizes texts, without special tokens around them; safe between threads. Make one with `of`.

    SentencePiece puts a space before every text. A text that stands behind others, `inside`, gets none.

    Attributes:
        control: the tokens that no text becomes, by id.
        harmless_ids: control tokens that a text may become after all: the one for what has no other.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.control = tokenizer, control_tokens(tokenizer)
        # Unless it also ends an answer, as in GPT-2.
        self.harmless_ids = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}

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
    def encode_many(self, texts: Sequence[str], *, inside: bool = False) -> list[list[int]]: ...

    def offsets(self, text: str) -> Offsets | None:
        """Return the first character of each token and the one after its last; None if that is not known."""
        return None

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        return self.encode_many([text], inside=inside)[0] if text else []

    def encode_template(self, part: str, *, inside: bool) -> list[int]:
        """Tokenize a part of a chat template, in which control tokens are what they are."""
        starts = (part.find(content) for content in self.control.values() if content in part)
        start = min(starts, default=len(part)) if inside else 0
        rest = self._tokenizer(part[start:], add_special_tokens=False)["input_ids"] if part[start:] else []
        return [*self.encode(part[:start], inside=True), *rest]

    def _check_control_tokens(self) -> None:
        spelled = [*self.control.values(), *(f"so {content} it" for content in self.control.values())]
        found = {token for ids in self.encode_many(spelled) for token in ids}
        if became := (found & self.control.keys()) - self.harmless_ids:
            raise ConfigError(
                f"The model's tokenizer reads {self.control[min(became)]!r} in a user's text as a control token, and "
                f"nothing switches that off. Use a model with a tokenizer.json."
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
    """A tokenizer in Python, of which the check at load shows whether it keeps control tokens out."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        # Those of mistral-common read no control tokens in texts, and know no such option.
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
