"""What soft tokens and answers give away, and how useful the personas are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression

from personaplug.data.records import last_message
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError
from personaplug.llm.base import GenerationConfig
from personaplug.methods.predictions import predict_samples
from personaplug.plug.personalizer import Personalizer
from privacy_audit.attacks import (
    Array,
    Estimate,
    Indices,
    auc,
    best_linker,
    best_ridge,
    explained,
    f1,
    frequent_words,
    hits_at,
    mean_over_users,
    over_users,
    ranking,
    unit,
    vocabulary,
    word_scores,
)
from privacy_audit.subjects import Option, Person, Subjects, Table, with_history_of, with_item, with_rows

HISTORIES = 1500  # sub-histories of strangers that decoders of soft tokens are trained on
NAMED_WORDS = 20
OTHER_ITEMS = 500  # of other users, that a user's own are ranked among
TRIALS = 2  # items of each user whose presence is guessed
NEIGHBORS = 3  # further prompts: the strangers' items nearest to the one in question
QUESTIONS = 3  # of each target, for the use of personas
BATCH = 64
OTHER_WORLDS = {"removed": "", "swapped": ", item swapped", "another removed": ", another item removed (control)"}

Figures = dict[str, dict[str, Estimate]]


class Personas:
    """The plug under one option: soft tokens, answers and their probabilities."""

    def __init__(self, subjects: Subjects, option: Option) -> None:
        self.subjects, self.option = subjects, option
        self.vectors = option.vectors(subjects.vectors, seed=subjects.seed)
        self.personalizer = Personalizer(subjects.plug, table=Table(self.vectors), persona_scale=option.persona_scale)

    @torch.no_grad()
    def soft_tokens(self, samples: Sequence[EncodedSample]) -> Array:
        """Return the persona tokens of samples, one row each; instruction tokens are the same for all."""
        shown = [self.option.history(sample) for sample in samples]
        first = self.subjects.plug.config.instruction_tokens
        parts = [
            self.personalizer.soft_prompt(shown[start : start + BATCH]).vectors[:, first:].flatten(1)
            for start in range(0, len(shown), BATCH)
        ]
        return torch.cat(parts).to(torch.bfloat16).double().numpy()  # vLLM gets them in bfloat16

    def probabilities(self, samples: Sequence[EncodedSample]) -> Array:
        """Return the probabilities of the labels, (n, C), to six digits."""
        predictions = predict_samples(
            self.subjects.models.llm,
            [self.option.history(sample) for sample in samples],
            prompter=self.personalizer,
            task=self.subjects.run.task,
            decoding="score",
            generation=GenerationConfig(),
            batch_size=BATCH,
        )
        assert predictions.probabilities is not None, "labels were scored"
        return np.array(predictions.probabilities, dtype=np.float64).clip(min=1e-6)


class SoftTokenAudit:
    """Attacks on the soft tokens of answers; the attacker has seen soft tokens of strangers and their histories."""

    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        self.random = np.random.default_rng([subjects.seed, 4])
        people = subjects.strangers
        self.owners = self.random.integers(len(people), size=HISTORIES)
        self.train = [self._part_of(people[owner].longest) for owner in self.owners]
        self.pairs = {
            name: self._pairs(group) for name, group in (("strangers", people), ("targets", subjects.targets))
        }
        pool = np.unique(np.concatenate([person.rows for person in subjects.targets]))
        self.others = self.random.permutation(pool)[:OTHER_ITEMS]
        self.other_people = self.random.permutation(len(subjects.targets))

    def measure(self, personas: Personas) -> Figures:
        """Run every attack on the soft tokens of one option."""
        train = personas.soft_tokens(self.train)
        same, other_prompt, first, second = (personas.soft_tokens(part) for part in self.pairs["targets"])
        target_samples = [personas.option.history(sample) for sample in self.pairs["targets"][0]]
        train_samples = [personas.option.history(sample) for sample in self.train]
        figures = self._who(personas, same, other_prompt, first, second)
        figures |= self._items(train, train_samples, same, target_samples)
        figures |= self._words(train, train_samples, same, target_samples)
        return figures | self._mean_label(train, train_samples, same, target_samples)

    def _who(self, personas: Personas, *tokens: Array) -> Figures:
        same, other_prompt, first, second = tokens
        people = np.arange(len(same))
        strangers = [personas.soft_tokens(part) for part in self.pairs["strangers"]]
        slice_ = self.subjects.slice_
        by_prompt = best_linker(strangers[0], strangers[1], slice_=slice_)
        by_items = best_linker(strangers[2], strangers[3], slice_=slice_)
        similar = by_items(first) @ by_items(second).T
        return {
            "user, same items, other prompt": ranking(by_prompt(same) @ by_prompt(other_prompt).T, people, people),
            "user, other items, other prompt": ranking(similar, people, people),
            "user, shuffled": ranking(similar, self.other_people, people),
        }

    def _items(
        self, train: Array, train_samples: list[EncodedSample], tokens: Array, samples: list[EncodedSample]
    ) -> Figures:
        """Rank a user's own items among those of others, by the mean vector that the soft tokens suggest."""
        known = unit(self.subjects.vectors)  # the attacker encodes texts as the store does, without its noise
        center = known[np.unique(np.concatenate([sample.rows for sample in train_samples]))].mean(axis=0)
        means = np.stack([unit(known[sample.rows].mean(axis=0) - center) for sample in train_samples])
        inside = self._in_slice
        decoder, _ = best_ridge(
            train, means, slice_=inside, score=lambda y: float((unit(y) * means[inside]).sum(axis=1).mean())
        )
        guessed = unit(decoder(tokens))
        users = np.arange(len(samples))
        values = []
        for guess in (guessed, guessed[self.other_people]):
            scores = [
                self._own_and_others(row, sample, known - center) for row, sample in zip(guess, samples, strict=True)
            ]
            values.append(mean_over_users([auc(own, others) for own, others in scores], users))
        return {"items": {"auc": values[0]}, "items, shuffled": {"auc": values[1]}}

    def _own_and_others(self, guess: Array, sample: EncodedSample, items: Array) -> tuple[Array, Array]:
        others = np.setdiff1d(self.others, sample.rows)
        return unit(items[np.unique(sample.rows)]) @ guess, unit(items[others]) @ guess

    def _words(
        self, train: Array, train_samples: list[EncodedSample], tokens: Array, samples: list[EncodedSample]
    ) -> Figures:
        contents = self.subjects.contents_of
        words = frequent_words([" ".join(contents(person.rows)) for person in self.subjects.strangers], least=5)
        known, true = (
            vocabulary([" ".join(contents(sample.rows)) for sample in part], words).holds
            for part in (train_samples, samples)
        )
        inside = self._in_slice
        decoder, _ = best_ridge(train, known, slice_=inside, score=lambda y: f1(hits_at(y, known[inside], NAMED_WORDS)))
        named = decoder(tokens)
        scores = {
            "words": named,
            "words, most frequent": np.tile(known.mean(axis=0), (len(named), 1)),
            "words, shuffled": named[self.other_people],
        }
        users = np.arange(len(samples))
        return {name: word_scores(hits_at(each, true, NAMED_WORDS), users) for name, each in scores.items()}

    def _mean_label(
        self, train: Array, train_samples: list[EncodedSample], tokens: Array, samples: list[EncodedSample]
    ) -> Figures:
        """Read the mean of a user's ratings; nothing if labels are no numbers."""
        if self.subjects.run.task.kind != "rating":
            return {}
        scale = np.array([float(label) for label in self.subjects.run.task.labels])
        known, true = (
            np.array([scale[sample.label_ids[sample.label_ids >= 0]].mean() for sample in part])
            for part in (train_samples, samples)
        )
        inside = self._in_slice
        decoder, _ = best_ridge(
            train, known[:, None], slice_=inside, score=lambda y: -float(((y[:, 0] - known[inside]) ** 2).mean())
        )
        guessed, users = decoder(tokens)[:, 0], np.arange(len(samples))
        return {
            "mean rating": {"r2": explained(true, guessed, users)},
            "mean rating, shuffled": {"r2": explained(true, guessed[self.other_people], users)},
        }

    @property
    def _in_slice(self) -> npt.NDArray[np.bool_]:
        return self.subjects.slice_[self.owners]

    def _part_of(self, sample: EncodedSample) -> EncodedSample:
        """A random part of a stranger's history behind a random stranger's question."""
        asked = self._question()
        count = self.random.integers(min(5, len(sample.rows)), len(sample.rows) + 1)
        return asked.with_items_of(sample, np.sort(self.random.permutation(len(sample.rows))[:count]))

    def _question(self) -> EncodedSample:
        people = self.subjects.strangers
        return people[self.random.integers(len(people))].samples[0]

    def _pairs(self, people: Sequence[Person]) -> list[list[EncodedSample]]:
        """For each user: the longest history behind its question and another; each half of it behind one of them."""
        parts: list[list[EncodedSample]] = [[], [], [], []]
        for person in people:
            sample = person.longest
            everything: Indices = np.arange(len(sample.rows))
            different = with_history_of(self._question(), sample)
            parts[0].append(sample)
            parts[1].append(different)
            parts[2].append(with_rows(sample, everything[::2]))
            parts[3].append(with_rows(different, everything[1::2]))
        return parts


@dataclass(frozen=True)
class _Trial:
    """An item whose presence is guessed: worlds with it and without, each a sample of the same user."""

    user: int
    label: int
    row: int
    worlds: dict[str, EncodedSample]


class MembershipAudit:
    """Guess from answers whether an item is in a history. The attacker knows the item, and no other of the user.

    The prompts ask about the item itself and about the strangers' items nearest to it; what is seen are the labels'
    probabilities, beside those of a user without items.
    """

    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        self.random = np.random.default_rng([subjects.seed, 5])
        self.known = np.unique(np.concatenate([person.rows for person in subjects.strangers]))
        self.trials = {
            name: [trial for user, person in enumerate(people) for trial in self._trials(user, person)]
            for name, people in (("strangers", subjects.strangers), ("targets", subjects.targets))
        }

    def measure(self, personas: Personas, *, prompts: int = NEIGHBORS + 1) -> Figures:
        """Return AUC with one prompt and, if asked, more, the controls, and how far probabilities move."""
        users = np.array([trial.user for trial in self.trials["targets"]])
        if prompts == 1:
            signals = self._signals(personas, self.trials["targets"], ["in", "removed"], prompts)
            return {"1 prompt": _distinguished(signals["in"][:, 0], signals["removed"][:, 0], users)}
        guess = self._fit(personas, prompts)
        signals = self._signals(personas, self.trials["targets"], ["in", *OTHER_WORLDS], prompts)
        several = {world: guess.decision_function(signal) for world, signal in signals.items()}
        figures: Figures = {}
        for world, name in OTHER_WORLDS.items():
            figures[f"1 prompt{name}"] = _distinguished(signals["in"][:, 0], signals[world][:, 0], users)
            figures[f"{prompts} prompts{name}"] = _distinguished(several["in"], several[world], users)
        return figures | _changes(signals, users)

    def _fit(self, personas: Personas, prompts: int) -> LogisticRegression:
        """Fit on strangers how to weigh the prompts."""
        known = self._signals(personas, self.trials["strangers"], ["in", "removed"], prompts)
        labels = np.repeat([1, 0], [len(known["in"]), len(known["removed"])])
        return LogisticRegression(C=1.0).fit(np.concatenate([known["in"], known["removed"]]), labels)

    def _signals(
        self, personas: Personas, trials: Sequence[_Trial], worlds: Sequence[str], prompts: int
    ) -> dict[str, Array]:
        """How much likelier the item's label is than for a user without items, (n, prompts) for each world."""
        asked = [[self._ask(trial, row) for row in self._rows(trial, prompts)] for trial in trials]
        labels = np.array([trial.label for trial in trials])
        samples = [sample.without_items() for row in asked for sample in row]
        for world in worlds:
            shown = [trial.worlds[world] for trial in trials]
            samples += [with_history_of(sample, own) for own, row in zip(shown, asked, strict=True) for sample in row]
        # All in one call, so that each prompt is read once.
        values = np.log(personas.probabilities(samples)).reshape(len(worlds) + 1, len(trials), prompts, -1)
        own_label = np.take_along_axis(values, labels[None, :, None, None], axis=3)[..., 0]
        return {world: own_label[1 + index] - own_label[0] for index, world in enumerate(worlds)}

    def _rows(self, trial: _Trial, prompts: int) -> list[int]:
        known = self.known[self.known != trial.row]
        similar = self.subjects.vectors[known].astype(np.float32) @ self.subjects.vectors[trial.row].astype(np.float32)
        return [trial.row, *known[np.argsort(-similar, kind="stable")[: prompts - 1]].tolist()]

    def _ask(self, trial: _Trial, row: int) -> EncodedSample:
        """The task's question about the text of an item."""
        sample, text = trial.worlds["in"], self.subjects.contents[row]
        prompt = last_message(sample.prompt)
        if not prompt.endswith(sample.query):
            raise ConfigError("The audit asks about items in the task's wording; its prompts must end with the query.")
        return replace(sample, prompt=prompt.removesuffix(sample.query) + text, query=text)

    def _trials(self, user: int, person: Person) -> list[_Trial]:
        sample = person.longest
        everything: Indices = np.arange(len(sample.rows))
        chosen = self.random.permutation(np.flatnonzero(sample.label_ids >= 0))[:TRIALS].tolist()
        trials = []
        for index in chosen:
            another = self.random.choice(everything[everything != index])
            giver = self.subjects.strangers[self.random.integers(len(self.subjects.strangers))]
            given = self.random.integers(len(giver.rows))
            worlds = {
                "in": sample,
                "removed": with_rows(sample, everything[everything != index]),
                "another removed": with_rows(sample, everything[everything != another]),
                "swapped": with_item(sample, index, row=int(giver.rows[given]), label=int(giver.labels[given])),
            }
            trials.append(_Trial(user, int(sample.label_ids[index]), int(sample.rows[index]), worlds))
        return trials


def _distinguished(inside: Array, outside: Array, users: Indices) -> dict[str, Estimate]:
    return {"auc": over_users(lambda rows: auc(inside[rows], outside[rows]), users)}


def _changes(signals: dict[str, Array], users: Indices) -> Figures:
    """How far log p of the item's label moves with the item, at the prompt about it and at its neighbors'."""
    figures: Figures = {}
    for world in OTHER_WORLDS:
        moved = np.abs(signals["in"] - signals[world])
        for name, values in (("its prompt", moved[:, :1]), ("other prompts", moved[:, 1:])):
            flat, owners = values.ravel(), np.repeat(users, values.shape[1])

            def quantile(share: float, flat: Array = flat, owners: Indices = owners) -> Estimate:
                return over_users(lambda rows: float(np.quantile(flat[rows], share)), owners)

            figures[f"change, {world}, {name}"] = {
                "median": quantile(0.5),
                "p95": quantile(0.95),
                "above_0.01": mean_over_users(flat > 0.01, owners),
            }
    return figures


class UseAudit:
    """How good the answers are: −log p of the right label, accuracy and absolute error of the likeliest."""

    def __init__(self, subjects: Subjects) -> None:
        people = subjects.targets
        self.subjects = subjects
        self.samples = [sample for person in people for sample in person.samples[-QUESTIONS:]]
        self.users = np.repeat(np.arange(len(people)), [len(person.samples[-QUESTIONS:]) for person in people])
        self.true = np.array([subjects.run.task.labels.index(sample.target or "") for sample in self.samples])
        # Each user gets the next one's history, so that no one keeps an own one.
        self.strangers = [people[(user + 1) % len(people)].longest for user in self.users]

    def measure(self, personas: Personas, *, whose: str = "own") -> tuple[dict[str, Estimate], Array]:
        """Return the figures and each answer's −log p; `whose` history is shown: own, stranger or none."""
        samples = self.samples
        if whose == "stranger":
            pairs = zip(samples, self.strangers, strict=True)
            samples = [with_history_of(sample, other) for sample, other in pairs]
        elif whose == "none":
            samples = [sample.without_items() for sample in samples]
        probabilities = personas.probabilities(samples)
        nll = -np.log(probabilities[np.arange(len(samples)), self.true])
        best = probabilities.argmax(axis=1)
        values = {"nll": nll, "accuracy": best == self.true}
        if self.subjects.run.task.kind == "rating":
            scale = np.array([float(label) for label in self.subjects.run.task.labels])
            values["mae"] = np.abs(scale[best] - scale[self.true])
        return {name: mean_over_users(value, self.users) for name, value in values.items()}, nll

    def gap(self, nll: Array, base: Array) -> Estimate:
        """How much worse answers are than a base's on the same questions, in nats."""
        return mean_over_users(nll - base, self.users)
