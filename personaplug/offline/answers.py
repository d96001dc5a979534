"""Answers to the prompts of many rows, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np

from personaplug.analysis.point_estimates import label_distribution
from personaplug.config import EvaluationConfig
from personaplug.data.parquet_files import import_pyarrow
from personaplug.data.records import characters
from personaplug.data.task import Task
from personaplug.inference import generation_config
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.offline.personas import Personas, Result
from personaplug.offline.rows import Row


class AnswerWriter:
    """Computes the answer of each row: a label and the probabilities of all labels, or a text.

    Args:
        personas: None = the plain model answers.
    """

    def __init__(
        self, llm: LanguageModel, task: Task, config: EvaluationConfig, *, personas: Personas | None = None
    ) -> None:
        self._llm, self._task, self._config, self._personas = llm, task, config, personas
        self._scores_labels = bool(task.labels) and config.decoding != "generate"
        self._generation = generation_config(task, config)
        self.dtype = llm.dtype

    @property
    def fields(self) -> list[tuple[str, Any]]:
        """The names and Arrow types of the result's columns."""
        pyarrow, _ = import_pyarrow()
        fields = [("items", pyarrow.int32()), ("answer", pyarrow.string())]
        if not self._scores_labels:
            return [*fields, ("finished", pyarrow.bool_())]
        labels = pyarrow.struct([(label, pyarrow.float64()) for label in self._task.labels])
        return [*fields, ("probabilities", labels)]

    @property
    def about(self) -> dict[str, Any]:
        """Facts for readers of the columns."""
        return {"labels": list(self._task.labels)}

    def results(self, rows: Sequence[Row]) -> list[Result]:
        """Return the result of each row."""
        if self._personas is None:
            return self._results(rows)
        return self._personas.histories.confirmed(rows, lambda: self._results(rows))

    def _results(self, rows: Sequence[Row]) -> list[Result]:
        results: dict[int, Result] = {}
        # The longest prompts come first, so that rows of a batch need little padding.
        order = np.argsort([-characters(row.prompt) for row in rows], kind="stable").tolist()
        for start in range(0, len(order), self._config.evaluation_batch_size):
            indices = order[start : start + self._config.evaluation_batch_size]
            results.update(zip(indices, self._answers([rows[index] for index in indices]), strict=True))
        return [results[index] for index in range(len(rows))]

    def _answers(self, rows: Sequence[Row]) -> Iterator[Result]:
        soft, items = (None, [0] * len(rows)) if self._personas is None else self._personas.soft_prompts(rows)
        batch = PromptBatch([row.prompt for row in rows], soft)
        if self._scores_labels:
            answers = self._scored(batch)
        else:
            # A seed of its own for each row, so that a sampled answer does not depend on the other rows.
            batch = replace(batch, seeds=[crc32(row.id.encode(), self._config.draw_seed) for row in rows])
            generated = self._llm.generate(batch, self._generation)
            answers = ({"answer": each.text, "finished": each.finished} for each in generated)
        return ({"items": count, **answer} for count, answer in zip(items, answers, strict=True))

    def _scored(self, batch: PromptBatch) -> Iterator[Result]:
        labels = self._task.labels
        for scores in self._llm.score(batch, labels).tolist():
            probabilities = label_distribution(labels, scores).probabilities
            yield {"answer": labels[int(np.argmax(scores))], "probabilities": dict(probabilities)}
