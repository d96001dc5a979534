"""A GGUF model in llama.cpp, through the low-level functions of llama-cpp-python.

A batch of llama.cpp holds either token ids or embeddings. A prompt with soft tokens is therefore several batches.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplug.errors import ConfigError, MissingExtra

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 512  # inputs of one call; each may need a row of logits
_MAGIC = b"GGUF"
_ERROR_LEVEL = 4  # of ggml's log; 3 is a warning
_UNQUANTIZED = ("F32", "F16", "BF16")


@dataclass(frozen=True, repr=False)
class Span:
    """Consecutive inputs of a sequence: token ids, or embeddings (n, D) in their place.

    Attributes:
        start: position of the first input.
        logits: the inputs whose logits are needed.
    """

    sequence: int
    start: int
    ids: Sequence[int] = ()
    embeds: NDArray[np.float32] | None = None
    logits: Literal["last", "all"] = "last"

    def __len__(self) -> int:
        return len(self.ids) if self.embeds is None else len(self.embeds)

    @property
    def end(self) -> int:
        """Position after the last input."""
        return self.start + len(self)


class LlamaModel:
    """A model with a cache of keys and values for several sequences. One thread at a time may use it.

    Args:
        cells: maximum number of cached tokens of all sequences. Copies of a sequence share their tokens.
        sequences: maximum number of sequences; their ids are the numbers below it.

    Attributes:
        width: dimension D of the embeddings.
        vocabulary: number of logits, V.
        trained_tokens: maximum length of a sequence in the model's training.
        storage: number format of most weights, such as Q4_K - Medium.
    """

    def __init__(self, path: Path, *, cells: int, sequences: int) -> None:
        self.path, self._lib = path, _library()
        _check_magic(path)
        limit = self._lib.llama_max_parallel_sequences()
        if sequences > limit:
            raise ConfigError(f"llama.cpp runs at most {limit} sequences; found {sequences}. Use a smaller --max-rows.")
        self._model, self._context, self._batches = None, None, dict[bool, Any]()
        try:
            self._load(cells, sequences)
        except BaseException:
            self.close()
            raise
        self._memory = self._lib.llama_get_memory(self._context)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.width: int = self._lib.llama_model_n_embd_inp(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.trained_tokens: int = self._lib.llama_model_n_ctx_train(self._model)
        self.storage = str(self._lib.llama_ftype_name(self._lib.llama_model_ftype(self._model)).decode())
        self._batches[False] = self._lib.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._batches[True] = self._lib.llama_batch_init(_BATCH_TOKENS, self.width, 1)

    def _load(self, cells: int, sequences: int) -> None:
        with _collected_errors() as errors:
            settings = self._lib.llama_model_default_params()
            self._model = self._lib.llama_model_load_from_file(str(self.path).encode(), settings)
            if not self._model:
                raise self._unusable(f"llama.cpp cannot load it ({_reason(errors)})")
            if reason := self._why_unsupported():
                raise self._unusable(reason)
            self._context = self._lib.llama_init_from_model(self._model, _context_settings(self._lib, cells, sequences))
            if not self._context:
                raise self._unusable(f"llama.cpp cannot run it ({_reason(errors)})")

    def _why_unsupported(self) -> str:
        """Return why this engine cannot run the file's kind of model; empty if it can."""
        library, model = self._lib, self._model
        if library.llama_model_has_encoder(model) or not library.llama_model_has_decoder(model):
            return "it is not a decoder-only language model"
        if any(check(model) for check in (library.llama_model_is_recurrent, library.llama_model_is_hybrid)):
            return "its model has states that are not keys and values of each token. Use --engine local"
        if library.llama_model_rope_type(model) in (library.LLAMA_ROPE_TYPE_MROPE, library.LLAMA_ROPE_TYPE_IMROPE):
            return "its model has positions of several dimensions, for pictures. Use --engine local"
        return ""

    @property
    def is_quantized(self) -> bool:
        return not any(name in self.storage for name in _UNQUANTIZED)

    @property
    def chat_template(self) -> str | None:
        template = self._lib.llama_model_chat_template(self._model, None)
        return None if template is None else template.decode("utf-8", "replace")

    def setting(self, name: str) -> str | None:
        """Return a setting of the file's model family, such as `context_length`; None if the file has none."""
        family = self._text_of(b"general.architecture")
        return self._text_of(f"{family}.{name}".encode())

    def _text_of(self, key: bytes) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = self._lib.llama_model_meta_val_str(self._model, key, buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer, according to the file."""
        return [token for token in range(self.vocabulary) if self._lib.llama_vocab_is_eog(self._vocab, token)]

    def token_names(self) -> dict[int, str]:
        """Return the names of the tokens that are text, by id."""
        normal = self._lib.LLAMA_TOKEN_ATTR_NORMAL
        ids = [t for t in range(self.vocabulary) if self._lib.llama_vocab_get_attr(self._vocab, t) & normal]
        return {t: self._lib.llama_vocab_get_text(self._vocab, t).decode("utf-8", "replace") for t in ids}

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text by llama.cpp's own tokenizer, which reads the names of control tokens as text."""
        encoded = text.encode()
        ids = (ctypes.c_int32 * (len(encoded) + 8))()
        count = self._lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, len(ids), False, False)
        return list(ids[:count])

    def decode(self, spans: Sequence[Span]) -> list[Tensor]:
        """Run inputs of several sequences, all ids or all embeddings; return the logits of each span, (n or 1, V).

        Raises:
            RuntimeError: if llama.cpp fails. The sequences are then in an unknown state.
        """
        rows = self._logits_of(spans)
        return [torch.stack(list(islice(rows, len(span) if span.logits == "all" else 1))) for span in spans]

    def _logits_of(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        """Run inputs in calls of limited size, and yield the needed rows of logits in order, each (V,)."""
        has_embeds = spans[0].embeds is not None
        sequences = np.concatenate([np.full(len(span), span.sequence) for span in spans])
        positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
        wanted = np.concatenate([np.arange(len(span)) >= _first_wanted(span) for span in spans])
        inputs: NDArray[Any] = np.concatenate([span.embeds if has_embeds else np.array(span.ids) for span in spans])
        for start in range(0, len(inputs), _BATCH_TOKENS):
            part = slice(start, start + _BATCH_TOKENS)
            batch = self._batches[has_embeds]
            _fill(batch, inputs[part], positions[part], sequences[part], wanted[part], has_embeds=has_embeds)
            if status := self._lib.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            yield from [self._row_of_logits(index) for index in np.flatnonzero(wanted[part]).tolist()]

    def _row_of_logits(self, index: int) -> Tensor:
        row = self._lib.llama_get_logits_ith(self._context, index)
        if not row:
            raise RuntimeError("llama.cpp returned no logits")
        return torch.from_numpy(np.ctypeslib.as_array(row, shape=(self.vocabulary,)).copy())

    def copy(self, sequence: int, target: int) -> None:
        """Give an empty sequence the tokens of another one."""
        self._lib.llama_memory_seq_cp(self._memory, sequence, target, -1, -1)

    def remove(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def clear(self) -> None:
        """Remove all sequences. Their keys and values stay in memory until others take their places."""
        self._lib.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the memory. The model must not be used afterwards."""
        for batch in self._batches.values():
            self._lib.llama_batch_free(batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model, self._context, self._batches = None, None, {}

    def _unusable(self, reason: str) -> ConfigError:
        return unusable_file(self.path, reason)


def unusable_file(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"The GGUF file {path} cannot be used: {reason}.")


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise unusable_file(path, f"it cannot be read ({type(error).__name__})") from error
    if magic != _MAGIC:
        raise unusable_file(path, "it is not a GGUF file. Give a file that was converted for llama.cpp")


@cache
def _library() -> Any:
    """Load llama.cpp once, without its output."""
    if find_spec("llama_cpp") is None:
        raise MissingExtra("The engine llamacpp", extra="llamacpp")
    import llama_cpp

    llama_cpp.llama_log_set(_collect_errors, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


_errors: list[str] | None = None  # while a model is loaded: what llama.cpp logs


def _collect(level: int, text: bytes, _: object) -> None:
    if _errors is not None and level == _ERROR_LEVEL:
        _errors.append(text.decode("utf-8", "replace"))


_LOG_FUNCTION: Any = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_collect_errors = _LOG_FUNCTION(_collect)  # llama.cpp calls it as long as the process runs


@contextmanager
def _collected_errors() -> Iterator[list[str]]:
    global _errors
    _errors = []
    try:
        yield _errors
    finally:
        _errors = None


def _reason(errors: Sequence[str]) -> str:
    """Return llama.cpp's first error on one line."""
    return " ".join(next(iter(errors), "no reason given").split())[:300]


def _context_settings(library: Any, cells: int, sequences: int) -> Any:
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = cells, sequences
    settings.n_batch = settings.n_ubatch = _BATCH_TOKENS
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.kv_unified = True  # sequences share their cells, and copies share their tokens
    return settings


def _first_wanted(span: Span) -> int:
    return 0 if span.logits == "all" else len(span) - 1


def _fill(
    batch: Any,
    inputs: NDArray[Any],
    positions: NDArray[np.int64],
    sequences: NDArray[np.int64],
    wanted: NDArray[np.bool_],
    *,
    has_embeds: bool,
) -> None:
    """Write inputs into a batch of llama.cpp."""
    count = batch.n_tokens = len(inputs)
    if has_embeds:
        np.ctypeslib.as_array(batch.embd, shape=inputs.shape)[:] = inputs
    else:
        np.ctypeslib.as_array(batch.token, shape=(count,))[:] = inputs
    np.ctypeslib.as_array(batch.pos, shape=(count,))[:] = positions
    np.ctypeslib.as_array(batch.n_seq_id, shape=(count,))[:] = 1
    np.ctypeslib.as_array(batch.logits, shape=(count,))[:] = wanted
    for index, sequence in enumerate(sequences.tolist()):
        batch.seq_id[index][0] = sequence
