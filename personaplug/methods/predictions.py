"""Predict samples with a language model, with or without soft tokens, and cache the predictions in files.

Cached predictions are used only if everything that they depend on is the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personaplug.analysis.metric_base import Likelihoods
from personaplug.analysis.point_estimates import ARGMAX, point_predictions
from personaplug.data.records import characters
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import DamagedFile
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.infra.progress import Progress
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.methods.copy_heads import CopyingPrompter
from personaplug.plug.personalizer import SoftPrompter
from personaplug.training.batching import micro_batches

logger = logging.getLogger(__name__)

_DIGITS = 6  # decimals of a probability: enough for point estimates, and equal in memory and in files
MAX_PASS_TOKENS = 1024  # answer tokens in one pass, padding included; each has a logit for every word of the vocabulary


@dataclass(frozen=True, repr=False)
class Predictions:
    """Predictions for n samples.

    Attributes:
        texts: (n,) the predicted answers.
        unfinished: (n,) whether each text was cut at the length limit.
        seconds: the time that the predictions took.
        peak_memory_bytes: the peak memory during the predictions.
        probabilities: (n, C) of the task's labels; None if no labels were scored.
        nll: (n,) −log p of each reference answer and its number of tokens (a label counts as one), then, if texts were
            written, of each rejected answer; None if unknown.
        divergence: (n,) the sum of KL(plain ‖ row) over the tokens of the plain model's answer, and their number; None
            if unknown.
        fit_seconds: the time of fitting, for a row that the evaluation fits.
    """

    texts: list[str]
    unfinished: list[bool]
    seconds: float
    peak_memory_bytes: int
    probabilities: list[list[float]] | None = None
    nll: list[list[float]] | None = None
    divergence: list[list[float]] | None = None
    fit_seconds: float | None = None

    def likelihoods(self) -> Likelihoods | None:
        """Return `nll` in the form that metrics need; None if unknown."""
        return _with_infinities(self.nll)

    def divergences(self) -> Likelihoods | None:
        """Return `divergence` in the form that metrics need; None if unknown."""
        return _with_infinities(self.divergence)

    def estimates(self, estimate: str, *, labels: Sequence[str]) -> list[str]:
        """Return the labels that a point estimate chooses, or the texts if no labels were scored."""
        if estimate == ARGMAX or self.probabilities is None:
            return self.texts
        probabilities = np.array(self.probabilities, dtype=np.float64).reshape(len(self.texts), len(labels))
        return point_predictions(probabilities, labels, estimate=estimate)


@dataclass(frozen=True, repr=False)
class _Prediction:
    """One prediction; the attributes are those of `Predictions`."""

    text: str
    unfinished: bool = False
    probabilities: list[float] | None = None
    nll: list[float] | None = None


def predict_samples(
    llm: LanguageModel,
    samples: Sequence[EncodedSample],
    *,
    prompter: SoftPrompter | None,
    task: Task,
    decoding: str,
    generation: GenerationConfig,
    batch_size: int,
    title: str = "predict",
) -> Predictions:
    """Predict samples, and return the predictions in the samples' order.

    The longest prompts come first, so that memory runs out at once or never.

    Args:
        prompter: makes the soft tokens; None = the bare model.
        decoding: "score" takes the likeliest of the task's labels, "generate" writes text.
    """
    if prompter is not None and prompter.placement == "suffix" and (decoding == "score" or generation.num_beams == 1):
        # Most rows share their prompts, so the prompt cache is filled before the first row is timed.
        llm.cache_prompts([sample.prompt for sample in samples])
    elif decoding == "generate":
        llm.clear_cache()  # beam search does not use the prompt cache
    reset_peak_memory()
    started = time.monotonic()
    predictions: dict[int, _Prediction] = {}
    for indices in prompt_batches(samples, batch_size=batch_size, title=title):
        batch = [samples[index] for index in indices]
        outputs = _predict_batch(llm, batch, prompter, task=task, decoding=decoding, generation=generation)
        predictions.update(zip(indices, outputs, strict=True))
    seconds = time.monotonic() - started
    in_order = [predictions[index] for index in range(len(samples))]
    return Predictions(
        [prediction.text for prediction in in_order],
        [prediction.unfinished for prediction in in_order],
        seconds,
        peak_memory(),
        probabilities=all_or_none([prediction.probabilities for prediction in in_order]),
        nll=all_or_none([prediction.nll for prediction in in_order]),
    )


@torch.no_grad()
def reference_nll(
    llm: LanguageModel,
    samples: Sequence[EncodedSample],
    *,
    prompter: SoftPrompter | None,
    batch_size: int,
    title: str = "likelihood",
) -> list[list[float]]:
    """Return −log p and tokens of each reference answer, end of text included, then of each rejected one.

    Args:
        samples: with targets.
        prompter: makes the soft tokens; None = the bare model.
        batch_size: maximum number of answers in a pass; long answers reduce it.
    """
    pairs = [(sample, answer) for sample in samples for answer in (sample.target or "", *sample.rejected)]
    measured = iter(_answer_nll(llm, pairs, prompter=prompter, batch_size=batch_size, title=title))
    return [[value for pair in islice(measured, 1 + len(sample.rejected)) for value in pair] for sample in samples]


def _answer_nll(
    llm: LanguageModel,
    pairs: Sequence[tuple[EncodedSample, str]],
    *,
    prompter: SoftPrompter | None,
    batch_size: int,
    title: str,
) -> list[list[float]]:
    """Return −log p and tokens of answers to samples, in their order."""
    nll: dict[int, list[float]] = {}
    lengths = [*map(len, llm.prompt_tokenizer.encode_targets([answer for _, answer in pairs]))]
    for indices in answer_batches(lengths, batch_size=batch_size, title=title):
        samples, answers = zip(*(pairs[index] for index in indices), strict=True)
        losses, tokens = llm.loss(prompt_batch(samples, prompter), answers)
        values = zip(losses.tolist(), tokens.tolist(), strict=True)
        nll.update(zip(indices, ([round(loss, 6), count] for loss, count in values), strict=True))
    return [nll[index] for index in range(len(pairs))]


def prompt_batches(samples: Sequence[EncodedSample], *, batch_size: int, title: str) -> Iterator[list[int]]:
    """Yield the indices of samples in batches, longest prompts first, and report the progress."""
    order = np.argsort([-characters(sample.prompt) for sample in samples], kind="stable")
    with Progress(title, total=len(samples), unit="answers") as progress:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size].tolist()
            yield indices
            progress.advance(len(indices))


def answer_batches(lengths: Sequence[int], *, batch_size: int, title: str) -> Iterator[list[int]]:
    """Yield the indices of answers of these lengths in batches for one pass, and report the progress."""
    with Progress(title, total=len(lengths), unit="answers") as progress:
        for part in micro_batches(range(len(lengths)), lengths=lengths, max_tokens=MAX_PASS_TOKENS):
            for start in range(0, len(part), batch_size):
                indices = part[start : start + batch_size]
                yield indices
                progress.advance(len(indices))


def _with_infinities(rows: list[list[float]] | None) -> Likelihoods | None:
    """Replace None by infinity: files have null instead, because JSON has no infinity."""
    return None if rows is None else [[math.inf if value is None else value for value in row] for row in rows]


def all_or_none(rows: Sequence[list[float] | None]) -> list[list[float]] | None:
    """Return the rows, or None if one of them is unknown."""
    values = [row for row in rows if row is not None]
    return values if len(values) == len(rows) else None


def joined(parts: Sequence[tuple[list[int], Predictions]], count: int) -> Predictions:
    """Join predictions of groups of samples in the samples' order.

    Args:
        parts: the samples' indices and their predictions, group by group.
        count: number of samples.
    """
    texts, unfinished = [""] * count, [False] * count
    probabilities: list[list[float] | None] = [None] * count
    nll: list[list[float] | None] = [None] * count
    for indices, part in parts:
        for position, index in enumerate(indices):
            texts[index], unfinished[index] = part.texts[position], part.unfinished[position]
            probabilities[index] = None if part.probabilities is None else part.probabilities[position]
            nll[index] = None if part.nll is None else part.nll[position]
    return Predictions(
        texts,
        unfinished,
        sum(part.seconds for _, part in parts),
        max(part.peak_memory_bytes for _, part in parts),
        probabilities=all_or_none(probabilities),
        nll=all_or_none(nll),
    )


def save_predictions(predictions: Predictions, path: Path, *, key: Sequence[Any]) -> None:
    """Write predictions, with a hash of everything that they depend on."""
    save_values(asdict(predictions), path, key=key)


def load_predictions(path: Path, *, key: Sequence[Any]) -> Predictions | None:
    """Return the predictions of a file if everything that they depend on is the same; None otherwise."""
    values = load_values(path, key=key)
    try:
        return None if values is None else Predictions(**values)
    except TypeError as error:
        logger.warning("%s", error)
        return None


def save_values(values: Mapping[str, Any], path: Path, *, key: Sequence[Any]) -> None:
    """Write values as JSON, with a hash of everything that they depend on."""
    write_checked_json(path, {"key": _hash(key), **values})


def load_values(path: Path, *, key: Sequence[Any]) -> dict[str, Any] | None:
    """Return the values of a file if everything that they depend on is the same; None otherwise."""
    if not path.exists():
        return None
    try:
        values = read_json(path, remedy="The samples are predicted again.")
    except DamagedFile as error:
        logger.warning("%s", error)
        return None
    return values if values.pop("key", None) == _hash(key) else None


def _predict_batch(
    llm: LanguageModel,
    batch: Sequence[EncodedSample],
    prompter: SoftPrompter | None,
    *,
    task: Task,
    decoding: str,
    generation: GenerationConfig,
) -> list[_Prediction]:
    with torch.no_grad():
        if decoding == "score":
            scores = llm.score(prompt_batch(batch, prompter), task.labels)
            best_ids = scores.argmax(dim=1).tolist()
            rows = zip(best_ids, _probabilities(scores), _label_nll(scores, batch, task), strict=True)
            return [_Prediction(task.labels[best], probabilities=probs, nll=nll) for best, probs, nll in rows]
        outputs = llm.generate(prompt_batch(batch, prompter), generation)
        return [_Prediction(output.text, unfinished=not output.finished) for output in outputs]


def prompt_batch(samples: Sequence[EncodedSample], prompter: SoftPrompter | None) -> PromptBatch:
    """Return the samples' prompts with their soft tokens and, if the prompter has one, a copy head."""
    return PromptBatch(
        [sample.prompt for sample in samples],
        soft=None if prompter is None else prompter.soft_prompt(samples),
        soft_at=[sample.soft_at for sample in samples],
        copying=prompter.copying(samples) if isinstance(prompter, CopyingPrompter) else None,
    )


def _probabilities(scores: torch.Tensor) -> list[list[float]]:
    """Turn log-probabilities of the labels, (B, C), into rounded probabilities that sum to 1."""
    probabilities = torch.softmax(scores.cpu().double(), dim=1)
    # Scores that overflowed only tell which label is predicted, so it gets all probability.
    one_hot = torch.nn.functional.one_hot(scores.cpu().argmax(dim=1), num_classes=scores.shape[1]).double()
    rows: list[list[float]] = torch.where(probabilities.isfinite(), probabilities, one_hot).tolist()
    return [[round(probability, _DIGITS) for probability in row] for row in rows]


def _label_nll(scores: torch.Tensor, samples: Sequence[EncodedSample], task: Task) -> list[list[float] | None]:
    """Return −log p of each sample's label among the labels, and 1 for its token; None for a hidden label."""
    nll = -torch.log_softmax(scores.cpu().double(), dim=1)
    # A score that overflowed cannot rank labels, so its label counts as impossible.
    nll = nll.nan_to_num(nan=math.inf)
    ids = {label.strip(): index for index, label in enumerate(task.labels)}
    label_ids = [None if sample.target is None else ids.get(sample.target.strip()) for sample in samples]
    return [
        None if label_id is None else [round(float(row[label_id]), _DIGITS), 1]
        for row, label_id in zip(nll, label_ids, strict=True)
    ]


def _hash(key: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(key), sort_keys=True).encode()).hexdigest()
