"""The frozen language models that a plug can serve. `open_llm` finds the one that a config names."""

from __future__ import annotations

import logging
from typing import Any

import torch

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, MissingModel
from personaplug.infra.model_hub import find_model, revision_of
from personaplug.infra.progress import quiet_unless_terminal
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.seq2seq_lm import Seq2SeqLM
from personaplug.llm.tiny import load_tiny_llm


def open_llm(config: ModelConfig) -> CausalLM | Seq2SeqLM:
    """Load the frozen language model of a config.

    Raises:
        MissingModel: if it is found nowhere.
        ConfigError: if the device does not exist here.
    """
    settings = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "prompt_cache": config.prompt_cache,
        "keep_bytes": int(config.prompt_cache_gigabytes * 1e9),
    }
    if config.llm == "toy" or config.llm.startswith("toy:"):
        seed = config.llm.partition(":")[2] or "0"
        if not seed.isdecimal():
            raise ConfigError(f"The toy model is written toy or toy:SEED with a whole number; found {config.llm!r}.")
        return load_tiny_llm(seed=int(seed), **settings)
    return load_hf(config.llm, dtype=config.dtype, device=choose_device(config.device), **settings)


def choose_device(name: str) -> str:
    """Resolve `auto` to the fastest device that is here.

    Raises:
        ConfigError: if the device asked for is unknown or absent.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"model.device must be a device of this machine, such as cpu; found {name!r}.") from None
    return name


logger = logging.getLogger(__name__)


def load_hf(name: str, *, dtype: str = "auto", device: str = "cpu", **settings: Any) -> CausalLM | Seq2SeqLM:
    """Load a frozen language model from a hub name or a local folder.

    Args:
        name: see `personaplug.infra.model_hub.find_model` for the places that are looked at.
        dtype: auto, float32, bfloat16 or float16; see `choose_dtype`.
        device: a torch device.
        settings: of `HFLanguageModel`: max_prompt_tokens, prompt_cache, keep_bytes.
    Raises:
        MissingModel: if it is found nowhere, or what is found is no language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    folder = find_model(name)
    chosen, why = choose_dtype(dtype, device=device)
    logger.info("language model %s in %s (%s)", name, str(chosen).removeprefix("torch."), why)
    try:
        two_halves = bool(AutoConfig.from_pretrained(folder).is_encoder_decoder)
        family: Any = AutoModelForSeq2SeqLM if two_halves else AutoModelForCausalLM
        with quiet_unless_terminal():
            model = family.from_pretrained(folder, dtype=chosen, **_attention(chosen, device=device)).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MissingModel(name, tried=[f"{folder}, where transformers says: {str(error).splitlines()[0]}"]) from error
    kind = Seq2SeqLM if two_halves else CausalLM
    return kind(model, tokenizer, name=name, revision=revision_of(name, folder), **settings)


def choose_dtype(name: str, *, device: str) -> tuple[torch.dtype, str]:
    """The number format, and why; `auto` asks the hardware."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.startswith("cuda"):
        supported = torch.cuda.is_bf16_supported()
    else:
        supported = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return (torch.bfloat16, "the hardware multiplies in it") if supported else (torch.float32, "no fast bfloat16 here")


def _attention(dtype: torch.dtype, *, device: str) -> dict[str, str]:
    # torch's fused attention in bfloat16 on a CPU has a slow backward pass; the plain one takes two thirds of the time.
    return {"attn_implementation": "eager"} if device == "cpu" and dtype == torch.bfloat16 else {}
