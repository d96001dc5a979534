"""Method: one row of a results table, with its trained parts, model inputs, predictions and costs.

To add a row, write a subclass as a frozen dataclass, and register it: `register_method("my-row", factory)`. Its
controls `my-row@wrong-user` and `my-row@shuffled` are copies with another `info` and `rationale`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from personaplug.analysis.method_info import MethodInfo
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.base import Measure
from personaplug.methods.context import Assignment, EvalContext
from personaplug.methods.costs import UserCost
from personaplug.methods.predictions import Predictions
from personaplug.training.trainings import TrainedPart


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of a row for n samples.

    Attributes:
        samples: (n,) samples with the items for the plug and the prompts for the model.
        assignments: (n,) the history that each sample gets.
        prompt_lengths: (n,) sizes of the prompts; empty for a row without a language model.
        items_used: (n,) number of history items that a prediction uses.
        cut_items_rate: share of the items for prompts or weights that were cut or left out; None if not applicable.
        texts: (n,) the samples with the texts of their histories, for rows that read texts.
        user_cost: the cost of a user's data, if it was measured while the inputs were built.
    """

    samples: Sequence[EncodedSample]
    assignments: Sequence[Assignment]
    prompt_lengths: Sequence[Measure] = ()
    items_used: Sequence[int] = ()
    cut_items_rate: float | None = None
    texts: Sequence[Sample] = ()
    user_cost: UserCost | None = None


@dataclass(frozen=True)
class Method(ABC):
    """One row.

    Attributes:
        info: name, family, control and parents of the row.
        rationale: the question that the row answers.
    """

    info: MethodInfo = field(kw_only=True)
    rationale: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """The name on the command line and in results."""
        return self.info.name

    @property
    def requires(self) -> tuple[TrainedPart, ...]:
        """The parts to train before this row is evaluated, in order."""
        return ()

    @property
    def needs_train_split(self) -> bool:
        """Whether the evaluation fits the row on the training split."""
        return False

    def check(self, task: Task) -> None:
        """Raise `ConfigError` if the task lacks what the row needs."""
        for part in self.requires:
            part.check(task)

    @abstractmethod
    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        """Return the row's inputs for all samples; `seed` determines random draws."""

    @abstractmethod
    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        """Predict the samples."""

    def cache_key(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[Any] | None:
        """Return everything that the predictions depend on; None = predictions are not cached."""
        return None

    def reference_nll(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        """Return −log p of each reference answer and its number of tokens, (n, 2); None without likelihoods."""
        return None

    def divergence(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        """Return KL(plain ‖ row), summed along each plain answer, and its number of tokens, (n, 2), or None."""
        return None

    def identification(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[float | None] | None:
        """Return the reciprocal rank of the own persona for each measured sample; see `methods/identification.py`."""
        return None

    def sampled_answers(
        self, context: EvalContext, inputs: ModelInputs, *, count: int, seed: int
    ) -> list[list[str]] | None:
        """Return `count` sampled answers to each sample; None without a language model."""
        return None

    def user_cost(self, context: EvalContext, inputs: ModelInputs) -> UserCost | None:
        """Return the cost of one user to a service with this row; None if unknown."""
        return None

    def check_decoding(self, num_beams: int) -> None:  # noqa: B027  # an optional hook
        """Raise `ConfigError` if the row cannot decode with this number of beams."""

    def soft_tokens(self, context: EvalContext) -> int:
        """Return the number of soft tokens that the row adds to a prompt."""
        return 0

    def ignored_items(self, context: EvalContext, *, seed: int) -> int:
        """Return the largest number of items that the row ignores: the items of a cold start."""
        return 0

    def remark(self, task: Task) -> str | None:
        """Return a note on this row for readers of the table, or None."""
        return None

    @property
    def can_be_shuffled(self) -> bool:
        """Whether the order of a user's items may matter to the row."""
        return True
