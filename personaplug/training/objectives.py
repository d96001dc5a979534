"""What the training loop minimizes: a module, the loss of a batch, the rates of its parameters.

The language model stays frozen in all of them and only passes gradients on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from personaplug.baselines.lora import TASK, LoraAdapters
from personaplug.config import AdapterConfig, TrainingConfig
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer

_TOKENS = ("instruction", "population", "hint.places")
_NUMBERS = ("aggregator.common", "state.common", "hint.log_sharpness", "label_prior.log_doubt", "label_prior.trust")
_HELD = 16  # tokens whose keys and values take about as much memory as one that a backward pass goes through


class Objective(Protocol):
    """What is trained, and what makes it better.

    Attributes:
        unit: what the loss is counted in.
        reads_histories: whether a sample's history matters to its loss, and may be hidden.
    """

    unit: str
    reads_histories: bool

    @property
    def module(self) -> nn.Module:
        """Holds what is trained and nothing else."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and how many terms (tokens, say) it sums."""
        ...

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Do what is done once for all samples of a training."""
        ...

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """How large each sample is, in tokens; what padding would waste."""
        ...

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """How many tokens of each a backward pass goes through; what memory is needed for."""
        ...

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Parameters with the peak learning rate of each group."""
        ...


class PlugObjective:
    """Cross-entropy of the answer behind the plug's soft tokens (PPlug, eq. 6)."""

    unit = "token"

    def __init__(
        self, plug: PersonaPlug, llm: LanguageModel, *, table: EmbeddingStore, labels: Sequence[str] = ()
    ) -> None:
        """Put a plug in front of a model.

        Args:
            table: where the samples' items are.
            labels: the closed set of answers, if they are trained without the end of text; see `LanguageModel.loss`.
        """
        self.module: nn.Module = plug
        self.device = plug.instruction.device
        self.llm, self.labels = llm, tuple(labels)
        self.personalizer = Personalizer(plug, table=table)
        self.behind = plug.config.placement == "suffix"
        self.reads_histories = plug.config.reads_history

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Read prompts and frozen queries once, all in an order of their own, so that rounding is that of any start."""
        self.personalizer.plug.remember(
            [sample.query for sample in samples], options=[sample.options for sample in samples]
        )
        if self.behind:
            self.llm.cache_prompts([sample.prompt for sample in samples])

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        soft = self.personalizer.soft_prompt(samples)
        batch = PromptBatch([sample.prompt for sample in samples], soft, [sample.soft_at for sample in samples])
        losses, tokens = self.llm.loss(batch, [sample.target or "" for sample in samples], labels=self.labels)
        return losses.sum(), tokens.sum()

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return _answered_lengths(samples, self.llm)

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """Behind a prompt, soft tokens and answer; of the prompt only keys and values are held."""
        whole = self.lengths(samples)
        if not self.behind or not self.llm.supports_prompt_cache:
            return whole
        soft = self.personalizer.plug.config.soft_tokens
        prompts = [found.tokens for found in self.llm.measure([sample.prompt for sample in samples])]
        both = zip(whole, prompts, strict=True)
        return [soft + length - prompt + math.ceil(prompt / _HELD) for length, prompt in both]

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """Tokens, single numbers, the trained copy of the encoder, and the rest, each with its own rate.

        What is trained as it stands moves by about its rate in a step, so a token needs a far higher one than the
        layers of the projector; with one rate for all, the control without history would hardly be trained.
        """
        rates = {
            "tokens": config.token_learning_rate,
            "numbers": math.sqrt(config.token_learning_rate * config.learning_rate),
            "encoder": config.encoder_learning_rate,
            "rest": config.learning_rate,
        }
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in self.module.named_parameters():
            groups[self._kind_of(name)].append(parameter)
        return [{"params": held, "peak": rates[kind]} for kind, held in groups.items() if held]

    def _kind_of(self, name: str) -> str:
        if name in _TOKENS:
            return "tokens"
        if name in _NUMBERS:
            return "numbers"
        copied = self.personalizer.plug.config.query_encoder == "trained" and name.startswith("query_encoder.")
        return "encoder" if copied else "rest"


class LoraObjective:
    """Cross-entropy of the answer with the task's matrices in the model, and no soft tokens."""

    unit = "token"
    reads_histories = False

    def __init__(
        self, adapters: LoraAdapters, llm: LanguageModel, *, config: AdapterConfig, labels: Sequence[str] = ()
    ) -> None:
        """Train matrices inside a model.

        Args:
            labels: as for a plug.
        """
        self.module = adapters.module(TASK)
        self.device = next(self.module.parameters()).device
        self.adapters, self.llm, self.rate = adapters, llm, config.lora_learning_rate
        self.labels = tuple(labels)

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Nothing: the matrices change what the model makes of every prompt."""

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        prompts, targets = [sample.prompt for sample in samples], [sample.target or "" for sample in samples]
        with self.adapters.active(TASK):
            losses, tokens = self.llm.loss(PromptBatch(prompts), targets, labels=self.labels)
        return losses.sum(), tokens.sum()

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return _answered_lengths(samples, self.llm)

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return self.lengths(samples)

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "peak": self.rate}]


def _answered_lengths(samples: Sequence[EncodedSample], llm: LanguageModel) -> list[int]:
    prompts, targets = [sample.prompt for sample in samples], [sample.target or "" for sample in samples]
    return [found.tokens for found in llm.measure(prompts, targets=targets)]
