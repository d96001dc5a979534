"""Synthetic training samples: the frozen model writes new inputs, then answers each as a real user would.

A synthetic sample has the history of a real one, drawn with replacement. The examples for its answer come from that
history, so the answer depends on it. The idea and the filters come from SELF-GUIDE, arXiv 2407.12874.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from personaplug.analysis.synthetic_filters import (
    FilterReport,
    RealTexts,
    UsualRange,
    balanced,
    lowest_usual_cosine,
    nearest_cosines,
    with_shares,
    words_key,
)
from personaplug.data.records import Sample, characters
from personaplug.data.synthetic_prompts import (
    Example,
    Reply,
    Request,
    answer_request,
    example_of,
    input_of,
    input_request,
    read_answer,
    read_input,
    with_query,
)
from personaplug.data.task import Task
from personaplug.errors import ConfigError
from personaplug.infra.progress import Progress
from personaplug.llm.base import Generation, GenerationConfig, PromptBatch
from personaplug.run import Models

MIN_EXAMPLES, MAX_EXAMPLES = 3, 8

_BATCH_SIZE = 8
_MAX_CHECKED_INPUTS = 100  # real inputs on which `check_labels` measures the model
_EXTRA_TOKENS = 16  # room for a number, a name and an end beyond the longest usual text
_INPUT_TEMPERATURE, _ANSWER_TEMPERATURE, _TOP_P = 0.8, 0.5, 0.95

Probabilities = npt.NDArray[np.float64]
ExampleT = TypeVar("ExampleT")


@dataclass(frozen=True)
class SynthesisConfig:
    """How many inputs the model writes, and how many examples it sees for each."""

    samples: int = 100
    examples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or self.seed < 0:
            raise ConfigError(f"samples and seed should be 0 or more; found {self.samples} and {self.seed}.")
        if not MIN_EXAMPLES <= self.examples <= MAX_EXAMPLES:
            raise ConfigError(f"examples should be from {MIN_EXAMPLES} to {MAX_EXAMPLES}; found {self.examples}.")


@dataclass(frozen=True, repr=False)
class _Draft:
    """An unfinished synthetic sample; its user, history and wording are those of the real sample `donor`."""

    donor: Sample
    request: Request | None
    text: str = ""
    prompt: str = ""
    answer: str = ""
    is_whole: bool = False


class Synthesizer:
    """Writes synthetic samples for the real samples of a training split; the seed determines all draws."""

    def __init__(self, real: Sequence[Sample], *, task: Task, models: Models, config: SynthesisConfig) -> None:
        self.real, self.task, self.models, self.config = real, task, models, config
        self.report = FilterReport()
        self._rng = np.random.default_rng([config.seed, 21])
        self._pairs = [Example(sample.query, sample.target) for sample in real if sample.target is not None]
        self._check()
        queries = list({words_key(sample.query): sample.query for sample in real}.values())
        self._vectors = models.encoder.encode(queries)
        self._real_texts = RealTexts([*queries, *(input_of(item) for sample in real for item in sample.history)])
        self._input_lengths = UsualRange.of([len(query) for query in queries])
        self._has_lines = any("\n" in query for query in queries)
        self._input_sampling = self._sampling(queries, _INPUT_TEMPERATURE)
        self._answer_sampling = self._sampling(self._targets, _ANSWER_TEMPERATURE)
        self._shares = {label: n / len(real) for label, n in Counter(self._targets).items()}

    @property
    def _targets(self) -> list[str]:
        return [pair.answer for pair in self._pairs]

    def write(self) -> list[Sample]:
        """Return the samples that pass all filters; `report` then counts the samples that each filter left out."""
        drafts = self._filter_inputs(self._with_inputs(self._drafts()))
        drafts = self._filter_answers(self._with_answers(drafts))
        taken = {sample.id for sample in self.real}
        names = (name for number in count(1) if (name := f"synthetic-{number}") not in taken)
        return [
            Sample(next(names), draft.donor.user_id, draft.prompt, draft.text, draft.answer, draft.donor.history)
            for draft in drafts
        ]

    def check_labels(self) -> str:
        """Let the model label real inputs by the same requests; return a line on how probable the right label is."""
        chosen = [self.real[index] for index in self._rng.permutation(len(self.real))[:_MAX_CHECKED_INPUTS]]
        drafts = [replace(draft, request=self._answer_request(draft)) for draft in map(_draft_of, chosen)]
        drafts = [draft for draft in drafts if draft.request is not None]
        label_ids = [self.task.labels.index(draft.donor.target or "") for draft in drafts]
        mean = self._label_probabilities(drafts)[range(len(drafts)), label_ids].mean() if drafts else 0.0
        chance = sum(share**2 for share in self._shares.values())
        return f"probability of the right label for {len(drafts):,} real inputs: {mean:.0%} (chance: {chance:.0%})"

    def _check(self) -> None:
        if missing := len(self.real) - len(self._pairs):
            raise ConfigError(
                f"Every train sample needs an answer, because answers are examples for the model; {missing} of "
                f"{len(self.real)} have none."
            )
        different = len({words_key(sample.query) for sample in self.real})
        if different <= self.config.examples:
            raise ConfigError(
                f"examples={self.config.examples} needs more than {self.config.examples} real samples with different "
                f"inputs; found {different}. Give more real samples, or lower examples."
            )
        if not all(with_query(self.task, sample, sample.query) for sample in self.real):
            raise ConfigError(
                f"Synthetic samples need a query that is one piece of the prompt; a query of task {self.task.name} has "
                f"several pieces, such as options. Add real samples instead."
            )

    def _sampling(self, texts: Sequence[str], temperature: float) -> GenerationConfig:
        """Return sampling settings that leave room for the longest text of a usual length."""
        max_tokens = math.ceil(UsualRange.of(self.models.llm.count_tokens(texts)).high) + _EXTRA_TOKENS
        return GenerationConfig(max_tokens, do_sample=True, temperature=temperature, top_p=_TOP_P)

    # Generation.

    def _drafts(self) -> list[_Draft]:
        donors = [self.real[index] for index in self._rng.integers(len(self.real), size=self.config.samples)]
        self.report.written = len(donors)
        requests = (self._fitting(self._input_examples(donor), input_request) for donor in donors)
        return [_Draft(donor, request) for donor, request in zip(donors, requests, strict=True)]

    def _with_inputs(self, drafts: list[_Draft]) -> list[_Draft]:
        """Return the drafts with the inputs that the model writes."""
        drafts = self._keep(drafts, "examples too long for a prompt", lambda draft: draft.request is not None)
        replies = self._replies(drafts, self._input_sampling, title="inputs", read=self._read_input)
        with_inputs = []
        for draft, reply in zip(drafts, replies, strict=True):
            prompt = with_query(self.task, draft.donor, reply.text) or ""
            with_inputs.append(replace(draft, text=reply.text, prompt=prompt, is_whole=reply.is_whole))
        return with_inputs

    def _with_answers(self, drafts: list[_Draft]) -> list[_Draft]:
        """Return the drafts with answers: a label drawn by its likelihood, or a text that the model writes."""
        drafts = [replace(draft, request=self._answer_request(draft)) for draft in drafts]
        drafts = self._keep(drafts, "input and answers too long for a prompt", lambda draft: draft.request is not None)
        if self.task.labels:
            labels = self._drawn_labels(drafts)
            return [replace(draft, answer=label) for draft, label in zip(drafts, labels, strict=True)]
        replies = self._replies(drafts, self._answer_sampling, title="answers", read=_read_answer)
        return [
            replace(draft, answer=reply.text, is_whole=reply.is_whole)
            for draft, reply in zip(drafts, replies, strict=True)
        ]

    def _drawn_labels(self, drafts: Sequence[_Draft]) -> list[str]:
        """Draw a label for each draft."""
        labels = self.task.labels
        return [labels[self._rng.choice(len(labels), p=row)] for row in self._label_probabilities(drafts)]

    def _label_probabilities(self, drafts: Sequence[_Draft]) -> Probabilities:
        """Return the model's label probabilities, (n, C), corrected so that each label gets its real share.

        Without the correction, a small model prefers one label for any input.
        """
        requests, labels = _requests_of(drafts), self.task.labels
        scores = np.zeros((len(requests), len(labels)))
        for indices in _batches(requests, title="answers"):
            batch = PromptBatch([requests[index].prompt for index in indices])
            scores[indices] = self.models.llm.score(batch, labels).double().cpu().numpy()
        return with_shares(scores / _ANSWER_TEMPERATURE, [self._shares.get(label, 0.0) for label in labels])

    def _read_input(self, request: Request, generation: Generation) -> Reply:
        reply = read_input(generation.text, finished=generation.finished)
        return reply if self._has_lines else replace(reply, text=" ".join(reply.text.split()))

    def _input_examples(self, donor: Sample) -> list[str]:
        """Return example inputs: the user's own if answers are free text, else those of all users."""
        pairs = self._own_pairs(donor) if not self.task.labels else []
        return [pair.input for pair in self._drawn(pairs)]

    def _own_pairs(self, donor: Sample) -> list[Example]:
        return [pair for item in donor.history if (pair := example_of(item))]

    def _drawn(self, own: Sequence[Example], *, excluded_input: str = "") -> list[Example]:
        """Draw the examples of one request: others' examples first, as far as needed, then the user's own.

        Others' examples never have the excluded input.
        """
        limit = self.config.examples
        chosen = [own[index] for index in self._rng.permutation(len(own))[:limit]]
        used_keys = {words_key(excluded_input), *(words_key(pair.input) for pair in chosen)}
        for index in self._rng.permutation(len(self._pairs)):
            if len(chosen) == limit:
                break
            if (key := words_key(self._pairs[index].input)) not in used_keys:
                used_keys.add(key)
                chosen.insert(0, self._pairs[index])
        return chosen

    def _answer_request(self, draft: _Draft) -> Request | None:
        donor = draft.donor
        opening = donor.prompt.rpartition(donor.query)[0]
        preferences = [input_of(item) for item in donor.history if item.kind == "preference"]
        return self._fitting(
            self._drawn(self._own_pairs(donor), excluded_input=draft.text),
            lambda pairs: answer_request(draft.text, pairs, opening=opening, preferences=preferences),
        )

    def _fitting(
        self, examples: Sequence[ExampleT], request: Callable[[Sequence[ExampleT]], Request]
    ) -> Request | None:
        """Return a request with the longest end of the examples that fits the model; None if no example fits."""
        llm = self.models.llm
        requests = (request(examples[start:]) for start in range(len(examples)))
        return next((r for r in requests if llm.count_prompt_tokens(r.prompt) <= llm.max_text_tokens), None)

    def _replies(
        self,
        drafts: Sequence[_Draft],
        sampling: GenerationConfig,
        *,
        title: str,
        read: Callable[[Request, Generation], Reply],
    ) -> list[Reply]:
        """Let the model reply to each draft's request, the longest first; return the parsed replies in order."""
        requests = _requests_of(drafts)
        replies: dict[int, Reply] = {}
        for indices in _batches(requests, title=title):
            batch = PromptBatch([requests[index].prompt for index in indices])
            seeded = replace(sampling, seed=int(self._rng.integers(2**31)))
            for index, generation in zip(indices, self.models.llm.generate(batch, seeded), strict=True):
                replies[index] = read(requests[index], generation)
        return [replies[index] for index in range(len(requests))]

    # Filters.

    def _filter_inputs(self, drafts: list[_Draft]) -> list[_Draft]:
        real, lengths, keep = self._real_texts, self._input_lengths, self._keep
        drafts = keep(drafts, "inputs that are empty or cut", lambda draft: bool(draft.text) and draft.is_whole)
        drafts = keep(drafts, "inputs that do not fit the task's prompt", lambda draft: bool(draft.prompt))
        drafts = keep(drafts, "inputs of an unusual length", lambda draft: lengths.holds(len(draft.text)))
        drafts = keep(drafts, "inputs that repeat a real one", lambda draft: not real.has(draft.text))
        drafts = keep(drafts, "inputs that repeat each other", _is_first())
        drafts = keep(drafts, "near copies of a real input", lambda draft: not real.has_near_copy(draft.text))
        return self._keep_listed(drafts, "inputs unlike all real ones", self._like_real_ones(drafts))

    def _filter_answers(self, drafts: list[_Draft]) -> list[_Draft]:
        if self.task.labels:
            indices = balanced([draft.answer for draft in drafts], self._shares)
            return self._keep_listed(drafts, "answers beyond their label's share", indices)
        lengths, keep = UsualRange.of(list(map(len, self._targets))), self._keep
        drafts = keep(drafts, "answers that are empty or cut", lambda draft: bool(draft.answer) and draft.is_whole)
        return keep(drafts, "answers of an unusual length", lambda draft: lengths.holds(len(draft.answer)))

    def _like_real_ones(self, drafts: Sequence[_Draft]) -> Iterator[int]:
        if drafts:
            lowest = lowest_usual_cosine(self._vectors)
            vectors = self.models.encoder.encode([draft.text for draft in drafts])
            cosines = nearest_cosines(vectors, self._vectors)
            yield from (index for index, cosine in enumerate(cosines) if cosine >= lowest)

    def _keep(self, drafts: list[_Draft], reason: str, passes: Callable[[_Draft], bool]) -> list[_Draft]:
        return self._keep_listed(drafts, reason, [index for index, draft in enumerate(drafts) if passes(draft)])

    def _keep_listed(self, drafts: list[_Draft], reason: str, indices: Sequence[int] | Iterator[int]) -> list[_Draft]:
        """Keep the drafts at these indices, and count the others under the filter's name."""
        passed = [drafts[index] for index in indices]
        self.report.left_out[reason] += len(drafts) - len(passed)
        return passed


def _draft_of(sample: Sample) -> _Draft:
    return _Draft(sample, None, text=sample.query)


def _is_first() -> Callable[[_Draft], bool]:
    """Return a predicate that is true for the first of all drafts with the same words."""
    seen: set[str] = set()

    def passes(draft: _Draft) -> bool:
        before = len(seen)
        seen.add(words_key(draft.text))
        return len(seen) > before

    return passes


def _read_answer(request: Request, generation: Generation) -> Reply:
    return read_answer(generation.text, number=request.number, finished=generation.finished)


def _requests_of(drafts: Sequence[_Draft]) -> list[Request]:
    return [draft.request for draft in drafts if draft.request is not None]


def _batches(requests: Sequence[Request], *, title: str) -> Iterator[list[int]]:
    """Yield the indices of requests in batches, longest first, and report the progress."""
    order = sorted(range(len(requests)), key=lambda index: (-characters(requests[index].prompt), index))
    with Progress(title, total=len(order), unit=title) as progress:
        for start in range(0, len(order), _BATCH_SIZE):
            yield order[start : start + _BATCH_SIZE]
            progress.advance(len(order[start : start + _BATCH_SIZE]))
