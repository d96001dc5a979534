"""Answers: what a frozen model says to samples, with or without a plug, and the file that keeps them.

Kept answers are used again only while everything they depend on is the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personaplug.backends.base import Backend, GenerationConfig
from personaplug.data.base import Task
from personaplug.files import write_json
from personaplug.memory import peak_memory, reset_peak_memory
from personaplug.personalizer import SoftPrompter
from personaplug.progress import Progress
from personaplug.samples import EncodedSample


@dataclass(frozen=True, repr=False)
class Answers:
    """What was answered, sample by sample.

    Attributes:
        texts: the answers.
        unfinished: whether each stopped at its longest length.
        seconds: the time they took.
        peak_memory_bytes: the most memory held meanwhile.
    """

    texts: list[str]
    unfinished: list[bool]
    seconds: float
    peak_memory_bytes: int


def answer(
    backend: Backend,
    samples: Sequence[EncodedSample],
    *,
    prompter: SoftPrompter | None,
    task: Task,
    decoding: str,
    generation: GenerationConfig,
    batch_size: int,
    title: str = "answer",
) -> Answers:
    """Answer samples, the longest prompts first, and return the answers in the samples' order.

    The longest come first so that memory runs out at once or not at all.

    Args:
        prompter: makes the soft tokens; None = the bare model.
        decoding: "score" takes the likeliest of the task's labels, "generate" writes text.
    """
    if decoding == "score" and prompter is not None and prompter.placement == "suffix":
        # Rows of one table ask the same of other histories: what stands ahead of the soft tokens is read once for all,
        # which is the table's time and not that of the row that comes first.
        backend.keep([sample.prompt for sample in samples])
    elif decoding == "generate":
        backend.let_go()
    reset_peak_memory()
    began = time.monotonic()
    texts, unfinished = [""] * len(samples), [False] * len(samples)
    order = np.argsort([-len(sample.prompt) for sample in samples], kind="stable")
    with Progress(title, total=len(samples), unit="answers") as progress:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size].tolist()
            batch = [samples[place] for place in places]
            found = _answer_batch(backend, batch, prompter, task=task, decoding=decoding, generation=generation)
            for place, (text, cut) in zip(places, found, strict=True):
                texts[place], unfinished[place] = text, cut
            progress.advance(len(batch))
    return Answers(texts, unfinished, time.monotonic() - began, peak_memory())


def _answer_batch(
    backend: Backend,
    batch: Sequence[EncodedSample],
    prompter: SoftPrompter | None,
    *,
    task: Task,
    decoding: str,
    generation: GenerationConfig,
) -> list[tuple[str, bool]]:
    prompts, soft_at = [sample.prompt for sample in batch], [sample.soft_at for sample in batch]
    with torch.no_grad():
        soft = None if prompter is None else prompter.soft_prompt(batch)
        if decoding == "score":
            best = backend.score(prompts, task.labels, soft=soft, soft_at=soft_at).argmax(dim=1).tolist()
            return [(task.labels[index], False) for index in best]
        made = backend.generate(prompts, soft=soft, config=generation, soft_at=soft_at)
        return [(one.text, not one.finished) for one in made]


def keep(answers: Answers, path: Path, *, depends_on: Sequence[Any]) -> None:
    """Write answers down beside a key of all they depend on.

    Raises:
        StorageError: if the disk is full.
    """
    write_json(path, {"key": _key(depends_on), **asdict(answers)})


def kept(path: Path, *, depends_on: Sequence[Any]) -> Answers | None:
    """Answers written down earlier, if all they depend on is what it was."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.pop("key") == _key(depends_on):
            return Answers(**told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _key(depends_on: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(depends_on), sort_keys=True).encode()).hexdigest()
