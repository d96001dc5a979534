"""Check whether a model family can run prompts separately from the soft tokens and answers behind them.

Families without keys and values per token in every layer, or whose attention cannot be replaced (state-space layers,
ALiBi biases, attention sinks), fail in their own code or compute something else. A small batch shows both.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from personaplug.llm.base import PromptBatch
from personaplug.llm.chunked_cross_entropy import token_loss
from personaplug.llm.padding import pad
from personaplug.llm.prompt_cache import Layout
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt

if TYPE_CHECKING:
    from personaplug.llm.causal_lm import CausalLM

logger = logging.getLogger(__name__)

_TEXT = "a probe of what this model makes of a prompt that is read by itself, "
_PROMPTS = [f"{_TEXT * times} {times}" for times in (1, 2, 4, 8)]
_TARGETS = ["one two", "1", "three", "2 4 8"]


class RunnerMismatch(Exception):
    """Losses or gradients of the two ways differ."""


def check_prefix_cache(llm: CausalLM) -> Layout | None:
    """Return the shape of cached states, or warn and return None if they change loss or gradient."""
    try:
        return _compare_runners(llm)
    except torch.OutOfMemoryError:
        raise  # says nothing about the family
    except Exception as error:  # unsupported families raise anything: Runtime-, Type-, Value-, Index-, KeyError, …
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        message = "%s cannot reuse its prompts (%s): each pass reads them with gradients"
        logger.warning(message, llm.identity.name, reason)
        return None


@torch.enable_grad()
def _compare_runners(llm: CausalLM) -> Layout:
    target_ids = llm.prompt_tokenizer.encode_targets(_TARGETS)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(_PROMPTS), 2, llm.identity.width, generator=generator) * llm.embedding_scale
    soft = SoftPrompt(vectors.to(llm.device).requires_grad_(), placement="suffix")
    prefix = llm.cached_prefix.load_prefix(_PROMPTS)
    cached_logits = llm.cached_prefix.answer_logits(prefix, soft, target_ids)
    targets = pad(target_ids, fill=IGNORED, side="right").to(llm.device)
    losses = [
        token_loss(cached_logits, targets)[0].sum(),
        token_loss(*llm.spliced.target_logits(PromptBatch(_PROMPTS, soft), target_ids))[0].sum(),
    ]
    gradients = [torch.autograd.grad(loss, soft.vectors)[0].float().flatten() for loss in losses]
    similarity = float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
    error = abs(1 - float(losses[0].detach() / losses[1].detach()))
    # In bfloat16, gradients of 30 layers are off by 10 to 30 percent either way and losses by some hundredths. With
    # attention to anything else they are not similar at all.
    is_exact = llm.model.dtype == torch.float32
    if not (similarity > (0.999 if is_exact else 0.8) and error < (1e-3 if is_exact else 0.05)):
        raise RunnerMismatch(f"gradients agree by {similarity:.3f}, losses differ by {error:.1%}")
    parts, _, heads, _, width = prefix.states.shape
    return Layout(parts, heads, width, prefix.states.dtype)
