"""Tiny seeded byte-level models of several families, for the equivalence tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.seq2seq_lm import Seq2SeqLM
from personaplug.llm.tiny import tiny_tokenizer

_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}


def _ends(tokenizer: Any) -> dict[str, Any]:
    end = tokenizer.eos_token_id
    return {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end, "bos_token_id": end}


def _llama(ends: dict[str, Any]) -> Any:
    return LlamaForCausalLM(LlamaConfig(**ends, **_GROUPED, initializer_range=0.2))


def _qwen(ends: dict[str, Any]) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**ends, **_GROUPED, initializer_range=0.2))


def _gemma(ends: dict[str, Any]) -> Any:
    """Scaled embeddings, capped logits, a sliding window shorter than the prompts."""
    return Gemma2ForCausalLM(Gemma2Config(**ends, **_GROUPED, initializer_range=0.2, sliding_window=8))


def _neox(ends: dict[str, Any]) -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**ends, **_SMALL, initializer_range=0.2))


def _gpt2(ends: dict[str, Any]) -> Any:
    """Absolute positions."""
    return GPT2LMHeadModel(GPT2Config(**ends, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))


def _t5(ends: dict[str, Any]) -> Any:
    shape = {**ends, "decoder_start_token_id": ends["pad_token_id"]}
    return T5ForConditionalGeneration(T5Config(**shape, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": _llama,
    "qwen": _qwen,
    "gemma": _gemma,
    "neox": _neox,
    "gpt2": _gpt2,
}
FAMILIES = {**DECODERS, "t5": _t5}


def small_llm(family: str, *, chat: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of the family with weights drawn by seed 0."""
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>"
    torch.manual_seed(0)
    model = FAMILIES[family](_ends(tokenizer)).to(dtype)
    llm_class = Seq2SeqLM if family == "t5" else CausalLM
    return llm_class(model, tokenizer, name=f"small-{family}")


def small_mamba() -> CausalLM:
    """Return a state-space model, which has no keys and values to cache."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    return CausalLM(MambaForCausalLM(config), tokenizer, name="mamba")


def tiny_llama(tokenizer: Any, **settings: Any) -> Any:
    """Return a Llama of one layer for a tokenizer of any size, with weights drawn by seed 0."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **settings))
