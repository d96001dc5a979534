"""Measurements of a row that take more passes of the model: identification by likelihood, and sampled answers.

They are saved beside the predictions, each with a hash of everything that it depends on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from personaplug.analysis.identification_metrics import IdentifiedPersona
from personaplug.analysis.metric_base import Array, Metric
from personaplug.analysis.sampled_metrics import SampledMetric
from personaplug.encoders.encoded_sample import samples_fingerprint
from personaplug.methods import Method, ModelInputs
from personaplug.methods.context import EvalContext
from personaplug.methods.predictions import load_values, save_values

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Measurements:
    """The measurements of one row with one seed.

    Args:
        stem: path of the row's files, without their endings.
    """

    def __init__(self, context: EvalContext, method: Method, inputs: ModelInputs, *, stem: Path, seed: int) -> None:
        self.context, self.method, self.inputs, self.stem, self.seed = context, method, inputs, stem, seed

    def statistics(self, metrics: Sequence[Metric], references: Sequence[str]) -> dict[str, Array]:
        """Return the per-sample statistics of the metrics that are turned on and apply to the row, by name."""
        statistics: dict[str, Array] = {}
        if ranks := self.ranks():
            identified = IdentifiedPersona()
            if (of_ranks := identified.of_ranks(ranks)) is not None:
                statistics[identified.name] = of_ranks
        if answers := self.answers():
            sampled = [metric for metric in metrics if isinstance(metric, SampledMetric)]
            statistics |= {metric.name: metric.of_samples(answers, references) for metric in sampled}
        return statistics

    def ranks(self) -> list[float | None] | None:
        """Return the reciprocal rank of the own persona for each measured sample; None if off or not applicable."""
        context, config = self.context, self.context.config
        if not config.identification_samples:
            return None
        samples = samples_fingerprint(context.samples, context.embeddings)
        return self._cached(
            "identification",
            partial(self.method.identification, context, self.inputs, seed=self.seed),
            # The strangers' personas come from the items that rows may use, which the row's own key does not hold.
            depends_on=[
                *(samples, config.identification_samples, config.draw_seed),
                *(config.max_eval_history, config.item_kinds),
            ],
        )

    def answers(self) -> list[list[str]] | None:
        """Return the sampled answers to each sample; None if they are off or do not apply."""
        count = self.context.config.sampled_answers
        if not count:
            return None
        measure = partial(self.method.sampled_answers, self.context, self.inputs, count=count, seed=self.seed)
        return self._cached("sampled", measure, depends_on=[count, asdict(self.context.sampling)])

    def _cached(self, name: str, measure: Callable[[], T | None], *, depends_on: list[Any]) -> T | None:
        """Return values from their file, or measure and save them."""
        key = self.method.cache_key(self.context, self.inputs, seed=self.seed)
        key = None if key is None else [*key, name, *depends_on]
        path = self.stem.with_name(f"{self.stem.name}{name}.json")
        if key is not None and (saved := load_values(path, key=key)) is not None:
            values: T = saved["values"]
            return values
        measured = or_none(measure, f"{self.method.name}: no {name}")
        if key is not None and measured is not None:
            save_values({"values": measured}, path, key=key)
        return measured


def or_none(measure: Callable[[], T | None], warning: str) -> T | None:
    """Return the measured values; None if a text exceeds the model's maximum length, or memory runs out."""
    try:
        return measure()
    except (IndexError, RuntimeError) as error:
        logger.warning("%s (%s)", warning, type(error).__name__)
        return None
