"""Any sentence-transformers model, frozen, and its trainable copy for queries."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import personaplug.encoders.openvino as bulk
from personaplug.encoders.base import EncoderIdentity, QueryEncoder, Vectors, to_numpy
from personaplug.errors import ConfigError, MissingExtra, MissingModel
from personaplug.infra.model_hub import find_model, fingerprint, revision_of
from personaplug.infra.progress import quiet_unless_terminal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENGINES = ("torch", "openvino", "auto")

# Making OpenVINO's copy of a model takes as long as torch takes for some hundred texts: not for one user's few items.
BULK = 128

# Tokens for each text of a batch: a CPU's caches hold a thousand or so at once, a GPU wants many.
_TOKENS_PER_TEXT = {"cpu": 16}
_TOKENS_PER_TEXT_ELSEWHERE = 256

# A tokenizer's answer takes a hundred times the bytes of the lengths that are kept of it.
_MEASURED_AT_ONCE = 256

# Of different lengths, one too long for most models; single words lose most in bfloat16.
_PROBES = (
    ["The Café's 3 RED dogs; naïve, ПРИВЕТ 你好 🙂", "", "title: Alien score: 5"],
    ["a slow film about whales, and a quick one about the sea " * 60],
    [
        "5",
        "great",
        "haha",
        "it...",
        "welcome",
        "Six Feet Under",
        "It begins and ends with a question that nobody answers. " * 3,
    ],
)


class SentenceEncoder:
    """Any sentence-transformers model, frozen, its pooling and prompts as the model's own files say.

    Vectors always have length 1: where the model has no normalization of its own, it is added.

    Attributes:
        identity: who this encoder is.
        width: values in a vector (E).
        truncated: how many of the texts encoded so far were cut at `identity.max_length`.
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
        """Load the model.

        Args:
            name: whatever `model_hub.find_model` finds.
            device: where it runs.
            dtype: number format of the weights; vectors come out as float32 whatever it is.
            query_prompt: in front of queries; None = the model's own, which may be empty.
            document_prompt: in front of items; None = the model's own.
            max_length: cut texts to this many tokens, special ones included; None = the model's own limit.
            engine: what `encode` runs many texts on: `torch`; `openvino`; `auto` = openvino on a CPU where it is
                installed, faster, and gives the same vectors for a few texts. Queries always run on torch.
        Raises:
            MissingModel: if the model is nowhere to be found, or is no text encoder.
            MissingExtra: if OpenVINO is asked for by name and not installed.
            ConfigError: if `max_length` is beyond what the model can read, or `openvino` is asked for off the CPU.
        """
        self._engine = _checked_engine(engine, device=device)
        folder = find_model(name)
        self._model = _load(folder, name=name, device=device, dtype=dtype)
        self._limit(max_length)
        # A tokenizer of its own, since switching truncation off and on is not safe between threads.
        self._uncut: Any = copy.deepcopy(self._model.tokenizer)
        self.identity = EncoderIdentity(
            name=name,
            revision=revision_of(name, folder),
            pooling=_pooling(self._model),
            normalized=True,
            prompt=_own_prompt(self._model, "document") if document_prompt is None else document_prompt,
            query_prompt=_own_prompt(self._model, "query") if query_prompt is None else query_prompt,
            max_length=_max_length(self._model),
            width=_width(self._model, name=name),
            fingerprint=_encoder_fingerprint(self._model),
        )
        self.width = self.identity.width
        self.truncated = 0

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors of documents, in the order given; a text given twice is encoded once.

        Args:
            texts: any number; of each only its length and its vector are held besides.
            batch_size: short texts that run at once; of longer ones fewer, so that memory stays the same.
        Raises:
            UserError: if OpenVINO is asked for by name and cannot run this model.
        """
        times = Counter(texts)
        distinct = list(times)
        lengths = self._lengths(distinct)
        limit = self.identity.max_length
        if limit is not None:
            self.truncated += sum(times[text] for text, length in zip(distinct, lengths, strict=True) if length > limit)
            lengths = [min(length, limit) for length in lengths]
        vectors = np.zeros((len(distinct), self.width), dtype=np.float32)
        in_bulk = self._bulk if len(distinct) >= BULK else None
        with torch.inference_mode():
            batches = self._batches(distinct, lengths, tokens=batch_size * self._tokens_per_text)
            if in_bulk:
                in_bulk.encode_into(vectors, batches)
            else:
                for places, features in batches:
                    vectors[places] = to_numpy(_embed(self._model, features, task="document"))
        row = {text: place for place, text in enumerate(distinct)}
        return vectors[[row[text] for text in texts]]

    def __getstate__(self) -> dict[str, Any]:
        # OpenVINO's copy of the model belongs to this process; another one makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "_bulk"}

    def query_encoder(self) -> QueryEncoder:
        """A trainable float32 copy that puts the query prompt in front; in eval mode until told to train."""
        return _TextQueryEncoder(copy.deepcopy(self._model), identity=self.identity)

    @cached_property
    def _bulk(self) -> bulk.OpenVINOEncoder | None:
        """OpenVINO's copy of the model, made when first needed; None = torch encodes everything."""
        if self._engine == "torch":
            return None
        probes = [_features(self._model, texts, prompt=self.identity.prompt, task="document") for texts in _PROBES]
        embed = partial(_embed, task="document")
        return bulk.open_bulk(self._model, embed, probes=probes, required=self._engine == "openvino")

    @property
    def _tokens_per_text(self) -> int:
        return _TOKENS_PER_TEXT.get(self._model.device.type, _TOKENS_PER_TEXT_ELSEWHERE)

    def _batches(
        self, texts: Sequence[str], lengths: Sequence[int], *, tokens: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Places and features of texts of like length, padding included at most so many tokens, longest first.

        In that order memory runs out at once or never.
        """
        order = sorted(range(len(texts)), key=lambda place: -lengths[place])
        while order:
            size = max(1, tokens // max(1, lengths[order[0]]))
            places, order = order[:size], order[size:]
            own = [texts[place] for place in places]
            yield places, _features(self._model, own, prompt=self.identity.prompt, task="document")

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before anything is cut, prompt and special ones included."""
        from transformers import PreTrainedTokenizerBase

        whole = [self.identity.prompt + _encodable(text) for text in texts]
        if not isinstance(self._uncut, PreTrainedTokenizerBase):
            return [len(text) for text in whole]  # models of words, which cut nothing
        measured = []
        for start in range(0, len(whole), _MEASURED_AT_ONCE):
            found = self._uncut(whole[start : start + _MEASURED_AT_ONCE], truncation=False, verbose=False)
            measured += [len(row) for row in found["input_ids"]]
        return measured

    def _limit(self, max_length: int | None) -> None:
        if max_length is None:
            return
        longest = _positions(self._model)
        if not 3 <= max_length <= longest:
            raise ConfigError(f"max_length={max_length}: this encoder reads 3 to {longest} tokens.")
        self._model.max_seq_length = max_length


class _TextQueryEncoder(QueryEncoder):
    """A trainable copy of a `SentenceEncoder`'s model."""

    def __init__(self, model: SentenceTransformer, *, identity: EncoderIdentity) -> None:
        super().__init__()
        self.width, self._prompt = identity.width, identity.query_prompt
        # float32 whatever the frozen encoder runs in: small steps vanish in half precision.
        self.model = model.float().requires_grad_(True).eval()
        _freeze_unused(self.model)

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return _features(self.model, texts, prompt=self._prompt, task="query")

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return _embed(self.model, features, task="query")


def _checked_engine(engine: str, *, device: str) -> str:
    """The engine to use where OpenVINO is looked for: `auto` becomes `torch` where there is nothing to try."""
    if engine not in ENGINES:
        raise ConfigError(f"An encoder's engine is one of {', '.join(ENGINES)}; found {engine!r}.")
    on_cpu = torch.device(device).type == "cpu"
    if engine == "openvino" and not on_cpu:
        raise ConfigError(f"encoder_engine=openvino runs on the CPU; the device is {device}. Use torch or auto.")
    if engine == "openvino" and not bulk.installed():
        raise MissingExtra("encoder_engine=openvino", extra="fast")
    return engine if engine != "auto" or (on_cpu and bulk.installed()) else "torch"


def _load(folder: object, *, name: str, device: str, dtype: torch.dtype) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    try:
        with quiet_unless_terminal():
            model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, model_kwargs={"dtype": dtype}
            )
    except (OSError, ValueError, KeyError) as error:
        reason = f"{folder}, which does not load as a text encoder ({error})"
        raise MissingModel(name, tried=[reason]) from error
    return model.eval().requires_grad_(False)


def _features(model: SentenceTransformer, texts: Sequence[str], *, prompt: str, task: str) -> dict[str, Tensor]:
    """Tokenize B texts; only tensors are kept, the prompt's length too for models that do not pool it."""
    readable = [_encodable(text) for text in texts]
    found: dict[str, Any] = model.preprocess(readable, prompt=prompt or None, task=task)
    if isinstance(found.get("prompt_length"), int):
        found["prompt_length"] = torch.full((len(texts),), found["prompt_length"])
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _embed(model: SentenceTransformer, features: dict[str, Tensor], *, task: str) -> Tensor:
    there = {name: value.to(model.device) for name, value in features.items()}
    found = model(there, task=task)["sentence_embedding"]
    return nn.functional.normalize(found.float(), dim=-1)


def _encodable(text: str) -> str:
    """The text without lone surrogates, which JSON may hold and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _own_prompt(model: SentenceTransformer, kind: str) -> str:
    return model.prompts.get(kind) or ""


def _pooling(model: SentenceTransformer) -> str:
    """The pooling's name as the model's own file gives it; `none` for models that pool by themselves."""
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            joined = mode if isinstance(mode, str) else "+".join(mode)
            return joined if getattr(module, "include_prompt", True) else f"{joined} without prompt"
    return "none"


def _width(model: SentenceTransformer, *, name: str) -> int:
    width = model.get_embedding_dimension()
    if width is None:
        raise MissingModel(name, tried=["its files, which do not say how wide its vectors are"])
    return width


def _max_length(model: SentenceTransformer) -> int | None:
    """The longest text in tokens; tokenizers without a limit report an astronomic number."""
    found = model.max_seq_length
    return found if found is not None and found < 10**6 else None


def _positions(model: SentenceTransformer) -> int:
    """How many tokens the model can read at most, which may be more than it is set to."""
    return int(getattr(model.config, "max_position_embeddings", None) or _max_length(model) or 10**6)


def _encoder_fingerprint(model: SentenceTransformer) -> str:
    """16 hex digits from the weights, module by module, and from the tokens of a probe text.

    The transformer is taken out of its wrapper, whose attribute names change between releases. The probe
    shows a tokenizer that lower-cases, splits or numbers otherwise than its twin with the same weights.
    """
    parts = [fingerprint(getattr(module, "auto_model", module)) for module in model]
    probe = _features(model, ["The Café's 3 RED dogs; naïve, ПРИВЕТ 你好 🙂"], prompt="", task="document")
    parts.append(str(probe["input_ids"].tolist()) if "input_ids" in probe else "")
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


def _freeze_unused(model: SentenceTransformer) -> None:
    """Freeze the head that BERT models carry and sentence vectors bypass: no gradient ever reaches it."""
    for module in model:
        pooler = getattr(getattr(module, "auto_model", None), "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)
