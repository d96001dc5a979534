"""Any sentence-transformers model, frozen, and its trainable copy for queries."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personaplug.encoder.base import EncoderIdentity, QueryEncoder, Vectors, in_length_order, to_numpy
from personaplug.errors import BadConfig, MissingModel
from personaplug.weights import find_model, fingerprint, quiet_unless_terminal, revision_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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
            return in_length_order(texts, self._batch, batch_size=batch_size, width=self.width)

    def query_encoder(self) -> QueryEncoder:
        """A trainable float32 copy that puts the query prompt in front; in eval mode until told to train."""
        return _TextQueryEncoder(copy.deepcopy(self._model), identity=self.identity)

    def _batch(self, texts: Sequence[str]) -> Vectors:
        features = _features(self._model, texts, prompt=self.identity.prompt, task="document")
        self.truncated += self._cut(texts, features)
        return to_numpy(_embed(self._model, features, task="document"))

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
