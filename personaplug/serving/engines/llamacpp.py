"""llama.cpp in this process as engine: a GGUF file, to which soft tokens are given as embeddings."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from typing import Self

from personaplug.config import ModelConfig
from personaplug.infra.model_hub import find_gguf, find_tokenizer
from personaplug.llm.loading import choose_dtype
from personaplug.llm.prompt_tokenizer import PromptTokenizer
from personaplug.llm.text_tokenizer import load_tokenizer
from personaplug.plug.model import PersonaPlug
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.base import Engine, LoadPlug
from personaplug.serving.engines.batching import BatchingEngine
from personaplug.serving.engines.llamacpp_batch import SCORING_SEQUENCES, LlamaBatch
from personaplug.serving.engines.llamacpp_checks import GGUFChecks
from personaplug.serving.engines.llamacpp_model import LlamaModel

logger = logging.getLogger(__name__)

_TOKENS_PER_ROW = 1024  # cached tokens for each of the `max_rows` rows, which may share them unequally
_MIN_TOKENS = 8192  # cached tokens in any case
_RESERVE = 1024  # cached tokens of labels while they are scored


class LlamaCppEngine(BatchingEngine):
    """A GGUF model in this process.

    Args:
        scale: factor from the plug's soft tokens to the file's embeddings.
        max_tokens: maximum tokens of all concurrent requests together.
    """

    def __init__(
        self,
        model: LlamaModel,
        prompt_tokenizer: PromptTokenizer,
        *,
        scale: float,
        name: str,
        max_tokens: int,
        max_rows: int = 16,
        max_new_tokens: int = 512,
    ) -> None:
        self.model = model
        end_ids = list(dict.fromkeys([prompt_tokenizer.end_id, *model.end_ids]))
        super().__init__(
            partial(LlamaBatch, model, end_ids=end_ids, scale=scale, rows=max_rows),
            prompt_tokenizer,
            name=name,
            logits=model.vocabulary,
            end_ids=end_ids,
            max_tokens=min(model.trained_tokens, max_tokens),
            max_new_tokens=max_new_tokens,
            max_rows=max_rows,
            max_held=max_tokens,
        )

    @classmethod
    def open(cls, model: ModelConfig, config: ServingConfig, load_plug: LoadPlug) -> tuple[Engine, PersonaPlug]:
        """Open the engine and check the file; see `EngineOpener`."""
        plug, path = load_plug(None), find_gguf(config.gguf)
        max_tokens = max(_MIN_TOKENS, config.max_rows * _TOKENS_PER_ROW)
        llama = LlamaModel(path, cells=max_tokens + _RESERVE, sequences=config.max_rows + SCORING_SEQUENCES)
        with ExitStack() as after_failure:
            after_failure.callback(llama.close)
            engine = cls._of_model(llama, model, config=config, plug=plug, max_tokens=max_tokens)
            dtype, _ = choose_dtype(model.dtype, device="cpu")
            plug = plug.compute_items_in(str(dtype).removeprefix("torch."))
            after_failure.pop_all()
        return engine, plug

    @classmethod
    def _of_model(
        cls, llama: LlamaModel, model: ModelConfig, *, config: ServingConfig, plug: PersonaPlug, max_tokens: int
    ) -> Self:
        """Check a loaded file and build the engine."""
        folder = find_tokenizer(model.llm)
        tokenizer = PromptTokenizer(
            load_tokenizer(folder, name=model.llm),
            max_tokens=max_tokens,
            is_encoder_decoder=False,
            end_id=next(iter(llama.end_ids), None),
            chat_date=plug.spec.llm.chat_date,
        )
        scale = GGUFChecks(llama, tokenizer, spec=plug.spec, folder=folder).run()
        if llama.is_quantized:
            logger.warning(
                "%s has %s weights, and the plug was trained with %s, so answers may differ slightly; "
                "benchmarks/engines.py measures how much",
                llama.path.name,
                llama.storage,
                plug.spec.llm.name,
            )
        return cls(
            llama,
            tokenizer,
            scale=scale,
            name=config.model or llama.path.stem,
            max_tokens=max_tokens,
            max_rows=config.max_rows,
            max_new_tokens=config.max_new_tokens,
        )

    async def close(self) -> None:
        await super().close()
        self.model.close()
