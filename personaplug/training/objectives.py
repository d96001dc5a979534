"""Training objectives: a module, its loss on a batch, and the learning rates of its parameters.

The language model is frozen; gradients only pass through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from personaplug.baselines.lora import TASK, LoraAdapters
from personaplug.config import AdapterConfig, TrainingConfig
from personaplug.data.records import Prompt
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.training.preference_loss import PreferenceLoss

_CACHED_PER_LIVE_TOKEN = 16  # this many cached tokens take the memory of one token with a backward pass


class Objective(Protocol):
    """A module to train, and its loss."""

    unit: str  # what the loss is averaged over, such as "token"
    reads_histories: bool  # False if the loss does not depend on a sample's history

    @property
    def module(self) -> nn.Module:
        """All trained parameters and no others."""

    @property
    def device(self) -> torch.device: ...

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a batch, and the number of its terms."""

    def sample_losses(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample and the number of its terms, both (B,)."""

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Precompute what all steps of a training use, for all its samples."""

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """Return the number of tokens of each sample."""

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """Return the number of each sample's tokens with a backward pass; it determines the memory needed."""

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Return parameters with each group's peak learning rate."""


class PlugObjective:
    """Cross-entropy of the answer after the plug's soft tokens (PPlug, eq. 6).

    Args:
        table: holds the samples' item vectors.
        labels: the closed set of answers, if these are trained without the end of text; see `LanguageModel.loss`.
        preference: loss term of samples with rejected answers.
    """

    unit = "token"

    def __init__(
        self,
        plug: PersonaPlug,
        llm: LanguageModel,
        *,
        table: EmbeddingStore,
        labels: Sequence[str] = (),
        preference: PreferenceLoss | None = None,
    ) -> None:
        self.module: nn.Module = plug
        self.device = plug.instruction.device
        self.llm, self.labels, self.preference = llm, tuple(labels), preference
        self.personalizer = Personalizer(plug, table=table)
        self.reads_histories = plug.config.reads_history
        self._is_suffix = plug.config.placement == "suffix"

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Cache prompts and frozen queries, in a fixed order, so that rounding does not depend on resumptions."""
        self.cache_prompts(samples)
        self.prepare_task(samples)

    def cache_prompts(self, samples: Sequence[EncodedSample]) -> None:
        """Fill the prompt cache with these samples' prompts, if prompts do not depend on the soft tokens."""
        if self._is_suffix:
            self.llm.cache_prompts([sample.prompt for sample in samples])

    def prepare_task(self, samples: Sequence[EncodedSample]) -> None:
        """Cache query vectors and preference terms of samples of this plug's task."""
        queries, options = [sample.query for sample in samples], [sample.options for sample in samples]
        self.personalizer.plug.cache_queries(queries, options=options)
        if self.preference is not None:
            self.preference.prepare(samples)

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        losses, tokens = self.sample_losses(samples)
        return losses.sum(), tokens.sum()

    def sample_losses(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        soft = self.personalizer.soft_prompt(samples)
        losses, tokens = self._losses(samples, [sample.target or "" for sample in samples], soft=soft)
        if self.preference is not None and torch.is_grad_enabled():  # validation measures only kept answers
            losses = losses + self._preference_loss(self.preference, samples, soft=soft, losses=losses, tokens=tokens)
        return losses, tokens

    def _losses(
        self, samples: Sequence[EncodedSample], answers: Sequence[str], *, soft: SoftPrompt
    ) -> tuple[Tensor, Tensor]:
        """Return −log p of an answer to each sample and its number of tokens, both (B,)."""
        return self.llm.loss(prompts_with(soft, samples), answers, labels=self.labels)

    def _preference_loss(
        self,
        preference: PreferenceLoss,
        samples: Sequence[EncodedSample],
        *,
        soft: SoftPrompt,
        losses: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        """Return the preference term of each sample, (B,); 0 without rejected answers."""
        rows = [row for row, sample in enumerate(samples) if sample.rejected]
        if not rows:
            return torch.zeros_like(losses)
        paired = [samples[row] for row in rows]
        rejected = [preference.draw(sample) for sample in paired]
        rejected_losses, rejected_tokens = self._losses(paired, rejected, soft=soft.rows(rows))
        terms = preference(
            paired, rejected, losses=(losses[rows], rejected_losses), tokens=(tokens[rows], rejected_tokens)
        )
        return torch.zeros_like(losses).index_add(0, torch.tensor(rows, device=losses.device), terms)

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return _token_counts(samples, self.llm)

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """Count soft tokens, answer and, for the keys and values of a cached prompt, a share of its tokens."""
        lengths = self.lengths(samples)
        if not self._is_suffix or not self.llm.supports_prompt_cache:
            return lengths
        soft = self.personalizer.plug.config.soft_tokens
        sizes = zip(lengths, self.llm.measure([sample.prompt for sample in samples]), strict=True)
        return [
            soft + length - prompt.tokens + math.ceil(prompt.tokens / _CACHED_PER_LIVE_TOKEN)
            for length, prompt in sizes
        ]

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        return plug_parameter_groups([self.personalizer.plug], config)


class LoraObjective:
    """Cross-entropy of the answer with the task's LoRA in the model and without soft tokens."""

    unit = "token"
    reads_histories = False

    def __init__(
        self, adapters: LoraAdapters, llm: LanguageModel, *, config: AdapterConfig, labels: Sequence[str]
    ) -> None:
        self.module = adapters.module(TASK)
        self.device = next(self.module.parameters()).device
        self.adapters, self.llm, self.labels = adapters, llm, tuple(labels)
        self._learning_rate = config.lora_learning_rate

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Do nothing: prompts cannot be cached, because the LoRA changes their states."""

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        losses, tokens = self.sample_losses(samples)
        return losses.sum(), tokens.sum()

    def sample_losses(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        prompts, targets = _texts(samples)
        with self.adapters.active(TASK):
            return self.llm.loss(PromptBatch(prompts), targets, labels=self.labels)

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return _token_counts(samples, self.llm)

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return self.lengths(samples)

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "peak": self._learning_rate}]


def plug_parameter_groups(plugs: Sequence[PersonaPlug], config: TrainingConfig) -> list[dict[str, Any]]:
    """Group parameters by learning rate: tokens, single numbers, the trained copy of the encoder, other layers.

    A step moves a token by about its learning rate, so tokens need a far higher rate than the projector's layers. With
    one rate for all, the control without history would hardly be trained. A shared parameter of several plugs occurs
    once.
    """
    rates = {
        "tokens": config.token_learning_rate,
        "numbers": math.sqrt(config.token_learning_rate * config.learning_rate),
        "encoder": config.encoder_learning_rate,
        "layers": config.learning_rate,
    }
    kinds = [plug.parameter_kinds() for plug in plugs]
    groups = {kind: list(dict.fromkeys(p for own in kinds for p in own[kind])) for kind in rates}
    return [{"params": groups[kind], "peak": rate} for kind, rate in rates.items() if groups[kind]]


def prompts_with(soft: SoftPrompt, samples: Sequence[EncodedSample]) -> PromptBatch:
    """Return the samples' prompts with their soft tokens."""
    return PromptBatch([sample.prompt for sample in samples], soft, [sample.soft_at for sample in samples])


def _texts(samples: Sequence[EncodedSample]) -> tuple[list[Prompt], list[str]]:
    return [sample.prompt for sample in samples], [sample.target or "" for sample in samples]


def _token_counts(samples: Sequence[EncodedSample], llm: LanguageModel) -> list[int]:
    prompts, targets = _texts(samples)
    return [measure.tokens for measure in llm.measure(prompts, targets=targets)]
