"""The frozen language models that a plug can serve. `open_backend` finds the one that a config names."""

from __future__ import annotations

import torch

from personaplug.backends.decoder_only import DecoderOnlyBackend
from personaplug.backends.encoder_decoder import EncoderDecoderBackend
from personaplug.backends.loading import load_hf
from personaplug.backends.toy import load_toy
from personaplug.config import ModelConfig
from personaplug.errors import BadConfig


def open_backend(config: ModelConfig) -> DecoderOnlyBackend | EncoderDecoderBackend:
    """Load the frozen language model of a config.

    Raises:
        MissingModel: if it is found nowhere.
        BadConfig: if the device does not exist here.
    """
    settings = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "keep_prompts": config.keep_prompts,
        "keep_bytes": int(config.keep_gigabytes * 1e9),
    }
    if config.llm == "toy" or config.llm.startswith("toy:"):
        seed = config.llm.partition(":")[2] or "0"
        if not seed.isdecimal():
            raise BadConfig(f"The toy model is written toy or toy:SEED with a whole number; found {config.llm!r}.")
        return load_toy(seed=int(seed), **settings)
    return load_hf(config.llm, dtype=config.dtype, device=choose_device(config.device), **settings)


def choose_device(name: str) -> str:
    """Resolve `auto` to the fastest device that is here.

    Raises:
        BadConfig: if the device asked for is unknown or absent.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise BadConfig(f"model.device must be a device of this machine, such as cpu; found {name!r}.") from None
    return name
