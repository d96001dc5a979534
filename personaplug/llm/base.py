"""What the project asks of a frozen language model: measure a prompt, a loss, scores of labels, new text.

A backend knows soft prompts and nothing of users. None of its weights ever changes or needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from personaplug.errors import ConfigError
from personaplug.infra.model_hub import LLMIdentity
from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.llm.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class GenerationConfig:
    """How new text is chosen.

    Attributes:
        max_new_tokens: longest answer in tokens.
        num_beams: 1 = greedy or sampled, more = beam search.
        do_sample: draw instead of taking the likeliest.
        temperature: divides the logits when sampling.
        top_p: smallest set of tokens with this probability, when sampling.
        seed: of the draw.
    Raises:
        ConfigError: if a value is out of range.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("num_beams", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be {low} or more; found {getattr(self, name)}.")
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature must be above 0 and top_p in (0, 1]; found {self.temperature} and {self.top_p}."
            )


@dataclass(frozen=True)
class Measure:
    """A prompt as the language model will see it, soft tokens apart.

    Attributes:
        tokens: its length with the template around it.
        truncated: whether the end of the text was cut to fit.
    """

    tokens: int
    truncated: bool


@dataclass(frozen=True, repr=False)
class Generation:
    """New text only.

    Attributes:
        text: stripped of special tokens and outer white space.
        finished: False where it stopped at `max_new_tokens`.
    """

    text: str
    finished: bool


class LanguageModel(Protocol):
    """A frozen language model.

    `soft_at` says how many characters of each prompt stand before soft tokens of the placement `prefix`; None = they
    stand before all of it. Without soft tokens, or with those of the placement `suffix`, it is of no matter: the model
    then reads each prompt in one piece.

    Attributes:
        identity: which model it is.
        embedding_scale: root mean square of the values of its embedded tokens; the size a soft token should have.
        dtype: its number format, in words.
        room: how many tokens of text fit a prompt: the longest prompt less its template.
    """

    identity: LLMIdentity
    embedding_scale: float
    dtype: str
    room: int

    def measure(self, prompts: Sequence[str], *, targets: Sequence[str] | None = None) -> list[Measure]:
        """Say how long each prompt is, with its target's tokens if given, and whether it was cut."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Say how many tokens each text is by itself, without template."""
        ...

    def embedded(self, texts: Sequence[str]) -> Tensor:
        """Return the embedded tokens of some answers, one behind the other, (n, D), without the end of text."""
        ...

    def phrases(self, answers: Sequence[str]) -> UserNgramCache:
        """Return what a user's answers go on with, in this model's tokens; of long ones, the beginnings."""
        ...

    def cut_text(self, text: str, tokens: int) -> str:
        """Return the longest beginning of a text that is at most so many tokens, without white space at its end."""
        ...

    def loss(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
        labels: Sequence[str] = (),
        phrases: Sequence[UserNgramCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return −log p of each target (end of text included) and its number of tokens, both (B,).

        Gradients reach `soft` and nothing else.

        Args:
            labels: the closed set that targets come from, if they will be scored against each other: where none begins
                another, the end of text tells nothing and is left out.
            phrases: (B,) mixed into what the model says; None = nothing is.
        """
        ...

    def supports_prompt_cache(self) -> bool:
        """Say whether prompts ahead of soft tokens (`suffix`) can be read by themselves, without gradients."""
        ...

    def clear_cache(self) -> None:
        """Free what `keep` holds."""
        ...

    def keep(self, prompts: Sequence[str]) -> None:
        """Read prompts ahead of the soft tokens behind them (`suffix`), and keep what the model makes of them.

        A matter of speed alone: what is not kept is read when it is needed.
        """
        ...

    def score(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
    ) -> Tensor:
        """Return (B, C) log-probabilities of a closed set of answers, without gradients.

        What `soft` says of the labels is added, and nothing is normalized again.
        """
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        soft: SoftPrompt | None,
        config: GenerationConfig,
        soft_at: Sequence[int] | None = None,
        phrases: Sequence[UserNgramCache] | None = None,
    ) -> list[Generation]:
        """Answer each prompt; the prompt itself is never part of the answer.

        Args:
            phrases: as for `loss`.
        """
        ...


def pad(rows: Sequence[Sequence[int]], *, fill: int, side: str) -> Tensor:
    """Make rows of different lengths a (B, T) int64 tensor, padded on the `left` or `right`."""
    longest = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), longest), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        padded[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
