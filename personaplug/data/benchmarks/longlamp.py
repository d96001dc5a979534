"""LongLaMP (arXiv 2407.11016): write abstracts, product reviews and posts as a user writes them.

A split is Parquet in shards. The hub's LongLaMP/LongLaMP has a folder for each of the six subsets {abstract_generation,
product_review, topic_writing} × {user, temporal}, with the splits train, val and test. A record is
{user, input, output, profile}; the name of the user's column identifies the task. The e-mails are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from personaplug.data.benchmarks.base import Layout, PublishedReader, published_records, split_files
from personaplug.data.record_reader import Limits
from personaplug.data.task import Task
from personaplug.errors import ConfigError


def _layout(name: str, fields: tuple[str, ...], *, user: str, item_id: str = "", item_date: str = "") -> Layout:
    # The whole input is the query: its wording differs between tasks, and every part says what to write.
    task = Task(f"LongLaMP_{name}", "text", fields, fields[-1], ("rouge_1", "rouge_l"), max_new_tokens=512)
    return Layout(task, "input", user=user, output="output", item_id=item_id, item_date=item_date)


_LAYOUTS = (
    _layout("abstract_generation", ("title", "abstract"), user="name", item_id="id", item_date="year"),
    _layout("product_review", ("description", "overall", "summary", "reviewText"), user="reviewerId"),
    _layout("topic_writing", ("summary", "content"), user="author", item_id="id"),
)


class LongLampReader(PublishedReader):
    """One split of one subset; the columns of its records determine the task. Papers are sorted by year."""

    def __init__(self, path: str | Path, split: str, **limits: Unpack[Limits]) -> None:
        """Find the files; `path` is the split's file, or the folder of one subset."""
        files = split_files(path, split)
        super().__init__(files, _layout_of(files), **limits)


def _layout_of(files: Sequence[Path]) -> Layout:
    for _, _, record in published_records(files):
        layouts = [layout for layout in _LAYOUTS if isinstance(record, dict) and layout.user in record]
        if len(layouts) == 1:
            return layouts[0]
    columns = ", ".join(f"{layout.user!r} ({layout.task.name})" for layout in _LAYOUTS)
    raise ConfigError(f"{files[0]}: no record has exactly one of the columns {columns}, so the task is unknown.")
