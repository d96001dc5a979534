"""Answers: what a frozen model says to samples, with or without a plug, and the file that keeps them.

Kept answers are used again only while everything they depend on is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from personaplug.backends.base import Backend, GenerationConfig
from personaplug.data.base import Task
from personaplug.decisions import ARGMAX, decide
from personaplug.files import write_json
from personaplug.memory import peak_memory, reset_peak_memory
from personaplug.personalizer import SoftPrompter
from personaplug.progress import Progress
from personaplug.samples import EncodedSample

_DIGITS = 6  # of a probability; enough for any decision, and the same in a file as in memory
_LEAST = 0.5 * 10**-_DIGITS  # what a probability is taken for that was rounded to none
_AT_ONCE = 16  # right answers whose likelihood is asked in one pass


@dataclass(frozen=True, repr=False)
class Answers:
    """What was answered, sample by sample.

    Attributes:
        texts: the answers.
        unfinished: whether each stopped at its longest length.
        seconds: the time they took.
        peak_memory_bytes: the most memory held meanwhile.
        probabilities: (n, C) of the task's labels, in their order, where labels were scored; None elsewhere.
        surprises: (n, 2), −log p of each right answer and its tokens, where texts were written and those are known;
            None elsewhere.
        partial: whether they come from a file that says nothing of probabilities, though labels may have been scored.
    """

    texts: list[str]
    unfinished: list[bool]
    seconds: float
    peak_memory_bytes: int
    probabilities: list[list[float]] | None = None
    surprises: list[list[float]] | None = None
    partial: bool = False

    def surprise(self, golds: Sequence[str], *, labels: Sequence[str]) -> NDArray[np.float64] | None:
        """−log p of the right answers and their tokens, (n, 2); None if no probabilities are known.

        Of a closed set it is that of the label among the labels, and each counts as one token.
        """
        if self.probabilities is None:
            return None if self.surprises is None else np.array(self.surprises, dtype=np.float64).reshape(-1, 2)
        places = {label.strip(): place for place, label in enumerate(labels)}
        found = [places.get(gold.strip()) for gold in golds]
        shares = [0.0 if place is None else line[place] for line, place in zip(self.probabilities, found, strict=True)]
        return np.array([[-math.log(max(share, _LEAST)), 1.0] for share in shares]).reshape(-1, 2)

    def by(self, decision: str, *, labels: Sequence[str]) -> list[str] | None:
        """The answers as a decision chooses them; None if that takes probabilities that were not kept.

        Answers that were never chosen from probabilities stand as they are, whatever the decision.

        Raises:
            BadConfig: if there is no such decision, or the labels are no scale.
        """
        if decision == ARGMAX or (self.probabilities is None and not self.partial):
            return self.texts
        if self.probabilities is None:
            return None
        shares = np.array(self.probabilities, dtype=np.float64).reshape(len(self.texts), len(labels))
        return decide(shares, labels, decision=decision)


@dataclass(frozen=True, repr=False)
class _Answer:
    """One answer; the attributes are those of `Answers`."""

    text: str
    unfinished: bool = False
    probabilities: list[float] | None = None


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
    if prompter is not None and prompter.placement == "suffix":
        # Rows of one table ask the same of other histories: what stands ahead of the soft tokens is read once for all,
        # which is the table's time and not that of the row that comes first.
        backend.keep([sample.prompt for sample in samples])
    elif decoding == "generate":
        backend.let_go()
    reset_peak_memory()
    began = time.monotonic()
    found: dict[int, _Answer] = {}
    order = np.argsort([-len(sample.prompt) for sample in samples], kind="stable")
    with Progress(title, total=len(samples), unit="answers") as progress:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size].tolist()
            batch = [samples[place] for place in places]
            made = _answer_batch(backend, batch, prompter, task=task, decoding=decoding, generation=generation)
            found.update(zip(places, made, strict=True))
            progress.advance(len(batch))
    seconds = time.monotonic() - began
    in_order = [found[place] for place in range(len(samples))]
    return Answers(
        [one.text for one in in_order],
        [one.unfinished for one in in_order],
        seconds,
        peak_memory(),
        probabilities=all_or_none([one.probabilities for one in in_order]),
        surprises=_surprises(backend, samples, prompter) if decoding == "generate" else None,
    )


def all_or_none(lines: Sequence[list[float] | None]) -> list[list[float]] | None:
    """Return probabilities of samples, or None if those of one are not known."""
    known = [line for line in lines if line is not None]
    return known if len(known) == len(lines) else None


def _answer_batch(
    backend: Backend,
    batch: Sequence[EncodedSample],
    prompter: SoftPrompter | None,
    *,
    task: Task,
    decoding: str,
    generation: GenerationConfig,
) -> list[_Answer]:
    prompts, soft_at = [sample.prompt for sample in batch], [sample.soft_at for sample in batch]
    with torch.no_grad():
        soft = None if prompter is None else prompter.soft_prompt(batch)
        if decoding == "score":
            scores = backend.score(prompts, task.labels, soft=soft, soft_at=soft_at)
            best, shares = scores.argmax(dim=1).tolist(), _shares(scores)
            return [_Answer(task.labels[i], probabilities=line) for i, line in zip(best, shares, strict=True)]
        made = backend.generate(prompts, soft=soft, config=generation, soft_at=soft_at)
        return [_Answer(one.text, unfinished=not one.finished) for one in made]


@torch.no_grad()
def _surprises(
    backend: Backend, samples: Sequence[EncodedSample], prompter: SoftPrompter | None
) -> list[list[float]] | None:
    """−log p of each right answer and its tokens, to be read as `Answers.surprises`; None if one is not known."""
    if any(sample.target is None for sample in samples):
        return None
    found: dict[int, list[float]] = {}
    order = np.argsort([-len(sample.prompt) for sample in samples], kind="stable")
    for start in range(0, len(order), _AT_ONCE):
        places = order[start : start + _AT_ONCE].tolist()
        batch = [samples[place] for place in places]
        losses, tokens = backend.loss(
            [sample.prompt for sample in batch],
            [sample.target or "" for sample in batch],
            soft=None if prompter is None else prompter.soft_prompt(batch),
            soft_at=[sample.soft_at for sample in batch],
        )
        pairs = zip(losses.tolist(), tokens.tolist(), strict=True)
        found.update(zip(places, ([round(loss, _DIGITS), count] for loss, count in pairs), strict=True))
    return [found[place] for place in range(len(samples))]


def _shares(scores: torch.Tensor) -> list[list[float]]:
    """Log-probabilities of a closed set (B, C) as probabilities within it, rounded."""
    shares = torch.softmax(scores.cpu().double(), dim=1)
    # Numbers that overflowed say nothing of the labels but which one is answered all the same.
    sure = torch.nn.functional.one_hot(scores.cpu().argmax(dim=1), num_classes=scores.shape[1]).double()
    lines: list[list[float]] = torch.where(shares.isfinite(), shares, sure).tolist()
    return [[round(share, _DIGITS) for share in line] for line in lines]


def keep(answers: Answers, path: Path, *, depends_on: Sequence[Any]) -> None:
    """Write answers down beside a key of all they depend on.

    Raises:
        StorageError: if the disk is full.
    """
    write_json(path, {"key": _key(depends_on), **asdict(answers)})


def kept(path: Path, *, depends_on: Sequence[Any]) -> Answers | None:
    """Answers written down earlier, if all they depend on is what it was; `partial` if without probabilities."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.pop("key") == _key(depends_on):
            return Answers(**{"partial": "probabilities" not in told} | told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _key(depends_on: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(depends_on), sort_keys=True).encode()).hexdigest()
