"""Check of a model at load: this package must compute the same numbers as the model computes from token ids.

Families differ in how they treat padding, embeddings in place of ids, positions and caches. The check runs short texts
through each runner of a model, fastest first. It chooses the first runner whose losses, label scores and generated
tokens equal those of single rows of ids. If no runner passes, the model is refused. Cached prompts are compared with
one pass in the same way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from personaplug.errors import UnsupportedModel, first_line
from personaplug.llm.base import Decoding, GenerationConfig, PromptBatch, Runner
from personaplug.llm.check_results import ModelCheck, find_result, keep_result, result_key
from personaplug.llm.chunked_cross_entropy import token_loss
from personaplug.llm.prompt_state import Layout
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt

if TYPE_CHECKING:
    from personaplug.llm.base import LanguageModel

logger = logging.getLogger(__name__)

_PROMPTS = [f"{'a prompt, ' * times}{times}" for times in (1, 4)]
_TARGETS = ["ok no", "1 2"]
_SPELLED = "ab"  # text whose embeddings are the soft tokens that the model can also read as ids
_NEW_TOKENS = 3


class Mismatch(Exception):
    """Two computations of the same numbers differ; the message says how."""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding explains, for one dtype."""

    loss: float  # relative to the loss
    logit: float  # in standard deviations of all logits
    gradient: float  # smallest cosine similarity

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        # In bfloat16, rounding changes the gradients of 30 layers by 10 to 30 percent, and losses by a few hundredths.
        # A wrong computation gives unrelated gradients.
        return cls(3e-5, 1e-3, 0.999) if dtype in (torch.float32, torch.float64) else cls(0.05, 0.2, 0.8)


def check_model(llm: LanguageModel) -> None:
    """Choose a model's runners by its check, or raise UnsupportedModel if no runner passes the check."""
    result, name = _find_or_run(llm), llm.identity.name
    if not result.way:
        raise UnsupportedModel(name, result.why_not_faster)
    llm.apply_check(result)
    if result.why_not_faster:
        logger.warning("%s runs %s: %s", name, result.way, result.why_not_faster)
    if result.why_no_prompt_cache:
        message = "%s cannot cache prompts (%s): each pass recomputes them with gradients"
        logger.warning(message, name, result.why_no_prompt_cache)


def _find_or_run(llm: LanguageModel) -> ModelCheck:
    tokenizer = llm.prompt_tokenizer
    # Hash lengths instead of ids, because a chat template may print today's date.
    lengths = [len(row.ids) for row in tokenizer.encode_prompts(_PROMPTS)]
    key = result_key(llm, [lengths, tokenizer.encode_targets(_TARGETS)])
    result, started = find_result(key), time.monotonic()
    if result is None:
        result = run_check(llm)
        if result.way:  # a refusal may have a temporary cause
            keep_result(key, result, seconds=time.monotonic() - started)
    return result


@torch.no_grad()
def run_check(llm: LanguageModel) -> ModelCheck:
    """Find the fastest correct runner of a model, and whether its prompts can be cached."""
    probe, reasons = Probe(llm), list[str]()
    for way, runner in llm.ways.items():
        reason = _reason(partial(probe.check_runner, runner))
        if not reason:
            return probe.check_prompt_cache(runner, ModelCheck(way, "; ".join(dict.fromkeys(reasons))))
        reasons.append(reason)
    return ModelCheck("", reasons[-1])


class Probe:
    """Runs the texts of the check through one model."""

    def __init__(self, llm: LanguageModel) -> None:
        self.llm, self.tolerance = llm, Tolerance.of(llm.model.dtype)
        self.prompt_ids = [row.ids for row in llm.prompt_tokenizer.encode_prompts(_PROMPTS)]
        self.target_ids = llm.prompt_tokenizer.encode_targets(_TARGETS)
        self.spelled: Ids = llm.prompt_tokenizer.encode_target(_SPELLED, end=False)
        self.slowest = list(llm.ways.values())[-1]
        self._logits: dict[Ids, list[Tensor]] = {}

    def check_runner(self, runner: Runner) -> None:
        """Raise an error if a runner's numbers differ from the model's."""
        is_row_by_row = runner is self.slowest
        problem = (
            "inputs_embeds and input_ids give different results"
            if is_row_by_row
            else "rows in a batch differ from single rows"
        )
        self._check_batch(runner, PromptBatch(_PROMPTS), before=(), problem=problem)
        self._check_soft_tokens(runner, "suffix")
        if self.llm.is_encoder_decoder:
            self._check_batch(runner, self._spelled_batch(), before=self.spelled, problem=problem)
            self._check_soft_tokens(runner, "prefix")

    def _check_soft_tokens(self, runner: Runner, placement: str) -> None:
        """Raise Mismatch if random soft tokens get no gradient, or give other losses in a batch than alone."""
        batch = PromptBatch(_PROMPTS, self._random_soft(placement))
        losses, _ = token_loss(*runner.target_logits(batch, self.target_ids))
        alone, _ = token_loss(*self.slowest.target_logits(batch, self.target_ids))
        self._compare(losses, alone, "rows with soft tokens in a batch differ from single rows")
        gradient = self._gradient(runner, batch)
        if not bool(torch.isfinite(gradient).all()) or bool((gradient == 0).all(dim=-1).any()):
            raise Mismatch("gradients do not reach soft tokens")

    def _random_soft(self, placement: str) -> SoftPrompt:
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(len(_PROMPTS), 2, self.llm.identity.width, generator=generator)
        return SoftPrompt((vectors * self.llm.embedding_scale).to(self.llm.device), placement)

    def _check_batch(self, runner: Runner, batch: PromptBatch, *, before: Ids, problem: str) -> None:
        losses, _ = token_loss(*runner.target_logits(batch, self.target_ids))
        self._compare(losses, self.model_losses(before), problem)
        scores = runner.label_scores(batch, self.target_ids).diagonal()
        self._compare(-scores, losses, "label scores differ from the labels' losses")
        if (decoding := runner.start_decoding(batch)) is not None:
            self._check_decoding(decoding, before=before)
        config = GenerationConfig(max_new_tokens=_NEW_TOKENS)
        self._check_generated(runner, batch, runner.generate_ids(batch, config))

    def _check_decoding(self, decoding: Decoding, *, before: Ids) -> None:
        """Raise Mismatch if token-by-token logits differ from those of one pass."""
        count = min(map(len, self.target_ids))
        targets = torch.tensor([ids[:count] for ids in self.target_ids], device=self.llm.device)
        logits = [decoding.first]
        while len(logits) < count:
            logits.append(decoding.step(targets[:, len(logits) - 1]))
        losses, _ = token_loss(torch.stack(logits, dim=1), targets)
        expected, _ = token_loss(torch.stack([row[:count] for row in self._model_logits(before)]), targets)
        self._compare(losses, expected, "token-by-token decoding differs from one pass")

    def model_losses(self, before: Ids) -> Tensor:
        """Return the model's loss of each target, (B,), from single rows of ids."""
        targets = [torch.tensor([ids], device=self.llm.device) for ids in self.target_ids]
        rows = zip(self._model_logits(before), targets, strict=True)
        return torch.cat([token_loss(row[None], ids)[0] for row, ids in rows])

    def _model_logits(self, before: Ids) -> list[Tensor]:
        """Return the logits of each target, (L, V)."""
        if before not in self._logits:
            pairs = zip(self.prompt_ids, self.target_ids, strict=True)
            logits = [self.llm.model_logits(prompt, target, before=before) for prompt, target in pairs]
            alone = self.llm.model_logits(self.prompt_ids[0], self.target_ids[0][:1], before=before)
            if not float((alone[0] - logits[0][0]).abs().max() / alone[0].std()) <= self.tolerance.logit:
                raise Mismatch("a token's probability depends on later tokens")
            self._logits[before] = logits
        return self._logits[before]

    def _check_generated(self, runner: Runner, batch: PromptBatch, generated: Sequence[Sequence[int]]) -> None:
        """Raise Mismatch if a generated token is not the most likely one at its position."""
        end_ids = self.llm.end_ids
        ends = [next((index + 1 for index, token in enumerate(ids) if token in end_ids), len(ids)) for ids in generated]
        rows = [tuple(ids[:end]) for ids, end in zip(generated, ends, strict=True)]
        logits, targets = runner.target_logits(batch, rows)
        chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        distance = (logits.amax(dim=-1) - chosen) / logits.std(dim=-1)
        if not float(distance[targets != IGNORED].max()) <= self.tolerance.logit:
            raise Mismatch("generated tokens are not the most likely ones")

    def check_prompt_cache(self, whole: Runner, check: ModelCheck) -> ModelCheck:
        """Add to a result how prompts can be cached, or why they cannot; `whole` has passed the check."""
        reasons = list[str]()
        for way, runner in self.llm.prefix_ways.items():
            reason = _reason(partial(self._check_cached_prefix, runner, whole))
            if not reason:
                return replace(check, layout=self._layout(), prefix_way=way)
            reasons.append(reason)
        if reasons:
            return replace(check, why_no_prompt_cache=reasons[-1])
        return replace(check, layout=self._layout())

    def _layout(self) -> Layout:
        return self.llm.compute_prompt_states(self.prompt_ids[:1])[0].layout

    def _check_cached_prefix(self, runner: Runner, whole: Runner) -> None:
        problem = "answers after a cached prompt differ from one pass"
        self._check_batch(runner, self._spelled_batch(), before=self.spelled, problem=problem)
        self._check_moved_states(runner)
        batch = PromptBatch(_PROMPTS, self._random_soft("suffix"))
        gradients = [self._gradient(one, batch).flatten() for one in (runner, whole)]
        similarity = float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
        if not similarity > self.tolerance.gradient:
            raise Mismatch(f"gradients after a cached prompt differ from one pass (cosine similarity {similarity:.3f})")

    def _check_moved_states(self, runner: Runner) -> None:
        """Raise Mismatch if a prompt's state depends on the padding with which it was computed.

        A model without `position_ids` may count positions from the first column of a padded batch.
        """
        states = dict(zip(self.prompt_ids, self.llm.compute_prompt_states(self.prompt_ids), strict=True))
        source, compute = self.llm.prompt_states, self.llm.prompt_states.compute
        source.compute = lambda prompts: [states[ids] for ids in prompts]
        try:
            rows = zip(self._spelled_batch().rows(), self.target_ids, strict=True)
            losses = [token_loss(*runner.target_logits(row, [ids]))[0] for row, ids in rows]
        finally:
            source.compute = compute
        self._compare(torch.cat(losses), self.model_losses(self.spelled), "a cached prompt depends on its padding")

    @torch.enable_grad()
    def _gradient(self, runner: Runner, batch: PromptBatch) -> Tensor:
        """Return the gradient of all losses with respect to the soft tokens of a batch, (B, S, D)."""
        assert batch.soft is not None
        soft = SoftPrompt(batch.soft.vectors.clone().requires_grad_(), batch.soft.placement)
        losses, _ = token_loss(*runner.target_logits(PromptBatch(batch.prompts, soft), self.target_ids))
        return torch.autograd.grad(losses.sum(), soft.vectors)[0].float()

    def _spelled_batch(self) -> PromptBatch:
        """Return the prompts with soft tokens that the model can also read as ids."""
        vectors = self.llm.spell(self.spelled).expand(len(_PROMPTS), -1, -1)
        return PromptBatch(_PROMPTS, SoftPrompt(vectors, placement="suffix"))

    def _compare(self, losses: Tensor, expected: Tensor, problem: str) -> None:
        errors = (losses.float() - expected.float()).abs()
        if not bool((errors <= self.tolerance.loss * (1 + expected.float().abs())).all()):  # NaN is a mismatch
            raise Mismatch(f"{problem} (losses differ by {float(errors.max()):.2g} nats)")


def _reason(probe: Callable[[], None]) -> str:
    """Run a probe and return why it failed, or an empty string."""
    try:
        probe()
    except Mismatch as mismatch:
        return str(mismatch)
    except Exception as error:  # unsupported families raise errors of any type
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in str(error).lower():
            raise  # not a property of the family
        return f"transformers raises {first_line(error)}"
    return ""
