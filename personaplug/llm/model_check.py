"""The check of a model when it is loaded: what this package computes must be what the model computes from token ids.

Families differ in how they treat padding, embeddings in place of ids, positions and caches. Short texts are run in each
way that a model offers, fastest first. The first way whose losses, label scores and generated tokens are those of single
rows of ids is used; a model without such a way is refused. Cached prompts are compared with one pass in the same manner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from personaplug.errors import UnsupportedModel
from personaplug.infra.gguf import first_line
from personaplug.llm.base import GenerationConfig, PromptBatch, Runner
from personaplug.llm.chunked_cross_entropy import token_loss
from personaplug.llm.prompt_cache import Layout
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt

if TYPE_CHECKING:
    from personaplug.llm.base import LanguageModel

logger = logging.getLogger(__name__)

_PROMPTS = [f"{'a prompt, ' * times}{times}" for times in (1, 2, 5)]
_TARGETS = ["ok no", "1", "2 4"]
_SPELLED = "ab"  # what soft tokens spell where the model can read the same as ids
_NEW_TOKENS = 3


class Mismatch(Exception):
    """Two ways to compute the same numbers differ; the message says which."""


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding explains, for one number format."""

    loss: float  # share of a loss
    logit: float  # between the largest logit and that of a generated token
    gradient: float  # least cosine similarity

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        # In bfloat16, gradients of 30 layers are off by 10 to 30 percent either way and losses by some hundredths. A
        # wrong computation is off by far more: its gradients are not similar at all.
        return cls(1e-4, 1e-3, 0.999) if dtype in (torch.float32, torch.float64) else cls(0.05, 0.5, 0.8)


@dataclass(frozen=True)
class ModelCheck:
    """What a check found. Reasons are sentences without the model's name."""

    way: str  # of `LanguageModel.ways`; empty = the model is refused
    why_not_faster: str = ""  # if it is not the first way; of a refused model, what is wrong
    layout: Layout | None = None  # of cached prompts
    why_no_prompt_cache: str = ""


def check_model(llm: LanguageModel) -> None:
    """Set a model's `whole` runner and `prompt_layout`, or raise UnsupportedModel if no way gives the right numbers."""
    result = llm.check = run_check(llm)
    name = llm.identity.name
    if not result.way:
        raise UnsupportedModel(name, result.why_not_faster)
    llm.whole, llm.prompt_layout = llm.ways[result.way], result.layout
    if result.why_not_faster:
        logger.warning("%s runs %s: %s", name, result.way, result.why_not_faster)
    if result.why_no_prompt_cache:
        message = "%s cannot reuse its prompts (%s): each pass reads them with gradients"
        logger.warning(message, name, result.why_no_prompt_cache)


@torch.no_grad()
def run_check(llm: LanguageModel) -> ModelCheck:
    """Find the fastest right way to run a model, and whether its prompts can be cached."""
    probe, reasons = Probe(llm), list[str]()
    for way, runner in llm.ways.items():
        reason = _reason(partial(probe.check_runner, runner))
        if not reason:
            layout, why_no_cache = probe.check_prompt_cache()
            return ModelCheck(way, "; ".join(dict.fromkeys(reasons)), layout, why_no_cache)
        reasons.append(reason)
    return ModelCheck("", reasons[-1])


class Probe:
    """Runs the texts of the check through one model."""

    def __init__(self, llm: LanguageModel) -> None:
        self.llm, self.tolerance = llm, Tolerance.of(llm.model.dtype)
        self.prompt_ids = [row.ids for row in llm.prompt_tokenizer.encode_prompts(_PROMPTS)]
        self.target_ids = llm.prompt_tokenizer.encode_targets(_TARGETS)
        self.spelled: Ids = llm.prompt_tokenizer.encode_target(_SPELLED, end=False)
        self._model_losses: dict[Ids, Tensor] = {}

    def check_runner(self, runner: Runner) -> None:
        """Raise an error if a runner's numbers are not the model's own."""
        self._check_batch(runner, PromptBatch(_PROMPTS), before=())
        if self.llm.is_encoder_decoder:
            self._check_batch(runner, self._spelled_batch(), before=self.spelled)

    def _check_batch(self, runner: Runner, batch: PromptBatch, *, before: Ids) -> None:
        losses, _ = token_loss(*runner.target_logits(batch, self.target_ids))
        self._compare(losses, self.model_losses(before), "its losses of embedded rows are not those of token ids")
        scores = runner.label_scores(batch, self.target_ids).diagonal()
        self._compare(-scores, losses, "its scores of labels are not their losses")
        config = GenerationConfig(max_new_tokens=_NEW_TOKENS)
        self._check_generated(runner, batch, runner.generate_ids(batch, config))

    def model_losses(self, before: Ids) -> Tensor:
        """Return the losses of the targets that the model gives for single rows of ids, (B,)."""
        if before not in self._model_losses:
            rows = zip(self.prompt_ids, self.target_ids, strict=True)
            logits = [self.llm.model_logits(prompt, target, before=before) for prompt, target in rows]
            alone = self.llm.model_logits(self.prompt_ids[0], self.target_ids[0][:1], before=before)
            if float((alone[0] - logits[0][0]).abs().max()) > self.tolerance.logit:
                raise Mismatch("a token's probability depends on the tokens behind it")
            targets = [torch.tensor([ids], device=self.llm.device) for ids in self.target_ids]
            losses = [token_loss(row[None], ids)[0] for row, ids in zip(logits, targets, strict=True)]
            self._model_losses[before] = torch.cat(losses)
        return self._model_losses[before]

    def _check_generated(self, runner: Runner, batch: PromptBatch, generated: Sequence[Sequence[int]]) -> None:
        """Raise Mismatch if a generated token is not the likeliest behind its prompt and the tokens before it."""
        end_ids = self.llm.end_ids
        ends = [next((index + 1 for index, token in enumerate(ids) if token in end_ids), len(ids)) for ids in generated]
        rows = [tuple(ids[:end]) for ids, end in zip(generated, ends, strict=True)]
        logits, targets = runner.target_logits(batch, rows)
        is_token = targets != IGNORED
        chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        if float((logits.amax(dim=-1) - chosen)[is_token].max()) > self.tolerance.logit:
            raise Mismatch("the tokens that it generates are not the likeliest ones")

    def check_prompt_cache(self) -> tuple[Layout | None, str]:
        """Return the shape of cached prompt states, or None and what speaks against a cache."""
        reason = _reason(self._check_cached_prefix) if self.llm.cached_prefix is not None else ""
        if reason:
            return None, reason
        states = self.llm.compute_prompt_states(self.prompt_ids[:1])[0]
        parts, heads, _, width = states.shape
        return Layout(parts, heads, width, states.dtype), ""

    @torch.enable_grad()
    def _check_cached_prefix(self) -> None:
        runner = self.llm.cached_prefix
        assert runner is not None
        batch = self._spelled_batch()
        with torch.no_grad():
            self._check_batch(runner, batch, before=self.spelled)
        gradients = [self._gradient(runner, batch), self._gradient(self.llm.ways["batched"], batch)]
        similarity = float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
        if not similarity > self.tolerance.gradient:
            raise Mismatch(f"gradients agree by {similarity:.3f}")

    def _gradient(self, runner: Runner, batch: PromptBatch) -> Tensor:
        assert batch.soft is not None
        soft = SoftPrompt(batch.soft.vectors.clone().requires_grad_(), placement="suffix")
        losses, _ = token_loss(*runner.target_logits(PromptBatch(batch.prompts, soft), self.target_ids))
        return torch.autograd.grad(losses.sum(), soft.vectors)[0].float().flatten()

    def _spelled_batch(self) -> PromptBatch:
        """Return the prompts with soft tokens that the model can be given as ids too."""
        vectors = self.llm.spell(self.spelled).expand(len(_PROMPTS), -1, -1)
        return PromptBatch(_PROMPTS, SoftPrompt(vectors, placement="suffix"))

    def _compare(self, found: Tensor, expected: Tensor, what: str) -> None:
        off = (found.float() - expected.float()).abs()
        if not bool((off <= self.tolerance.loss * (1 + expected.float().abs())).all()):  # NaN is a mismatch
            raise Mismatch(f"{what} (off by {float(off.max()):.2g} nats)")


def _reason(probe: Callable[[], None]) -> str:
    """Run a probe and return why it failed, or an empty text."""
    try:
        probe()
    except torch.OutOfMemoryError:
        raise  # says nothing about the family
    except Mismatch as mismatch:
        return str(mismatch)
    except Exception as error:  # unsupported families raise anything: Runtime-, Type-, Value-, Index-, KeyError, …
        return first_line(error)
    return ""
