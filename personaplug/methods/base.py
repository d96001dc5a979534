"""Method: one row of a results table. What it needs trained, what it shows the model, what it predicts, what it costs.

To add a row, write a subclass, a frozen dataclass, and register it: `register_method("my-row", factory)`. Its controls
`my-row@wrong-user` and `my-row@shuffled` are the same object with other facts in `info`.
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
from personaplug.training.parts import TrainedPart


@dataclass(frozen=True)
class ModelInputs:
    """What a row shows for each of n samples.

    Attributes:
        samples: (n,) with the items that a plug sees and the prompts that the model reads.
        assignments: (n,) whose history each sample is shown.
        prompt_lengths: (n,) sizes of the prompts; empty for a row without a language model.
        items_used: (n,) number of items of a history that reach the prediction.
        cut_items_rate: share of the items meant for prompts or weights that were cut or left out; None if none are.
        texts: (n,) the samples with the texts of the histories they are shown, for rows that read texts.
        user_cost: the measured cost of what the row keeps for a user, if it was measured on the way.
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
        info: its name, family, control and parents.
        rationale: the claim that this row tests.
    """

    info: MethodInfo = field(kw_only=True)
    rationale: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """The name on the command line and in results."""
        return self.info.name

    @property
    def requires(self) -> tuple[TrainedPart, ...]:
        """What must be trained before this row can be filled, in order."""
        return ()

    @property
    def needs_train_split(self) -> bool:
        """Whether the row is fitted on the training split when the table is filled."""
        return False

    def check(self, task: Task) -> None:
        """Check that a task has what the row needs.

        Raises:
            ConfigError: saying what is missing.
        """
        for part in self.requires:
            part.check(task)

    @abstractmethod
    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        """Return the samples as the row shows them; its random draws come from the seed."""

    @abstractmethod
    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        """Predict the samples."""

    def cache_key(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[Any] | None:
        """Return everything that the predictions depend on; None = predictions are not cached."""
        return None

    def reference_nll(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        """Return −log p of the reference answers and their tokens, (n, 2); None if the row has no likelihoods."""
        return None

    def divergence(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        """Return the sum of KL(plain ‖ row) along each of the plain model's answers and its tokens, (n, 2), or None."""
        return None

    def user_cost(self, context: EvalContext, inputs: ModelInputs) -> UserCost | None:
        """Return what a user costs a service with this row; None if unknown."""
        return None

    def soft_tokens(self, context: EvalContext) -> int:
        """Return the number of soft tokens that the row adds to a prompt."""
        return 0

    def cold_start_items(self, context: EvalContext, *, seed: int) -> int:
        """Return the largest number of items with which a user gets nothing personal."""
        return 0

    def remark(self, task: Task) -> str | None:
        """Return what a reader of the table must know of this row on a task, if anything."""
        return None

    @property
    def can_be_shuffled(self) -> bool:
        """Whether the order of a user's items may matter to the row."""
        return True
