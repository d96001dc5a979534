"""LaMP-QA (arXiv 2506.00137): answer a user's question with that user's earlier posts in mind.

A split is a JSON list of records {id, question, narrative, category, profile: [{id, text}], rubric_aspects}. Each
category has its own file (`Art_and_Entertainment_validation.json`). `utils/download_datasets.py` of the repository
LaMP-Benchmark/LaMP-QA writes these files.

There are no correct answers: a large language model outside this project judges each aspect of the rubric. Targets are
therefore None, and the samples are for prediction only. The aspects come from the narrative, so no prompt contains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from personaplug.data.benchmarks.base import Layout, PublishedReader, split_files
from personaplug.data.record_reader import Limits
from personaplug.data.task import Task

_LAYOUT = Layout(
    # The metrics apply if users bring reference answers.
    Task("LaMP_QA", "text", ("text",), None, ("rouge_1", "rouge_l"), query_after="question: ", max_new_tokens=1024),
    input="question",
    instruction="Answer the question of this user in detail.\nquestion: ",
    id="id",
    item_id="id",
)


class LampQAReader(PublishedReader):
    """One split of one category. Posts are in the file's order, without dates; users are not named."""

    def __init__(self, path: str | Path, split: str, **limits: Unpack[Limits]) -> None:
        """Find the split's file; `path` is that file, or a folder with one file of the split."""
        super().__init__(split_files(path, split), _LAYOUT, **limits)
