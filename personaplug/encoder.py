"""Text to unit vectors: the frozen behaviour encoder, its trainable copy for queries, and who they are.

`TextEncoder` runs any sentence-transformers model, `HashEncoder` needs no download. Both say who they are by
an `EncoderIdentity`, which vectors on disk and trained plugs keep, since vectors of two encoders do not mix.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personaplug.errors import BadConfig, MissingModel
from personaplug.weights import find_model, fingerprint, quiet_unless_terminal, revision_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]

_PROVENANCE = ("name", "revision")


@dataclass(frozen=True)
class EncoderIdentity:
    """What must agree for two encoders' vectors to mean the same.

    Attributes:
        name: as it was opened: hub name, folder or `hash:WIDTH`. Says where from, not what: never compared.
        revision: the hub's commit or the package's version, where known. Never compared: `fingerprint` is.
        pooling: how token vectors become one (`mean`, `cls`, …).
        normalized: whether vectors have length 1; always so here.
        prompt: put in front of every document (history item), to the byte.
        query_prompt: put in front of every query, to the byte.
        max_length: texts are cut to this many tokens, special ones included; None = never.
        width: values in a vector (E).
        fingerprint: 16 hex digits from the weights and from what the tokenizer makes of a probe text.
    """

    name: str
    revision: str | None
    pooling: str
    normalized: bool
    prompt: str
    query_prompt: str
    max_length: int | None
    width: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderIdentity:
        """The reverse of `to_dict`.

        Raises:
            BadConfig: if a field is missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise BadConfig(f"An encoder identity needs exactly these fields: {names}.") from error

    def same_as(self, other: EncoderIdentity) -> bool:
        """Whether items and queries get the same vectors: everything agrees but name and revision."""
        return not self._differing(other)

    def same_items_as(self, other: EncoderIdentity) -> bool:
        """Whether items get the same vectors; the prompt of queries does not touch them."""
        return self._differing(other) <= {"query_prompt"}

    def describe(self) -> str:
        """One line for messages, with everything that two identities may differ in."""
        length = "texts uncut" if self.max_length is None else f"at most {self.max_length} tokens"
        prompts = f"prompts {self.prompt!r} and {self.query_prompt!r} (queries)"
        return (
            f"{self.name} ({self.width} values, {self.pooling} pooling, {length}, {prompts}, "
            f"weights {self.fingerprint})"
        )

    def _differing(self, other: EncoderIdentity) -> set[str]:
        compared = {field.name for field in fields(self)} - set(_PROVENANCE)
        return {name for name in compared if getattr(self, name) != getattr(other, name)}


class Encoder(Protocol):
    """A frozen encoder of texts."""

    @property
    def identity(self) -> EncoderIdentity:
        """Who made the vectors."""

    @property
    def width(self) -> int:
        """Values in a vector (E)."""

    @property
    def truncated(self) -> int:
        """How many of the texts encoded so far were cut at the encoder's longest length."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors of documents, in the order given; empty texts have one too."""

    def query_encoder(self) -> QueryEncoder:
        """A fresh copy for queries whose weights may be trained (PPlug, eq. 2); this encoder stays frozen."""


class QueryEncoder(nn.Module, ABC):
    """Encodes queries, differentiably: `forward(features(texts))`.

    Attributes:
        width: values in a vector (E).
    """

    width: int

    @abstractmethod
    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Turn B texts into CPU tensors whose first dimension is B, padded to the longest of them."""

    @abstractmethod
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return (B, E) unit vectors with gradients, on this module's device."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors, in the order given, without gradients or dropout."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return _in_length_order(texts, self._batch, batch_size=batch_size, width=self.width)
        finally:
            self.train(training)

    def _batch(self, texts: Sequence[str]) -> Vectors:
        return _to_numpy(self(self.features(texts)))


class TextEncoder:
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
    ) -> None:
        """Load the model.

        Args:
            name: whatever `weights.find_model` finds.
            device: where it runs.
            dtype: number format of the weights; vectors come out as float32 whatever it is.
            query_prompt: in front of queries; None = the model's own, which may be empty.
            document_prompt: in front of items; None = the model's own.
            max_length: cut texts to this many tokens, special ones included; None = the model's own limit.
        Raises:
            MissingModel: if the model is nowhere to be found, or is no text encoder.
            BadConfig: if `max_length` is beyond what the model can read.
        """
        folder = find_model(name)
        self._model = _load(folder, name=name, device=device, dtype=dtype)
        self._limit(max_length)
        # A tokenizer of its own, since switching truncation off and on is not safe between threads.
        self._uncut: Any = copy.deepcopy(self._model.tokenizer)
        self.identity = EncoderIdentity(
            name=name,
            revision=revision_of(folder),
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
        """Return (n, E) float32 unit vectors of documents, in the order given."""
        with torch.inference_mode():
            return _in_length_order(texts, self._batch, batch_size=batch_size, width=self.width)

    def query_encoder(self) -> QueryEncoder:
        """A trainable float32 copy that puts the query prompt in front; in eval mode until told to train."""
        return _TextQueryEncoder(copy.deepcopy(self._model), identity=self.identity)

    def _batch(self, texts: Sequence[str]) -> Vectors:
        features = _features(self._model, texts, prompt=self.identity.prompt, task="document")
        self.truncated += self._cut(texts, features)
        return _to_numpy(_embed(self._model, features, task="document"))

    def _cut(self, texts: Sequence[str], features: dict[str, Tensor]) -> int:
        """How many texts lost their end; only rows as long as the limit may have, so others go unmeasured."""
        limit, mask = self.identity.max_length, features.get("attention_mask")
        if limit is None or mask is None or mask.shape[1] < limit:
            return 0
        full = torch.nonzero(mask.sum(dim=1) >= limit).flatten().tolist()
        whole = [self.identity.prompt + _encodable(texts[i]) for i in full]
        ids = self._uncut(whole, truncation=False, verbose=False)["input_ids"] if whole else []
        return sum(len(row) > limit for row in ids)

    def _limit(self, max_length: int | None) -> None:
        if max_length is None:
            return
        longest = _positions(self._model)
        if not 3 <= max_length <= longest:
            raise BadConfig(f"max_length={max_length}: this encoder reads 3 to {longest} tokens.")
        self._model.max_seq_length = max_length


class HashEncoder:
    """Hashed words, character trigrams and habits of writing (casing, signs, emoji), without any model.

    Deterministic across processes and machines. Texts with words in common are near each other, so a plug has
    something to learn from; of meaning it knows nothing.

    Attributes:
        identity: who this encoder is.
        width: values in a vector (E).
        truncated: always 0, as nothing is ever cut.
    """

    truncated = 0

    def __init__(self, width: int = 256, seed: int = 0) -> None:
        """Set up.

        Args:
            width: values in a vector.
            seed: another seed hashes to other places.
        Raises:
            BadConfig: if the width is below 8, where everything would collide.
        """
        if width < 8:
            raise BadConfig(f"The hash encoder needs a width of 8 or more, not {width}.")
        self.width, self.seed = width, seed
        self.identity = EncoderIdentity(
            name=f"hash:{width}",
            revision=None,
            pooling="hash",
            normalized=True,
            prompt="",
            query_prompt="",
            max_length=None,
            width=width,
            fingerprint=hashlib.blake2b(f"hash encoder 1, seed {seed}".encode(), digest_size=8).hexdigest(),
        )

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        """Return (n, E) float32 unit vectors, in the order given; `batch_size` is of no matter here."""
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            _fill(vector, text, seed=self.seed)
        return vectors

    def query_encoder(self) -> QueryEncoder:
        """The same features, followed by a trainable linear map that starts as the identity."""
        return _HashQueryEncoder(self)


def open_encoder(
    spec: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    max_length: int | None = None,
) -> Encoder:
    """Open an encoder by name.

    Args:
        spec: `hash`, `hash:WIDTH`, or what `weights.find_model` finds.
        device: where it runs.
        dtype: number format of the weights.
        query_prompt: in front of queries; None = the model's own.
        document_prompt: in front of items; None = the model's own.
        max_length: cut texts to this many tokens; None = the model's own limit.
    Raises:
        BadConfig: if a setting is out of range.
        MissingModel: if the model is nowhere to be found.
    """
    if spec == "hash" or spec.startswith("hash:"):
        return HashEncoder(_hash_width(spec))
    return TextEncoder(
        spec,
        device=device,
        dtype=dtype,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        max_length=max_length,
    )


class _TextQueryEncoder(QueryEncoder):
    """A trainable copy of a `TextEncoder`'s model."""

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


class _HashQueryEncoder(QueryEncoder):
    """Hashed features and a linear map of them."""

    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__()
        self.width, self._encoder = encoder.width, encoder
        self.linear = nn.Linear(encoder.width, encoder.width, bias=False)
        nn.init.eye_(self.linear.weight)

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"hashed": torch.from_numpy(self._encoder.encode(texts))}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        mapped = self.linear(features["hashed"].to(self.linear.weight))
        return nn.functional.normalize(mapped, dim=-1)


def _in_length_order(
    texts: Sequence[str], encode: Callable[[Sequence[str]], Vectors], *, batch_size: int, width: int
) -> Vectors:
    """Encode in batches of texts of like length, longest first (so that memory runs out at once or never)."""
    vectors = np.zeros((len(texts), width), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        vectors[places] = encode([texts[i] for i in places])
    return vectors


def _to_numpy(vectors: Tensor) -> Vectors:
    return vectors.detach().to("cpu", torch.float32).numpy()


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


def _features(
    model: SentenceTransformer, texts: Sequence[str], *, prompt: str, task: str
) -> dict[str, Tensor]:
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


def _hash_width(spec: str) -> int:
    width = spec.removeprefix("hash").removeprefix(":")
    if width and not width.isdecimal():
        raise BadConfig(f"{spec!r}: write `hash` or `hash:WIDTH`, for instance `hash:128`.")
    return int(width or 256)


def _fill(vector: Vectors, text: str, *, seed: int) -> None:
    """Write a text's unit vector; one in which nothing is left (no text) points to a place of its own."""
    for feature, count in Counter(_hash_features(text)).items():
        place, sign = _place(feature, len(vector), seed)
        vector[place] += sign * math.sqrt(count)
    length = float(np.linalg.norm(vector))
    if length:
        vector /= length
    else:
        vector[_place("", len(vector), seed)[0]] = 1.0


def _hash_features(text: str) -> Iterator[str]:
    lowered = text.lower()
    yield from (f"w{word}" for word in re.findall(r"\w+", lowered))
    yield from (f"t{lowered[i : i + 3]}" for i in range(len(lowered) - 2))
    yield from (f"c{word}" for word in re.findall(r"\w+", text) if word != word.lower())
    yield from (f"k{_casing(word)}" for word in re.findall(r"\w+", text) if word != word.lower())
    yield from (f"s{sign}" for sign in re.findall(r"[^\w\s]", text))


def _casing(word: str) -> str:
    return "UPPER" if word.isupper() else "Title" if word.istitle() else "miXed"


@lru_cache(maxsize=1 << 16)
def _place(feature: str, width: int, seed: int) -> tuple[int, int]:
    seeded = f"{seed} {feature}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(seeded, digest_size=8).digest(), "little")
    return (number >> 1) % width, 1 if number & 1 else -1
