"""Token sampling, and generation by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig as TransformersConfig

from personaplug.errors import ConfigError, first_line
from personaplug.llm.base import Decoding, GenerationConfig, LanguageModel, PromptBatch


def sample_tokens(
    logits: Tensor, config: GenerationConfig, *, generator: torch.Generator, draws: Tensor | None = None
) -> Tensor:
    """Return the next token of each row, (R,) of (R, V) logits: the most likely one, or a sample.

    Args:
        generator: draws the samples of all rows.
        draws: (R,) numbers from 0 to 1 to use instead of the generator.
    """
    if not config.do_sample:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / config.temperature, dim=-1)
    if config.top_p == 1:
        return _sample(probs, generator=generator, draws=draws)
    probs, order = probs.sort(dim=-1, descending=True)
    # Keep a token if the more likely tokens cover less than top_p. Always keep the most likely token.
    is_dropped = probs.cumsum(dim=-1) - probs >= config.top_p
    is_dropped[..., 0] = False
    probs = probs.masked_fill(is_dropped, 0)
    return order.gather(-1, _sample(probs, generator=generator, draws=draws)[:, None])[:, 0]


def _sample(probs: Tensor, *, generator: torch.Generator, draws: Tensor | None) -> Tensor:
    """Return the index of a sample for each row, (R,) of (R, V) probabilities that need not sum to 1."""
    if draws is None:
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    sums = probs.double().cumsum(dim=-1)
    return (sums <= draws[:, None] * sums[:, -1:]).sum(dim=-1)


def _draws_of_rows(seeds: Sequence[int], config: GenerationConfig, *, device: torch.device) -> Tensor:
    """Return the draws of each step and row, (max_new_tokens, R); those of a row depend on its seed only."""
    rows = [
        torch.rand(config.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows, dim=1).to(device)


def decode_tokens(
    llm: LanguageModel, config: GenerationConfig, batch: PromptBatch, *, decoding: Decoding
) -> list[list[int]]:
    """Return the token ids of R responses; ended rows continue until all rows have ended."""
    first = decoding.first
    end = torch.tensor(llm.end_ids, device=first.device)
    generator = torch.Generator(first.device).manual_seed(config.seed)
    draws = None if batch.seeds is None else _draws_of_rows(batch.seeds, config, device=first.device)
    has_ended = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    logits, tokens = first, list[Tensor]()
    while True:
        step_draws = None if draws is None else draws[len(tokens)]
        tokens.append(sample_tokens(logits.float(), config, generator=generator, draws=step_draws))
        has_ended |= torch.isin(tokens[-1], end)
        if len(tokens) == config.max_new_tokens or bool(has_ended.all()):
            return torch.stack(tokens, dim=1).tolist()
        logits = decoding.step(tokens[-1])


def generate_with_transformers(
    llm: LanguageModel, config: GenerationConfig, batch: PromptBatch, **inputs: Any
) -> list[list[int]]:
    """Return the token ids that transformers generates from `inputs`. Torch's global random state stays unchanged.

    Transformers draws for all rows with one seed: the first of the batch's seeds, else the config's.
    """
    start = inputs.get("decoder_input_ids")  # transformers returns them before the response
    first = 0 if start is None else int(start.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch.seeds[0] if batch.seeds else config.seed)
        try:
            rows: list[list[int]] = llm.model.generate(
                **inputs, generation_config=_as_transformers(config, llm)
            ).tolist()
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(
                f"transformers cannot generate from embeddings with {llm.identity.name} and num_beams="
                f"{config.num_beams} ({first_line(error)}). Set num_beams=1."
            ) from error
    return [row[first:] for row in rows]


def _as_transformers(config: GenerationConfig, llm: LanguageModel) -> Any:
    # top_k=0 means no limit; None would mean transformers' default.
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
    config_class: Any = TransformersConfig  # untyped constructor
    return config_class(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=config.do_sample,
        eos_token_id=llm.end_ids,
        pad_token_id=llm.end_ids[0],
        **sampling,
    )
