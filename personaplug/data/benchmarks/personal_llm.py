"""PersonalLLM (arXiv 2409.20296), read: simulated users, each choosing between responses to the same request.

The published files are `data/train-….parquet` and `data/test-….parquet` of the hub's namkoong-lab/PersonalLLM: a row
holds `prompt_id`, `prompt`, `response_1` to `response_8`, and for each response the scores of ten reward models,
`response_1_gemma_2b` and so on. Columns were read in code that uses them; the simulation, the names of the reward
models and their scores' means and deviations in `gen_pref_interaction_database.py` and `constants.py` of the
repository namkoong-lab/PersonalLLM.

The file names no users. As in the paper, one is a weight for each reward model, drawn from a symmetric Dirichlet
distribution, and prefers the response with the greatest weighted sum of standardized scores. The users are this
project's own, made from a seed, not the paper's thousand; so are the splits of the train file. The paper scores
generated responses with the reward models; choosing among given ones needs no reward model at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplug.data.benchmarks.base import SPLITS, check_split, published_records, split_files
from personaplug.data.parsing import Flaw, as_name, as_text, query_of, short_id, value_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import ReadReport, Task, check_max_history, check_skip_bad, latest_items
from personaplug.errors import ConfigError, RecordError

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
"""The reward models with the mean and the deviation of their scores, by which scores are standardized."""

_RESPONSES = 8
_LETTERS = "ABCDEFGH"
_HELD_OUT = 10


@dataclass(frozen=True)
class SimulatedUsers:
    """Who chooses, and how often.

    Attributes:
        count: how many users there are; a user is the same however many others there are.
        alpha: the Dirichlet distribution's parameter; the smaller, the more a user follows one reward model.
        seed: what the users, their requests and the order of responses are drawn from.
        shortest: the fewest choices that a user has made before the first query.
        longest: the most.
        queries_per_user: how many samples of a user train holds.
        choices: how many of the eight responses are on offer each time, in random order.
    """

    count: int = 1000
    alpha: float = 0.01
    seed: int = 0
    shortest: int = 25
    longest: int = 49
    queries_per_user: int = 4
    choices: int = _RESPONSES

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: if one is out of range.
        """
        if min(self.count, self.queries_per_user) < 1 or self.seed < 0 or not 0 < self.alpha < math.inf:
            raise ConfigError("count and queries_per_user should be at least 1, alpha over 0, seed 0 or more.")
        if not 0 <= self.shortest <= self.longest:
            raise ConfigError(f"Choices before the first query: 0 <= shortest <= longest, found {self}.")
        if not 2 <= self.choices <= _RESPONSES:
            raise ConfigError(f"choices should be from 2 to {_RESPONSES}, found {self.choices}.")


class PersonalLLMReader:
    """One split of simulated choices.

    `train` and `dev` are made of the train file: every tenth row is a request of dev alone, all others make the
    histories and train's queries, so nobody's train holds a request of dev. `test` asks for the test file's rows. The
    users are the same in all splits; a user has one query in dev and in test, after all that train holds of that
    user. A history holds requests with the preferred response, in the order of the user's choices. All rows are held
    in memory.

    Attributes:
        task: "label": the letter of the preferred response.
        report: what the last (or current) pass met.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        users: SimulatedUsers | None = None,
        skip_bad: int = 0,
        max_history: int = 512,
    ) -> None:
        """Find the files; nothing is read yet.

        Args:
            path: the folder with both files; for train and dev also the train file.
            split: "train", "dev" or "test".
            users: who chooses; None for SimulatedUsers().
            skip_bad: how many broken rows may be passed over.
            max_history: how many of the latest items of a history are kept.

        Raises:
            MissingData, MissingExtra, ConfigError: as `split_files`.
            ConfigError: if test is asked for without a folder, or a setting is out of range.
        """
        if check_split(split) == "test" and Path(path).is_file():
            raise ConfigError(
                f"{path} is one file; the split 'test' needs the folder with the files of train and test."
            )
        self._split, self._users = split, users or SimulatedUsers()
        self._train = split_files(path, "train")
        self._test = split_files(path, "test") if split == "test" else ()
        self._skip_bad, self._max_history = check_skip_bad(skip_bad), check_max_history(max_history)
        labels = tuple(_LETTERS[: self._users.choices])
        # The preferred response is no answer_field: it is none of the labels, and is encoded as part of the item.
        self.task = Task(
            "PersonalLLM", "label", ("request", "response"), None, ("accuracy",),
            labels=labels, query_after=_MARKER, max_new_tokens=4,
        )  # fmt: skip
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Read all rows, then yield the samples, user by user, a user's queries oldest first.

        Raises:
            RecordError: for the first broken row beyond `skip_bad`, and always where a file breaks off.
            ConfigError: if there are too few rows for a user's choices.
        """
        self.report = ReadReport()
        rows = self._rows(self._train)
        known = [row for place, row in enumerate(rows, 1) if place % _HELD_OUT]
        held_out = rows[_HELD_OUT - 1 :: _HELD_OUT] if self._split == "dev" else self._rows(self._test)
        needed = self._users.longest + self._users.queries_per_user
        if len(known) < needed or (self._split != "train" and not held_out):
            raise ConfigError(
                f"{self._train[0]}: a user chooses up to {needed} times, for which there are {len(known)} rows, and "
                f"{len(held_out)} for the queries of {self._split}. Ask for shorter histories by `users`."
            )
        for user in range(self._users.count):
            yield from self._samples(user, known, held_out)

    def _rows(self, files: Sequence[Path]) -> list[_Row]:
        rows: list[_Row] = []
        seen: set[str] = set()
        for number, (file, where, record) in enumerate(published_records(files), 1):
            try:
                if isinstance(record, Flaw):
                    raise record
                row_id = as_name(record["prompt_id"], "its 'prompt_id'") if "prompt_id" in record else f"row-{number}"
                where = f"{where} (id {short_id(row_id)})"
                if row_id in seen:
                    raise Flaw("its id is another row's too")
                seen.add(row_id)
                rows.append(_row(record, row_id))
            except Flaw as flaw:
                self.report.skip(RecordError(file, where, reason=str(flaw)), allowed=self._skip_bad)
        return rows

    def _samples(self, user: int, known: Sequence[_Row], held_out: Sequence[_Row]) -> Iterator[Sample]:
        settings = self._users
        rng = np.random.default_rng([settings.seed, user])
        weights = rng.dirichlet([settings.alpha] * len(REWARD_MODELS))
        count = int(rng.integers(settings.shortest, settings.longest + 1)) + settings.queries_per_user
        places = rng.choice(len(known), size=count, replace=False)
        past = [_Choice.made(known[place], weights, settings.choices, rng) for place in places]
        if self._split == "train":
            for place in range(count - settings.queries_per_user, count):
                yield self._sample(user, past[place], past[:place])
        else:
            # A stream of its own, so that dev and test leave the past as train has it.
            rng = np.random.default_rng([settings.seed, user, list(SPLITS).index(self._split)])
            asked = held_out[int(rng.integers(len(held_out)))]
            yield self._sample(user, _Choice.made(asked, weights, settings.choices, rng), past)

    def _sample(self, user: int, asked: _Choice, past: Sequence[_Choice]) -> Sample:
        options = "\n\n".join(f"{letter}: {text}" for letter, text in zip(_LETTERS, asked.offered, strict=False))
        prompt = f"{_INSTRUCTION}{_MARKER}{asked.row.prompt}\n\n{options}"
        items = [(None, choice.item) for choice in past]
        name = f"user-{user}"
        sample = Sample(
            id=f"{name}/{asked.row.id}",
            user_id=name,
            prompt=prompt,
            query=query_of(self.task, prompt),
            target=_LETTERS[asked.preferred],
            history=latest_items(items, max_history=self._max_history, report=self.report),
        )
        return self.report.add(sample)


_MARKER = "\nrequest: "
_INSTRUCTION = "Which response to the request does this user prefer? Answer with its letter alone."


@dataclass(frozen=True, slots=True, repr=False)
class _Row:
    """A request with its responses and their standardized scores, (responses, reward models)."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    scores: NDArray[np.float64]


@dataclass(frozen=True, slots=True, repr=False)
class _Choice:
    """What a user was offered, in the order shown, and which of it the user prefers."""

    row: _Row
    offered: tuple[str, ...]
    preferred: int

    @classmethod
    def made(cls, row: _Row, weights: NDArray[np.float64], choices: int, rng: np.random.Generator) -> _Choice:
        """Offer some of a row's responses in random order, and let a user choose."""
        shown = rng.permutation(_RESPONSES)[:choices]
        preferred = int(np.argmax(row.scores[shown] @ weights))
        return cls(row, tuple(row.responses[place] for place in shown), preferred)

    @property
    def item(self) -> HistoryItem:
        """The choice as an item of a history."""
        return HistoryItem(self.row.id, (("request", self.row.prompt), ("response", self.offered[self.preferred])))


def _row(record: Mapping[str, Any], row_id: str) -> _Row:
    names = [f"response_{number}" for number in range(1, _RESPONSES + 1)]
    prompt = as_name(value_of(record, "prompt"), "its 'prompt'")
    responses = tuple(as_text(value_of(record, name), f"its {name!r}") for name in names)
    raw = [[_score(record, f"{name}_{model}") for model in REWARD_MODELS] for name in names]
    means, deviations = np.array(list(REWARD_MODELS.values())).T
    return _Row(row_id, prompt, responses, (np.array(raw) - means) / deviations)


def _score(record: Mapping[str, Any], key: str) -> float:
    value = value_of(record, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Flaw(f"its {key!r} is no finite number")
    return float(value)
