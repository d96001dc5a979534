"""Any sentence-transformers model as a frozen encoder, and its trainable copy for queries."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from personaplug.encoders import openvino
from personaplug.encoders.base import (
    EncoderIdentity,
    FrozenQueries,
    QueryEncoder,
    Vectors,
    batches_by_length,
    check_finite,
    to_numpy,
    to_unit,
)
from personaplug.encoders.text_length import TokenCounter, limit_length, max_length_of
from personaplug.errors import ConfigError, MissingExtra, MissingModel
from personaplug.infra.model_hub import find_model, fingerprint, revision_of
from personaplug.infra.progress import quiet_unless_terminal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENGINES = ("torch", "openvino", "auto")

_Features = Callable[[Sequence[str]], dict[str, Tensor]]

MIN_BULK_TEXTS = 128  # compiling for OpenVINO takes as long as encoding a few hundred texts with torch

# Tokens per text of a batch. CPU caches hold about a thousand tokens; a GPU needs larger batches.
_CPU_TOKENS_PER_TEXT, _GPU_TOKENS_PER_TEXT = 16, 256

_QUERY_BATCH = 16

_MAX_CHARACTERS_PER_TOKEN = 64  # average over a text

_QUERY_PROMPTS, _DOCUMENT_PROMPTS = ("query",), ("document", "passage", "corpus")  # names, in order of preference

_FINGERPRINT_TEXT = "The Café's 3 RED dogs; naïve, ПРИВЕТ 你好 🙂"

# Texts of different lengths; one is too long for most models. Single words lose most precision in bfloat16.
_PROBES = (
    [_FINGERPRINT_TEXT, "", "title: Alien score: 5"],
    ["a slow film about whales, and a quick one about the sea " * 60],
    ["5", "great", "haha", "it...", "welcome", "Six Feet Under", "It ends with a question that nobody answers. " * 3],
)


class SentenceEncoder:
    """A frozen sentence-transformers model with the pooling and the prompts from its files.

    Vectors always have length 1, even if the model has no normalization.

    Args:
        name: see `model_hub.find_model`.
        dtype: dtype of the weights; vectors are float32.
        query_prompt, document_prompt: prefix of queries and of items; None = the model's prompt, which may be empty.
        max_length: number of tokens, special ones included, at which texts are cut; None = the model's own limit.
        engine: `torch`, `openvino` or `auto`, for many texts at once and for frozen queries. `auto` uses OpenVINO if
            it is installed, faster on this CPU, and gives the same vectors for test texts.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        max_length: int | None = None,
        engine: str = "torch",
    ) -> None:
        self._engine = _available_engine(engine, device=device)
        folder = find_model(name)
        self._model = load_model(folder, name=name, device=device, dtype=dtype)
        limit_length(self._model, max_length)
        self._counter = TokenCounter(self._model.tokenizer)
        width = width_of(self._model, name=name)
        self.identity = EncoderIdentity(
            name=name,
            revision=revision_of(name, folder),
            pooling=_pooling(self._model),
            normalized=True,
            prompt=_prompt(self._model, _DOCUMENT_PROMPTS) if document_prompt is None else document_prompt,
            query_prompt=_prompt(self._model, _QUERY_PROMPTS) if query_prompt is None else query_prompt,
            max_length=max_length_of(self._model),
            width=width,
            fingerprint=_encoder_fingerprint(self._model),
        )
        self.width, self.truncated = width, 0

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors of documents in order; a repeated text is encoded once.

        Batches have `batch_size` short texts, or fewer long texts, so that the memory stays constant.
        """
        counts = Counter(texts)
        distinct = list(counts)
        lengths = self._counter.count(
            [self.identity.prompt + _encodable(_readable(self._model, text)) for text in distinct]
        )
        limit = self.identity.max_length
        if limit is not None:
            self.truncated += sum(counts[t] for t, length in zip(distinct, lengths, strict=True) if length > limit)
            lengths = [min(length, limit) for length in lengths]
        vectors = np.zeros((len(distinct), self.width), dtype=np.float32)
        on_cpu = self._model.device.type == "cpu"
        max_tokens = batch_size * (_CPU_TOKENS_PER_TEXT if on_cpu else _GPU_TOKENS_PER_TEXT)
        with torch.inference_mode():
            batches = self._batches(distinct, lengths, max_tokens=max_tokens)
            if len(distinct) >= MIN_BULK_TEXTS and (compiled := self._compiled):
                compiled.encode_into(vectors, batches)
            else:
                for indices, features in batches:
                    vectors[indices] = to_numpy(_embed(self._model, features, task="document"))
        check_finite(vectors)
        index_of = {text: index for index, text in enumerate(distinct)}
        return vectors[[index_of[text] for text in texts]]

    def __getstate__(self) -> dict[str, Any]:
        # The compiled model belongs to this process; another process compiles its own.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_compiled")}

    def query_encoder(self) -> QueryEncoder:
        """Return a trainable float32 copy with the query prompt, in eval mode."""
        return _TextQueryEncoder(copy.deepcopy(self._model), identity=self.identity)

    def frozen_queries(self) -> FrozenQueries:
        """Return an encoder of queries that is not trained, compiled if the engine is OpenVINO."""
        if self._compiled_queries is None:
            return self.query_encoder().requires_grad_(False)
        return _CompiledQueries(self._compiled_queries, self._query_features, width=self.width)

    @cached_property
    def _compiled(self) -> openvino.OpenVINOEncoder | None:
        """The model for documents, compiled by OpenVINO at first use; None = torch encodes all texts."""
        return self._compile(self._features, task="document")

    @cached_property
    def _compiled_queries(self) -> openvino.OpenVINOEncoder | None:
        """The model for queries; see `_compiled`."""
        return self._compile(self._query_features, task="query")

    def _compile(self, features: _Features, *, task: str) -> openvino.OpenVINOEncoder | None:
        if self._engine == "torch":
            return None
        return openvino.compile_encoder(
            self._model,
            partial(_embed, task=task),
            probes=[features(texts) for texts in _PROBES],
            required=self._engine == "openvino",
        )

    def _features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return _features(self._model, texts, prompt=self.identity.prompt, task="document")

    def _query_features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return _features(self._model, texts, prompt=self.identity.query_prompt, task="query")

    def _batches(
        self, texts: Sequence[str], lengths: Sequence[int], *, max_tokens: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield indices and features of texts of similar length, longest first, at most `max_tokens` with padding."""
        order = sorted(range(len(texts)), key=lambda index: -lengths[index])
        while order:
            size = max(1, max_tokens // max(1, lengths[order[0]]))
            indices, order = order[:size], order[size:]
            yield indices, self._features([texts[index] for index in indices])


class _CompiledQueries:
    """The frozen model for queries, compiled by OpenVINO: a third of torch's time for a single query."""

    def __init__(self, compiled: openvino.OpenVINOEncoder, features: _Features, *, width: int) -> None:
        self._compiled, self._features, self._width = compiled, features, width

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self._width), dtype=np.float32)
        batches = batches_by_length(texts, _QUERY_BATCH)
        features = ((batch, self._features([texts[index] for index in batch])) for batch in batches)
        self._compiled.encode_into(vectors, features)
        check_finite(vectors)
        return vectors


class _TextQueryEncoder(QueryEncoder):
    def __init__(self, model: SentenceTransformer, *, identity: EncoderIdentity) -> None:
        super().__init__()
        self.width, self._prompt = identity.width, identity.query_prompt
        # Use float32 even if the frozen encoder does not, because small steps vanish in half precision.
        self.model = model.float().requires_grad_(True).eval()
        for module in model:
            pooler = getattr(getattr(module, "auto_model", None), "pooler", None)
            if isinstance(pooler, nn.Module):  # sentence vectors bypass the pooler of BERT, so it gets no gradient
                pooler.requires_grad_(False)

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return _features(self.model, texts, prompt=self._prompt, task="query")

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return _embed(self.model, features, task="query")


def _available_engine(engine: str, *, device: str) -> str:
    if engine not in ENGINES:
        raise ConfigError(f"encoder_engine must be one of {', '.join(ENGINES)}; found {engine!r}.")
    on_cpu, is_installed = torch.device(device).type == "cpu", openvino.is_installed()
    if engine == "openvino" and not on_cpu:
        raise ConfigError(f"encoder_engine=openvino runs on the CPU; the device is {device}. Use torch or auto.")
    if engine == "openvino" and not is_installed:
        raise MissingExtra("encoder_engine=openvino", extra="fast")
    return engine if engine != "auto" or (on_cpu and is_installed) else "torch"


def load_model(folder: Path, *, name: str, device: str, dtype: torch.dtype) -> SentenceTransformer:
    """Load a frozen sentence-transformers model from its folder; `name` is for messages."""
    from sentence_transformers import SentenceTransformer

    try:
        with quiet_unless_terminal():
            settings = {"dtype": dtype}
            model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=settings)
    except (OSError, ValueError, KeyError) as error:
        raise MissingModel(name, tried=[f"{folder} (it does not load as an encoder: {error})"]) from error
    return model.eval().requires_grad_(False)


def width_of(model: SentenceTransformer, *, name: str) -> int:
    """Return the size of a model's vectors; MissingModel if its files do not define it."""
    width = model.get_embedding_dimension()
    if width is None:
        raise MissingModel(name, tried=["its files (they do not define the width of its vectors)"])
    return int(width)


def weights_of(model: SentenceTransformer) -> list[str]:
    """Return a fingerprint of the weights of each module."""
    # Hash the inner model, because attribute names of its wrapper change between releases.
    return [fingerprint(getattr(module, "auto_model", module)) for module in model]


def _features(model: SentenceTransformer, texts: Sequence[str], *, prompt: str, task: str) -> dict[str, Tensor]:
    """Tokenize B texts into tensors. `prompt_length` also becomes a tensor; some models do not pool the prompt."""
    encodable = [_encodable(_readable(model, text)) for text in texts]
    features: dict[str, Any] = model.preprocess(encodable, prompt=prompt or None, task=task)
    if isinstance(features.get("prompt_length"), int):
        features["prompt_length"] = torch.full((len(texts),), features["prompt_length"])
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}


def _embed(model: SentenceTransformer, features: dict[str, Tensor], *, task: str) -> Tensor:
    on_device = {name: value.to(model.device) for name, value in features.items()}
    return to_unit(model(on_device, task=task)["sentence_embedding"].float())


def _readable(model: SentenceTransformer, text: str) -> str:
    """Cut a long text before it is tokenized, so that its length does not add to the cost.

    The cut is far beyond the model's own limit, because no language has such long tokens on average.
    """
    limit = max_length_of(model)
    return text if limit is None else text[: limit * _MAX_CHARACTERS_PER_TOKEN]


def _encodable(text: str) -> str:
    """Return the text without lone surrogates, which JSON may contain and tokenizers reject."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _prompt(model: SentenceTransformer, names: Sequence[str]) -> str:
    """Return the model's first non-empty prompt of these names, or else its default prompt."""
    candidates = [*names, model.default_prompt_name]
    return next((prompt for name in candidates if name and (prompt := model.prompts.get(name))), "")


def _pooling(model: SentenceTransformer) -> str:
    """Return the name of the pooling in the model's files; `none` if the model has no pooling module."""
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            name = mode if isinstance(mode, str) else "+".join(mode)
            return name if getattr(module, "include_prompt", True) else f"{name} without prompt"
    return "none"


def _encoder_fingerprint(model: SentenceTransformer) -> str:
    """Return a hash of the weights of all modules and of the tokens of a probe text, 16 hex digits."""
    features = _features(model, [_FINGERPRINT_TEXT], prompt="", task="document")
    tokens = str(features["input_ids"].tolist()) if "input_ids" in features else ""
    return hashlib.blake2b("|".join([*weights_of(model), tokens]).encode(), digest_size=8).hexdigest()
