"""LoRA adapters in a frozen language model: one for the task and one for a user, which add up.

LoRA (arXiv 2106.09685) adds scale · B·A to a layer's frozen matrix; OPPU (arXiv 2402.04401) adds a user's adapter to
the task's. PEFT does the arithmetic. `active` selects the adapters of a forward pass; elsewhere no adapter applies.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from personaplug.config import AdapterConfig
from personaplug.errors import ConfigError, MissingExtra, ShapeMismatch, UserError, nearest
from personaplug.llm.base import LanguageModel

TASK, USER = "task", "user"
NAMES = (TASK, USER)


class LoraAdapters:
    """The task's and the user's adapter in one model; `attach` adds them, `detach` removes them.

    Their weights are float32 for any dtype of the model, because steps with a small learning rate vanish in bfloat16.
    Gradients reach one adapter, by default the task's, and never the model's own weights.
    """

    def __init__(self, llm: LanguageModel, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Wrap a model that has both adapters around its own layers (by path); use `attach`."""
        self._llm, self._model, self._layers = llm, model, layers
        self._adapted: list[Any] = [model.get_submodule(path) for path in layers]
        self._parameters = {name: _parameters(model, name) for name in NAMES}
        self._attached = True
        for name in NAMES:
            self.reset(name, seed=0)
        self._apply((), TASK)

    @classmethod
    def attach(cls, llm: LanguageModel, *, config: AdapterConfig) -> LoraAdapters:
        """Add fresh, inactive adapters to a transformers model; torch's global generator does not advance."""
        peft = _import_peft()
        model = _transformers_model(llm)
        layers = _target_layers(model, config.lora_targets, peft=peft)
        lora_config = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=list(layers),
            fan_in_fan_out=not all(isinstance(layer, nn.Linear) for layer in layers.values()),  # Conv1D of GPT-2
        )
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are intended
                for name in NAMES:
                    peft.functional.inject_adapter_in_model(lora_config, model, adapter_name=name)
                    peft.functional.cast_adapter_dtype(model, adapter_name=name)
            return cls(llm, model, layers)
        except BaseException:
            _restore(model, layers)
            raise

    def __enter__(self) -> LoraAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Put the model's own layers back."""
        if self._attached:
            self._llm.clear_cache()
            _restore(self._model, self._layers)
        self._attached = False

    def active(self, *names: str) -> AbstractContextManager[None]:
        """Apply exactly these adapters in the forward passes of a block."""
        if not self._attached:
            raise UserError("These adapters are detached from their model. Attach new ones and load the state.")
        return self._switched(tuple(dict.fromkeys(map(_checked_name, names))), self._trainable)

    def trainable(self, name: str) -> AbstractContextManager[None]:
        """Send gradients to this adapter only; call `backward` inside the block."""
        return self._switched(self._active, _checked_name(name))

    @contextmanager
    def _switched(self, active: tuple[str, ...], trainable: str) -> Iterator[None]:
        previous = self._active, self._trainable
        self._apply(active, trainable)
        try:
            yield
        finally:
            self._apply(*previous)

    def _apply(self, active: tuple[str, ...], trainable: str) -> None:
        self._active, self._trainable = active, trainable
        self._llm.clear_cache()  # cached prompt states depend on the active adapters
        for layer in self._adapted:
            layer.set_adapter(list(active), inference_mode=True)
            # Gradients do not depend on the active adapters, because a backward pass may come after an `active` block.
            layer.set_requires_grad(trainable)

    def module(self, name: str) -> nn.Module:
        """Return a module that holds the parameters of one adapter, A before B for each layer."""
        return nn.ParameterList(self._parameters[_checked_name(name)].values())

    def state(self, name: str) -> dict[str, Tensor]:
        """Return a copy of one adapter on the CPU: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, float32."""
        return {
            path: value.detach().to("cpu", copy=True) for path, value in self._parameters[_checked_name(name)].items()
        }

    @torch.no_grad()
    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load a state into one adapter, or raise `ShapeMismatch` and leave it as it is."""
        parameters = self._parameters[_checked_name(name)]
        fitting = [path for path, value in parameters.items() if path in state and state[path].shape == value.shape]
        if len(fitting) < len(parameters) or len(state) > len(parameters):
            raise ShapeMismatch(
                f"The adapter needs {len(parameters)} matrices; {len(fitting)} of the {len(state)} in the state fit "
                f"by name and shape. They belong to another model, lora_rank or lora_targets. Train the adapter for "
                f"this model."
            )
        for path, value in parameters.items():
            value.copy_(state[path])

    @torch.no_grad()
    def reset(self, name: str, *, seed: int) -> None:
        """Draw A from the seed alone, as in the LoRA authors' code (Kaiming, a = √5), and set B to zero."""
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in self._parameters[_checked_name(name)].items():
            parameter.grad = None
            parameter.zero_()
            if path.endswith(".lora_A.weight"):  # drawn on the CPU, so that all devices get the same values
                drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)


def _import_peft() -> Any:
    if find_spec("peft") is None:
        raise MissingExtra("per-user fine-tuning", extra="lora")
    import_module("peft.functional")
    return import_module("peft")


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter under their names in PEFT's checkpoints."""
    get_state: Callable[..., dict[str, nn.Parameter]] = _import_peft().functional.get_peft_model_state_dict
    return get_state(model, state_dict=dict(model.named_parameters()), adapter_name=name, save_embedding_layers=False)


def _checked_name(name: str) -> str:
    if name not in NAMES:
        raise ConfigError(f"There is no adapter {name!r}; {nearest(name, NAMES)}")
    return name


def _transformers_model(llm: LanguageModel) -> nn.Module:
    model = getattr(llm, "model", None)
    if not isinstance(model, nn.Module):
        raise UserError(f"LoRA needs a transformers language model; found {type(llm).__name__}.")
    if hasattr(model, "peft_config"):
        raise UserError("The model already has LoRA adapters. Detach them before you attach others.")
    return model


def _restore(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _target_layers(model: nn.Module, targets: str, *, peft: Any) -> dict[str, nn.Module]:
    layers = _linear_layers(model)
    layer_names = sorted({path.rpartition(".")[2] for path in layers})
    hint = f"the model's linear layers are {', '.join(layer_names)}. Name one or more of them."
    names: str | list[str] | None = [name.strip() for name in targets.split(",") if name.strip()]
    if names == ["auto"]:
        kind = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
        names = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if names is None:
            raise ConfigError(f"lora_targets=auto: PEFT has no default layers for models of type {kind!r}; {hint}")
    if not names:
        raise ConfigError(f"lora_targets names no layer; {hint}")
    # PEFT's choice is a list of names, or one pattern of whole paths.
    patterns = {names: names} if isinstance(names, str) else {name: rf"(.*\.)?{re.escape(name)}" for name in names}
    for name, pattern in patterns.items():
        if not any(re.fullmatch(pattern, path) for path in layers):
            raise ConfigError(f"lora_targets names {name!r}, which is not a linear layer of the model; {hint}")
    return {path: layer for path, layer in layers.items() if any(re.fullmatch(p, path) for p in patterns.values())}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers by path, without the output head, which often shares the embeddings' weights."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    return {path: layer for path, layer in layers.items() if layer is not head}
