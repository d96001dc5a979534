"""Convert a GGUF file to safetensors once, and cache the result."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from personaplug.errors import MissingExtra, MissingModel, StorageError, first_line
from personaplug.infra.atomic_io import atomic_folder, atomic_write
from personaplug.infra.gguf_parts import file_name, join
from personaplug.infra.progress import quiet_unless_terminal

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "PERSONAPLUG_CACHE"
_CONVERTER_VERSION = b"gguf -> bf16 safetensors, 2"  # increase if the converted files change
_HASHED_BYTES = 2**20


def converted_gguf(*parts: Path) -> Path:
    """Return the folder with the safetensors of a GGUF file, given whole or in parts; convert it on the first call."""
    name = file_name(parts[0])
    target = cache_folder() / "models" / f"{name.removesuffix('.gguf')}-{_fingerprint(parts)}"
    if target.is_dir():
        return target
    if find_spec("gguf") is None:
        raise MissingExtra("The conversion of a GGUF file", extra="gguf")
    logger.warning("Converting %s to safetensors once; this takes about 15 s per 135M parameters", name)
    try:
        # A read-only cache folder fails before the conversion. If several processes convert, the first copy is kept.
        with atomic_folder(target, replace=False) as folder:
            if len(parts) == 1:
                _convert(parts[0], folder)
            else:
                join(parts, whole := folder / name)
                _convert(whole, folder)
                whole.unlink()
    except StorageError as error:
        raise StorageError(f"{error} Alternatively, set {CACHE_VARIABLE} to another folder.") from error
    return target


def joined_gguf(*parts: Path) -> Path:
    """Return a cached GGUF file that is given in parts; join them on the first call."""
    name = file_name(parts[0]).removesuffix(".gguf")
    target = cache_folder() / "models" / f"{name}-{_fingerprint(parts)}.gguf"
    if not target.is_file():
        atomic_write(target, lambda temporary: join(parts, temporary))
    return target


def cache_folder() -> Path:
    """Return the folder for cached files, which can be deleted at any time."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/personaplug").expanduser()


def _fingerprint(parts: Sequence[Path]) -> str:
    """Hash a file's size, first MiB and last MiB to 16 hex digits; hashing the whole file would take too long."""
    size = sum(part.stat().st_size for part in parts)
    with parts[0].open("rb") as first:
        start = first.read(_HASHED_BYTES)
    with parts[-1].open("rb") as last:
        last.seek(max(0, parts[-1].stat().st_size - _HASHED_BYTES))
        content = _CONVERTER_VERSION + str(size).encode() + start + last.read()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Save the dequantized model in bfloat16, and its tokenizer."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    factory: Any = AutoModelForCausalLM
    # transformers uses tqdm directly here, so only a redirect keeps its progress bar out of log files.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        try:
            quantized = factory.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # the readers raise many types of errors
            raise MissingModel(str(gguf), tried=[f"reading it as GGUF ({first_line(error)})"]) from error
    # transformers 5.17 uses the token that begins a turn as EOS, so generation would never end.
    if field := GGUFReader(gguf).get_field("tokenizer.ggml.eos_token_id"):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(field.contents()))
    # transformers refuses to save a quantized model, so copy its values to an unquantized model.
    del quantized.config.quantization_config
    model = factory.from_config(quantized.config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    with quiet_unless_terminal():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
