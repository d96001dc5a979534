"""Load the frozen language model that a config names."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, MissingModel, PersonaPlugError, UnsupportedModel, first_line
from personaplug.infra.model_hub import find_model, revision_of
from personaplug.infra.progress import quiet_unless_terminal
from personaplug.llm.base import LanguageModel
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.seq2seq_lm import Seq2SeqLM
from personaplug.llm.text_tokenizer import load_tokenizer
from personaplug.llm.tiny import load_tiny_llm

logger = logging.getLogger(__name__)


def open_llm(config: ModelConfig) -> LanguageModel:
    """Load the language model of a config, or raise MissingModel; `toy` and `toy:SEED` name a tiny random model."""
    settings = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "chat_date": None if config.chat_date == "auto" else config.chat_date,
        "prompt_cache": config.prompt_cache,
        "prompt_cache_bytes": int(config.prompt_cache_gigabytes * 1e9),
    }
    kind, _, seed = config.llm.partition(":")
    if kind != "toy":
        return load_hf(config.llm, dtype=config.dtype, device=choose_device(config.device), **settings)
    if not re.fullmatch("[0-9]{1,18}", seed or "0"):
        raise ConfigError(f"The toy model's name must be toy or toy:SEED, SEED a whole number; found {config.llm!r}.")
    return load_tiny_llm(seed=int(seed or "0"), **settings)


def choose_device(name: str) -> str:
    """Resolve `auto` to the fastest available device; raise ConfigError for an unknown or absent one."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"model.device must be a device of this machine, for example cpu; found {name!r}.") from None
    return name


def load_hf(name: str, *, dtype: str = "auto", device: str = "cpu", **settings: Any) -> LanguageModel:
    """Load a frozen language model by a name that `find_model` knows; `settings` go to `LanguageModel`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = find_model(name)
    tokenizer = load_tokenizer(folder, name=name)
    torch_dtype, reason = choose_dtype(dtype, device=device)
    logger.info("language model %s in %s (%s)", name, str(torch_dtype).removeprefix("torch."), reason)
    try:
        is_encoder_decoder = bool(AutoConfig.from_pretrained(folder).is_encoder_decoder)
        auto_class: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        # On a CPU in bfloat16, the backward pass of eager attention takes two thirds of the time of fused attention.
        options = {"attn_implementation": "eager"} if (device, torch_dtype) == ("cpu", torch.bfloat16) else {}
        with quiet_unless_terminal():
            model = auto_class.from_pretrained(folder, dtype=torch_dtype, **options).to(device)
    except (OSError, ValueError) as error:
        raise MissingModel(name, tried=[f"{folder} (error of transformers: {first_line(error)})"]) from error
    return wrap_model(model, tokenizer, name=name, revision=revision_of(name, folder), **settings)


def wrap_model(model: Any, tokenizer: Any, *, name: str, **settings: Any) -> LanguageModel:
    """Check a transformers model and return it as a frozen language model, or raise UnsupportedModel."""
    llm_class = Seq2SeqLM if model.config.is_encoder_decoder else CausalLM
    try:
        return llm_class(model, tokenizer, name=name, **settings)
    except (PersonaPlugError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # an unsupported family may raise any error
        raise UnsupportedModel(name, f"its family lacks a required feature ({first_line(error)})") from error


def choose_dtype(name: str, *, device: str) -> tuple[torch.dtype, str]:
    """Return the dtype and the reason for it; `auto` uses bfloat16 if the hardware has bfloat16 arithmetic."""
    if name != "auto":
        return getattr(torch, name), "as configured"
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    if on_gpu or (device == "cpu" and torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16, "fast on this hardware"
    return torch.float32, "no fast bfloat16 here"
