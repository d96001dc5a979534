"""Low-rank matrices (LoRA) inside a frozen language model: one set for the task, one for a user, which add up.

LoRA (arXiv 2106.09685) adds scale · B·A to a layer's frozen matrix; OPPU (arXiv 2402.04401) puts a user's matrices on
top of those of the task. PEFT does the arithmetic. Which sets a forward pass applies is said around it by `active`;
outside any such block the model answers as if nothing were attached.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from personaplug.config import AdapterConfig
from personaplug.errors import ConfigError, MissingExtra, ShapeMismatch, UserError, nearest
from personaplug.llm.base import LanguageModel

TASK, USER = "task", "user"
NAMES = (TASK, USER)


class LoraAdapters:
    """The two sets of matrices in one model; made by `attach`, gone after `detach`.

    The matrices are float32 whatever the model computes in: the steps of a small learning rate vanish in bfloat16.
    Gradients reach the task's matrices, or those that `trainable` names, and never the model's own weights.
    """

    def __init__(self, llm: LanguageModel, model: nn.Module, paths: list[str]) -> None:
        """Wrap a model that carries both sets already; use `attach`."""
        self._backend, self._model, self._paths = llm, model, paths
        self._layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
        self._modules = {name: _holder(self._layers, name) for name in NAMES}
        self._active: tuple[str, ...] = ()
        self._trained, self._attached = TASK, True
        for name in NAMES:
            self.reset(name, seed=0)
        self._apply()

    @classmethod
    def attach(cls, llm: LanguageModel, *, config: AdapterConfig) -> LoraAdapters:
        """Put both sets into a backend's model, fresh and inactive; torch's global generator stays as it is.

        Args:
            backend: one that holds a transformers model.
            config: the layers, and the matrices' rank and scale.
        Raises:
            MissingExtra: if PEFT is not installed.
            ConfigError: if the model has no such layers; the message names those it has.
            UserError: if the model carries matrices already, or the backend holds no model of transformers.
        """
        peft = _peft()
        model = _model_of(llm)
        targets = _targets(model, config.lora_targets, peft=peft)
        settings = {
            "r": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "target_modules": list(targets),
            "fan_in_fan_out": any(_is_conv1d(layer) for layer in targets.values()),
        }
        try:
            with torch.random.fork_rng(devices=[]):
                tuner = peft.LoraModel(model, {name: peft.LoraConfig(**settings) for name in NAMES}, TASK)
                tuner.inject_adapter(model, USER)
            return cls(llm, model, list(targets))
        except BaseException:
            _remove(model, list(targets))
            raise

    def __enter__(self) -> LoraAdapters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"LoraAdapters({len(self._layers)} layers, {self.count(USER):,} parameters each)"

    def detach(self) -> None:
        """Take everything out: the model has the layers that it had, the very same objects."""
        if self._attached:
            self._backend.clear_cache()
            _remove(self._model, self._paths)
        self._attached = False

    @contextmanager
    def active(self, *names: str) -> Iterator[None]:
        """Let the forward passes of a block apply these sets and no other; the earlier choice is back at its end.

        Raises:
            ConfigError: if there is no such set.
            UserError: if they are detached, since the untouched model would answer in their place.
        """
        self._check_attached()
        before, self._active = self._active, tuple(dict.fromkeys(self._known(name) for name in names))
        self._apply()
        try:
            yield
        finally:
            self._active = before
            self._apply()

    @contextmanager
    def trainable(self, name: str) -> Iterator[None]:
        """Let gradients of a block reach this set and not the other; the backward pass belongs into the block.

        Raises:
            ConfigError: if there is no such set.
        """
        before, self._trained = self._trained, self._known(name)
        self._apply()
        try:
            yield
        finally:
            self._trained = before
            self._apply()

    def module(self, name: str) -> nn.Module:
        """Return a module that holds one set's matrices and nothing else: `<path of the layer>.A` and `.B`.

        Raises:
            ConfigError: if there is no such set.
        """
        return self._modules[self._known(name)]

    def state(self, name: str) -> dict[str, Tensor]:
        """Return a copy of one set, in float32 on the CPU.

        Raises:
            ConfigError: if there is no such set.
        """
        return {path: value.detach().to("cpu", copy=True) for path, value in self.module(name).state_dict().items()}

    @torch.no_grad()
    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Put the values of a state into one set.

        Raises:
            ConfigError: if there is no such set.
            ShapeMismatch: if the state has other names or shapes; nothing is changed then.
        """
        own = self.module(name).state_dict()
        spec = [path for path in own if path in state and state[path].shape == own[path].shape]
        if len(spec) < len(own) or len(state) > len(own):
            raise ShapeMismatch(
                f"The model takes {len(own)} matrices; of the {len(state)} given, {len(spec)} fit by name and "
                f"shape. They belong to another model, lora_rank or lora_targets: train them for this one."
            )
        for path, value in own.items():
            value.copy_(state[path])

    @torch.no_grad()
    def reset(self, name: str, *, seed: int) -> None:
        """Make one set fresh: A drawn by the seed alone, B zero, so that it changes nothing.

        A is uniform as in the LoRA authors' code (Kaiming, a = √5), whatever device it is on.

        Raises:
            ConfigError: if there is no such set.
        """
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in self.module(name).named_parameters():
            parameter.grad = None
            fresh = torch.zeros(parameter.shape)
            if path.endswith(".A"):
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            parameter.copy_(fresh)

    def count(self, name: str) -> int:
        """Numbers in one set."""
        return sum(parameter.numel() for parameter in self.module(name).parameters())

    def _apply(self) -> None:
        self._backend.clear_cache()  # what is kept of prompts is what other matrices made of them
        for layer in self._layers.values():
            layer.set_adapter(list(self._active), inference_mode=True)
        # On every leaf anew: PEFT ties gradients to what is active, and a backward pass may come after the block.
        for name in NAMES:
            self._modules[name].requires_grad_(name == self._trained)

    def _known(self, name: str) -> str:
        if name not in NAMES:
            raise ConfigError(f"There are no matrices called {name!r}; {nearest(name, NAMES)}")
        return name

    def _check_attached(self) -> None:
        if not self._attached:
            raise UserError("These matrices are detached from their model; attach new ones and load the state.")


def _peft() -> Any:
    if find_spec("peft") is None:
        raise MissingExtra("per-user fine-tuning", extra="lora")
    return import_module("peft")


def _model_of(llm: LanguageModel) -> nn.Module:
    model = getattr(llm, "model", None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"Fine-tuning needs a language model of transformers (personaplug.llm); this one is a "
            f"{type(llm).__name__}, which holds none."
        )
    if hasattr(model, "peft_config"):
        raise UserError("The model carries low-rank matrices already; detach those before attaching others.")
    return model


def _targets(model: nn.Module, wanted: str, *, peft: Any) -> dict[str, nn.Module]:
    """The layers that a setting names, by path.

    Raises:
        ConfigError: if a name fits none, or PEFT has no choice for the model.
    """
    layers = _linear_layers(model)
    if wanted.strip() == "auto":
        names = _choice_of_peft(model, layers, peft=peft)
    else:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
    patterns = {name: name if wanted.strip() == "auto" else rf"(.*\.)?{re.escape(name)}" for name in names}
    for name, pattern in patterns.items():
        if not any(re.fullmatch(pattern, path) for path in layers):
            raise ConfigError(f"lora_targets names {name!r}, which is no linear layer of this model; {_offer(layers)}")
    if not patterns:
        raise ConfigError(f"lora_targets names no layer; {_offer(layers)}")
    return {
        path: layer
        for path, layer in layers.items()
        if any(re.fullmatch(pattern, path) for pattern in patterns.values())
    }


def _choice_of_peft(model: nn.Module, layers: Mapping[str, nn.Module], *, peft: Any) -> list[str]:
    """PEFT's layers for the kind of model, as patterns of whole paths."""
    kind = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    choice = peft.LoraModel.target_module_mapping.get(kind)
    if choice is None:
        raise ConfigError(f"lora_targets=auto: PEFT has no choice for models of type {kind!r}; {_offer(layers)}")
    return [choice] if isinstance(choice, str) else [rf"(.*\.)?{re.escape(name)}" for name in choice]


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that take matrices, by path; the output head, often one with the embeddings, is none of them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path: layer
        for path, layer in model.named_modules()
        if layer is not head and (isinstance(layer, nn.Linear) or _is_conv1d(layer))
    }


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _offer(layers: Mapping[str, nn.Module]) -> str:
    names = sorted({path.rpartition(".")[2] for path in layers})
    return f"its linear layers are {', '.join(names)}. Name one or more of them."


def _holder(layers: Mapping[str, Any], name: str) -> nn.Module:
    """The matrices of one set, shared with the layers, under the paths that the layers have in the model."""
    root = nn.Module()
    for path, layer in layers.items():
        place = root
        for part in path.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter("A", layer.lora_A[name].float().weight)
        place.register_parameter("B", layer.lora_B[name].float().weight)
    return root


def _remove(model: nn.Module, paths: list[str]) -> None:
    """Put the model's own layers back in their places, where PEFT has replaced them."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        if hasattr(layer, "base_layer"):
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
