"""A tiny random language model, `llm=toy`. It needs no download and uses the same code path as real models."""

from __future__ import annotations

from typing import Any

import torch

from personaplug.llm.causal_lm import CausalLM

_END = "<|end|>"


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer with one token per byte and an end-of-text token. Decoding restores any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([_END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer_class: Any = PreTrainedTokenizerFast  # untyped constructor
    return tokenizer_class(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def load_tiny_llm(*, seed: int = 0, **settings: Any) -> CausalLM:
    """Return a float32 Llama of two layers and width 32 with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,  # large enough that answers depend on the prompt
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return CausalLM(model, tokenizer, name=f"toy:{seed}", **settings)
