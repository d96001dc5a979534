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

from personaplug.analysis.point_estimates import ARGMAX, point_predictions
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.infra.atomic_io import write_json
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.infra.progress import Progress
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.plug.personalizer import SoftPrompter
from personaplug.training.batching import micro_batches

_DIGITS = 6  # of a probability; enough for any decision, and the same in a file as in memory
_LEAST = 0.5 * 10**-_DIGITS  # what a probability is taken for that was rounded to none


@dataclass(frozen=True, repr=False)
class Answers:
    """What was answered, sample by sample.

    Attributes:
        texts: the answers.
        unfinished: whether each stopped at its longest length.
        seconds: the time they took.
        peak_memory_bytes: the most memory held meanwhile.
        probabilities: (n, C) of the task's labels, in their order, where labels were scored; None elsewhere.
        surprises: (n, 2), −log p of each right answer and its tokens (a label of a closed set counts as one), if they
            were asked for (see `likelihood.py`) or came with the labels' scores; None elsewhere.
        partial: whether they come from a file that says nothing of probabilities, though labels may have been scored.
    """

    texts: list[str]
    unfinished: list[bool]
    seconds: float
    peak_memory_bytes: int
    probabilities: list[list[float]] | None = None
    reference_nll: list[list[float]] | None = None
    partial: bool = False

    def surprise(self, golds: Sequence[str], *, labels: Sequence[str]) -> NDArray[np.float64] | None:
        """−log p of the right answers and their tokens, (n, 2); None if it is not known.

        Answers that older code kept tell it of labels by probabilities of six digits alone, so at most 14.5.
        """
        if self.reference_nll is not None:
            # JSON knows no infinity: a file has null in its place.
            lines = [[math.inf if value is None else value for value in line] for line in self.reference_nll]
            return np.array(lines, dtype=np.float64).reshape(-1, 2)
        if self.probabilities is None:
            return None
        places = {label.strip(): place for place, label in enumerate(labels)}
        both = zip(self.probabilities, golds, strict=True)
        shares = [line[places[gold.strip()]] if gold.strip() in places else 0.0 for line, gold in both]
        return np.array([[-math.log(max(share, _LEAST)), 1.0] for share in shares]).reshape(-1, 2)

    def by(self, decision: str, *, labels: Sequence[str]) -> list[str] | None:
        """The answers as a decision chooses them; None if that takes probabilities that were not kept.

        Answers that were never chosen from probabilities stand as they are, whatever the decision.

        Raises:
            ConfigError: if there is no such decision, or the labels are no scale.
        """
        if decision == ARGMAX or (self.probabilities is None and not self.partial):
            return self.texts
        if self.probabilities is None:
            return None
        shares = np.array(self.probabilities, dtype=np.float64).reshape(len(self.texts), len(labels))
        return point_predictions(shares, labels, decision=decision)


@dataclass(frozen=True, repr=False)
class _Answer:
    """One answer; the attributes are those of `Answers`."""

    text: str
    unfinished: bool = False
    probabilities: list[float] | None = None
    surprise: list[float] | None = None


def answer(
    llm: LanguageModel,
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
    if prompter is not None and prompter.placement == "suffix" and (decoding == "score" or generation.num_beams == 1):
        # Most rows of a table ask the same of other histories: what stands ahead of the soft tokens is read once for
        # all, which is the table's time and not that of the row that comes first. Beams read prompts by themselves.
        llm.cache_prompts([sample.prompt for sample in samples])
    elif decoding == "generate":
        llm.clear_cache()
    reset_peak_memory()
    began = time.monotonic()
    found: dict[int, _Answer] = {}
    order = np.argsort([-len(sample.prompt) for sample in samples], kind="stable")
    with Progress(title, total=len(samples), unit="answers") as progress:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size].tolist()
            batch = [samples[place] for place in places]
            made = _answer_batch(llm, batch, prompter, task=task, decoding=decoding, generation=generation)
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
        reference_nll=all_or_none([one.surprise for one in in_order]),
    )


def phrases_of(samples: Sequence[EncodedSample], llm: LanguageModel) -> list[UserNgramCache] | None:
    """What the answers in the samples' histories go on with; None where that is not asked for."""
    if not any(sample.own_answers for sample in samples):
        return None
    return [llm.build_ngram_cache(sample.own_answers) for sample in samples]


def all_or_none(lines: Sequence[list[float] | None]) -> list[list[float]] | None:
    """Return probabilities of samples, or None if those of one are not known."""
    known = [line for line in lines if line is not None]
    return known if len(known) == len(lines) else None


def _answer_batch(
    llm: LanguageModel,
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
            scores = llm.score(PromptBatch(prompts, soft, soft_at), task.labels)
            best = scores.argmax(dim=1).tolist()
            told = zip(best, _shares(scores), _surprises(scores, batch, task=task), strict=True)
            return [_Answer(task.labels[i], probabilities=line, surprise=found) for i, line, found in told]
        made = llm.generate(PromptBatch(prompts, soft, soft_at, phrases_of(batch, llm)), generation)
        return [_Answer(one.text, unfinished=not one.finished) for one in made]


def _shares(scores: torch.Tensor) -> list[list[float]]:
    """Log-probabilities of a closed set (B, C) as probabilities within it, rounded."""
    shares = torch.softmax(scores.cpu().double(), dim=1)
    # Numbers that overflowed say nothing of the labels but which one is answered all the same.
    sure = torch.nn.functional.one_hot(scores.cpu().argmax(dim=1), num_classes=scores.shape[1]).double()
    lines: list[list[float]] = torch.where(shares.isfinite(), shares, sure).tolist()
    return [[round(share, _DIGITS) for share in line] for line in lines]


def _surprises(scores: torch.Tensor, samples: Sequence[EncodedSample], *, task: Task) -> list[list[float] | None]:
    """−log p of each sample's label among the labels, and that it counts as one token; None where it is hidden."""
    found = -torch.log_softmax(scores.cpu().double(), dim=1)
    # What overflowed told the right label apart from nothing: as unlikely as can be.
    found = found.nan_to_num(nan=math.inf)
    places = {label.strip(): place for place, label in enumerate(task.labels)}
    named = [None if sample.target is None else places.get(sample.target.strip()) for sample in samples]
    return [
        None if place is None else [round(float(line[place]), _DIGITS), 1]
        for line, place in zip(found, named, strict=True)
    ]


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


_TOKENS = 1024  # of answers in one pass, padding included; each has a logit for every word of the model


@torch.no_grad()
def reference_nll(
    llm: LanguageModel,
    samples: Sequence[EncodedSample],
    *,
    prompter: SoftPrompter | None,
    batch_size: int,
    title: str = "likelihood",
) -> list[list[float]]:
    """−log p of each right answer and its tokens, the end of text among them, in the samples' order.

    Args:
        samples: with targets.
        prompter: makes the soft tokens; None = the bare model.
        batch_size: most samples in a pass; long answers make it fewer.
    """
    prompts, targets = [sample.prompt for sample in samples], [sample.target or "" for sample in samples]
    both = zip(llm.measure(prompts, targets=targets), llm.measure(prompts), strict=True)
    lengths = [whole.tokens - prompt.tokens for whole, prompt in both]
    found: dict[int, list[float]] = {}
    with Progress(title, total=len(samples), unit="answers") as progress:
        for part in micro_batches(range(len(samples)), lengths=lengths, most=_TOKENS):
            for start in range(0, len(part), batch_size):
                places = part[start : start + batch_size]
                batch = [samples[place] for place in places]
                inputs = PromptBatch(
                    [sample.prompt for sample in batch],
                    soft=None if prompter is None else prompter.soft_prompt(batch),
                    soft_at=[sample.soft_at for sample in batch],
                    ngrams=phrases_of(batch, llm),
                )
                losses, tokens = llm.loss(inputs, [sample.target or "" for sample in batch])
                pairs = zip(losses.tolist(), tokens.tolist(), strict=True)
                found.update(zip(places, ([round(loss, 6), count] for loss, count in pairs), strict=True))
                progress.advance(len(batch))
    return [found[place] for place in range(len(samples))]
