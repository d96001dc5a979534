"""PersonalLLM (arXiv 2409.20296): simulated users choose between responses to the same request.

The files are `data/train-….parquet` and `data/test-….parquet` of the hub's namkoong-lab/PersonalLLM. A row holds
`prompt_id`, `prompt`, `response_1` to `response_8`, and the scores of ten reward models for each response
(`response_1_gemma_2b` …). The simulation and the constants are from `gen_pref_interaction_database.py` and
`constants.py` of the repository namkoong-lab/PersonalLLM.

The files name no users. As in the paper, a user is a weight for each reward model, drawn from a symmetric Dirichlet
distribution. A user prefers the response with the greatest weighted sum of standardized scores. The users are drawn
from a seed and are not the paper's 1,000 users. The split of the train file into train and dev is this project's. The
paper scores generated responses with the reward models; choosing among existing responses needs no reward model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from personaplug.data.benchmarks.base import SPLITS, check_split, published_records, split_files
from personaplug.data.parsing import as_number, id_of, name_of, text_of, value_of
from personaplug.data.record_reader import Limits, RecordReader
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError

REWARD_MODELS: Mapping[str, tuple[float, float]] = {
    "beaver_7b": (6.233516894340515, 3.012641148973965),
    "gemma_2b": (4.3304170169830325, 2.038611338958803),
    "gemma_7b": (1.6259730467796325, 2.6096741570264976),
    "llama3_sfairx": (1.0637639780044557, 2.953017385451928),
    "mistral_raft": (8.309211883544922, 3.0728436748484533),
    "mistral_ray": (3.0136284782886507, 1.6902981149232585),
    "mistral_weqweasdas": (7.071075622558594, 2.578636650248985),
    "oasst_deberta_v3": (2.8976835689097644, 1.7207868789061331),
    "oasst_pythia_1b": (4.293944010734558, 2.3018268820938133),
    "oasst_pythia_7b": (4.706351243972779, 1.3659142113789966),
}
"""The mean and the standard deviation of each reward model's scores."""

_RESPONSES = 8
_LETTERS = "ABCDEFGH"
_DEV_STEP = 10  # every tenth row of the train file belongs to dev
_MARKER = "\nrequest: "
_INSTRUCTION = "Which response to the request does this user prefer? Answer with its letter alone."


@dataclass(frozen=True)
class SimulatedUsers:
    """The settings of the simulated users.

    Attributes:
        count: the number of users; it does not change the individual users.
        alpha: the Dirichlet parameter; the smaller, the more a user follows one reward model.
        shortest: the minimum number of choices before the first query; `longest` is the maximum.
        choices: how many of the eight responses are offered, in random order.
    """

    count: int = 1000
    alpha: float = 0.01
    seed: int = 0
    shortest: int = 25
    longest: int = 49
    queries_per_user: int = 4
    choices: int = _RESPONSES

    def __post_init__(self) -> None:
        if min(self.count, self.queries_per_user) < 1 or self.seed < 0 or not 0 < self.alpha < math.inf:
            raise ConfigError("count and queries_per_user should be at least 1, alpha above 0, seed 0 or more.")
        if not 0 <= self.shortest <= self.longest:
            raise ConfigError(
                f"Expected 0 <= shortest <= longest, found shortest={self.shortest}, longest={self.longest}."
            )
        if not 2 <= self.choices <= _RESPONSES:
            raise ConfigError(f"choices should be from 2 to {_RESPONSES}, found {self.choices}.")


class PersonalLLMReader(RecordReader):
    """One split of simulated choices. All rows are held in memory.

    `train` and `dev` come from the train file. Every tenth row is only for queries of dev; the other rows are for the
    histories and for queries of train. The queries of `test` come from the test file. A user has one query in dev and
    one in test, after all choices in train. A history contains requests with the preferred response, in the order of
    the choices.
    """

    def __init__(
        self, path: str | Path, split: str, *, users: SimulatedUsers | None = None, **limits: Unpack[Limits]
    ) -> None:
        """Find the files in a folder; for train and dev, the path may also be the train file itself."""
        if check_split(split) == "test" and Path(path).is_file():
            raise ConfigError(f"{path} is one file; the split 'test' needs the folder with the train and test files.")
        self._split, self._users = split, users or SimulatedUsers()
        self._train, self._test = split_files(path, "train"), split_files(path, "test") if split == "test" else ()
        # The preferred response is not the answer_field: it is not a label, and the encoder reads it with the request.
        task = Task(
            "PersonalLLM", "label", ("request", "response"), None, ("accuracy",),
            labels=tuple(_LETTERS[: self._users.choices]), query_after=_MARKER, max_new_tokens=4,
        )  # fmt: skip
        super().__init__(task, origin=self._train[0], **limits)

    def _samples(self) -> Iterator[Sample]:
        rows = self._rows(self._train)
        train = [row for number, row in enumerate(rows, 1) if number % _DEV_STEP]
        queries = rows[_DEV_STEP - 1 :: _DEV_STEP] if self._split == "dev" else self._rows(self._test)
        choices = self._users.longest + self._users.queries_per_user
        if len(train) < choices or (self._split != "train" and not queries):
            raise ConfigError(
                f"{self._train[0]}: a user makes up to {choices} choices, but there are {len(train)} rows and "
                f"{len(queries)} rows for the queries of {self._split}. Set a smaller `longest` in `users`."
            )
        for user in range(self._users.count):
            yield from self._samples_of(user, train, queries)

    def _rows(self, files: Sequence[Path]) -> list[_Row]:
        return list(self._parsed(published_records(files), parse_id=_row_id, parse=_row))

    def _samples_of(self, user: int, train: Sequence[_Row], queries: Sequence[_Row]) -> Iterator[Sample]:
        settings = self._users
        rng = np.random.default_rng([settings.seed, user])
        weights = rng.dirichlet([settings.alpha] * len(REWARD_MODELS))
        count = int(rng.integers(settings.shortest, settings.longest + 1)) + settings.queries_per_user
        indices = rng.choice(len(train), size=count, replace=False)
        past = [_choose(train[index], weights, choices=settings.choices, rng=rng) for index in indices]
        if self._split == "train":
            for index in range(count - settings.queries_per_user, count):
                yield self._sample(user, past[index], past[:index])
        else:
            # A separate stream, so that dev and test have the same past as train.
            rng = np.random.default_rng([settings.seed, user, list(SPLITS).index(self._split)])
            query = queries[int(rng.integers(len(queries)))]
            yield self._sample(user, _choose(query, weights, choices=settings.choices, rng=rng), past)

    def _sample(self, user: int, query: _Choice, past: Sequence[_Choice]) -> Sample:
        name, items = f"user-{user}", [(None, choice.item) for choice in past]
        return self._sample_of(f"{name}/{query.item.id}", name, query.prompt, target=query.letter, items=items)


@dataclass(frozen=True, slots=True, repr=False)
class _Row:
    """A request with its responses and their standardized scores, (responses, reward models)."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    scores: NDArray[np.float64]


@dataclass(frozen=True, slots=True, repr=False)
class _Choice:
    """A user's choice as a history item, and the prompt that offers the responses with the preferred one's letter."""

    item: HistoryItem
    prompt: str
    letter: str


def _choose(row: _Row, weights: NDArray[np.float64], *, choices: int, rng: np.random.Generator) -> _Choice:
    """Offer responses in random order and let a user choose."""
    offered = rng.permutation(_RESPONSES)[:choices]
    preferred = int(np.argmax(row.scores[offered] @ weights))
    item = HistoryItem(row.id, (("request", row.prompt), ("response", row.responses[offered[preferred]])))
    options = (f"{letter}: {row.responses[index]}" for letter, index in zip(_LETTERS, offered, strict=False))
    return _Choice(item, "\n\n".join((f"{_INSTRUCTION}{_MARKER}{row.prompt}", *options)), _LETTERS[preferred])


def _row_id(record: Mapping[str, Any], number: int) -> str:
    return id_of(record, "prompt_id") if "prompt_id" in record else f"row-{number}"


def _row(record: Mapping[str, Any], row_id: str) -> _Row:
    names = [f"response_{number}" for number in range(1, _RESPONSES + 1)]
    prompt = name_of(record, "prompt")
    responses = tuple(text_of(record, name) for name in names)
    raw = [[_score(record, f"{name}_{model}") for model in REWARD_MODELS] for name in names]
    means, deviations = np.array(list(REWARD_MODELS.values())).T
    return _Row(row_id, prompt, responses, (np.array(raw) - means) / deviations)


def _score(record: Mapping[str, Any], key: str) -> float:
    return as_number(value_of(record, key), f"its {key!r}")
