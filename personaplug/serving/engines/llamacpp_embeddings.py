"""The embeddings of tokens in a GGUF file.

llama.cpp does not return them, so they are read from the file. ggml's reader finds their place, because the one of the
package `gguf` takes seconds for a large vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TABLE = b"token_embd.weight"


class _Options(ctypes.Structure):
    """gguf_init_params of ggml."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class FileEmbeddings:
    """The table of embeddings, (V, D), in the number format of the file.

    Raises:
        ValueError: if the file has no such table, or if its number format is not known.
    """

    def __init__(self, path: Path, *, width: int) -> None:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        start, size, number = _find_table(path)
        self._format: Any = GGMLQuantizationType(number)
        self._dequantize: Any = dequantize
        (row_bytes,) = quant_shape_to_byte_shape((width,), self._format)
        self._table = np.memmap(path, np.uint8, "r", offset=start, shape=(size // row_bytes, row_bytes))
        self.rows([0])

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of tokens, (n, D)."""
        stored = np.ascontiguousarray(self._table[np.asarray(ids)])
        try:
            return np.asarray(self._dequantize(stored, self._format), np.float32)
        except NotImplementedError as error:
            raise ValueError(f"its embeddings have the format {self._format.name}") from error


def _find_table(path: Path) -> tuple[int, int, int]:
    """Return the offset of the table in a file, its bytes and the number of its format."""
    library = _ggml()
    file = library.gguf_init_from_file(str(path).encode(), _Options(True, None))
    if not file:
        raise ValueError("its list of tensors cannot be read")
    try:
        index = library.gguf_find_tensor(file, _TABLE)
        if index < 0:
            raise ValueError(f"it has no tensor {_TABLE.decode()}")
        start = library.gguf_get_data_offset(file) + library.gguf_get_tensor_offset(file, index)
        return start, library.gguf_get_tensor_size(file, index), library.gguf_get_tensor_type(file, index)
    finally:
        library.gguf_free(file)


def _ggml() -> Any:
    """Load ggml's functions that read GGUF files."""
    import llama_cpp
    from llama_cpp._ctypes_extensions import load_shared_library

    library: Any = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    pointer, index, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[list[Any], Any]] = {
        "gguf_init_from_file": ([ctypes.c_char_p, _Options], pointer),
        "gguf_find_tensor": ([pointer, ctypes.c_char_p], index),
        "gguf_get_data_offset": ([pointer], size),
        "gguf_get_tensor_offset": ([pointer, index], size),
        "gguf_get_tensor_size": ([pointer, index], size),
        "gguf_get_tensor_type": ([pointer, index], ctypes.c_int),
        "gguf_free": ([pointer], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
