"""What stored vectors give away: the text, its words, whose they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import Float16Array, RowIds
from privacy_audit.attacks import (
    STRENGTHS,
    Array,
    Estimate,
    Indices,
    Vocabulary,
    auc,
    best_linker,
    best_ridge,
    f1,
    fit_ridge,
    frequent_words,
    hits_at,
    mean_over_users,
    proper_names,
    ranking,
    ranks_of,
    unit,
    vocabulary,
    word_scores,
    words_of,
)
from privacy_audit.subjects import Person, Subjects

ITEMS = 10  # of each target
LEAST_TEXTS = 5  # of strangers that hold a word of the decoder's vocabulary
WEIGHTS = (0.0, 0.01, 0.03, 0.1)  # of a word's likeness, tried on the slice
MOST_GUESSES = 3000  # names or rare words that a dictionary attack tries

Figures = dict[str, dict[str, Estimate]]


class VectorAudit:
    """The attacks on vectors; all that depends on texts alone is computed once."""

    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        random = np.random.default_rng([subjects.seed, 2])
        drawn = [random.permutation(person.rows)[:ITEMS] for person in subjects.targets]
        self.probes = np.concatenate(drawn)
        self.users = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn])
        self.candidates, self.true = np.unique(self.probes, return_inverse=True)
        # An item that several strangers share counts once.
        self.train, first = np.unique(np.concatenate([p.rows for p in subjects.strangers]), return_index=True)
        lengths = [len(person.rows) for person in subjects.strangers]
        self.slice_ = np.repeat(subjects.slice_, lengths)[first]
        self.shuffle = random.permutation(len(self.probes))
        self.other_people = random.permutation(len(subjects.targets))

    def measure(self, vectors: Float16Array) -> Figures:
        """Run every attack on vectors as they are stored."""
        return self.matching(vectors) | self.words(vectors) | self.guesses(vectors) | self.linkage(vectors)

    def matching(self, vectors: Float16Array) -> Figures:
        """Rank the true text of a vector among all targets' texts."""
        stored = unit(vectors[self.probes])
        scores = {
            "text, encoder known": stored @ self._whole.T,
            "text, first half known": stored @ self._half.T,
            "text, encoder unknown": stored @ self._mapped(vectors).T,
            "text, shuffled vectors": stored[self.shuffle] @ self._whole.T,
        }
        return {name: ranking(each, self.true, self.users) for name, each in scores.items()}

    def words(self, vectors: Float16Array) -> Figures:
        """Name the words of a text by a decoder trained on strangers."""
        train = self._train_words.holds
        count = max(1, round(float(train[self.slice_].sum(axis=1).mean())))
        strength, weight = self._choose_decoder(vectors, count)
        decoder = fit_ridge(vectors[self.train], train, strength)
        named = decoder(vectors[self.probes]) + weight * self._likeness(self._word_vectors, vectors)(self.probes)
        scores = {
            "words": named,
            "words, most frequent": np.tile(train.mean(axis=0), (len(named), 1)),
            "words, shuffled vectors": named[self.shuffle],
        }
        return {
            name: word_scores(hits_at(each, self._target_words, count), self.users) for name, each in scores.items()
        }

    def _choose_decoder(self, vectors: Float16Array, count: int) -> tuple[float, float]:
        """Choose, on the slice, the strength of the ridge and the weight of each word's own likeness to the vector."""
        inside, holds = self.slice_, self._train_words.holds
        likeness = self._likeness(self._word_vectors, vectors)(self.train[inside])
        scores = {}
        for strength in STRENGTHS:
            decoder = fit_ridge(vectors[self.train[~inside]], holds[~inside], strength)
            named = decoder(vectors[self.train[inside]])
            for weight in WEIGHTS:
                scores[strength, weight] = f1(hits_at(named + weight * likeness, holds[inside], count))
        return max(scores, key=lambda choice: scores[choice])

    def _likeness(self, words: Array, vectors: Float16Array) -> Callable[[RowIds], Array]:
        """Return a function from rows to their cosines with words, as deviations from those of strangers' vectors."""
        strangers = unit(vectors[self.train]) @ words.T
        mean, spread = strangers.mean(axis=0), strangers.std(axis=0)
        return lambda rows: (unit(vectors[rows]) @ words.T - mean) / spread

    def guesses(self, vectors: Float16Array) -> Figures:
        """Rank the names and the rare words of a text among all that the attacker can think of."""
        figures: Figures = {}
        for kind, (words, encodings) in self._guesses.items():
            if not len(words):
                continue
            scores = self._likeness(encodings, vectors)(self.probes)
            texts, columns = np.nonzero(vocabulary(self.subjects.contents_of(self.probes), words).holds)
            for name, rows in ((kind, texts), (f"{kind}, shuffled vectors", self.shuffle[texts])):
                figures[name] = ranking(scores[rows], columns, self.users[texts])
        return figures

    def linkage(self, vectors: Float16Array) -> Figures:
        """Tell whether items are of one user, and find a user by other items."""
        link = best_linker(*self._centroids(self.subjects.strangers, vectors), slice_=self.subjects.slice_)
        items = link(vectors[self.probes])
        similar = items @ items.T
        own = self.users[:, None] == self.users
        distinct = self.probes[:, None] != self.probes
        per_item = [
            auc(row[same & other], row[~same & other])
            for row, same, other in zip(similar, own, distinct, strict=True)
            if (same & other).any()
        ]
        kept = [index for index in range(len(own)) if (own[index] & distinct[index]).any()]
        first, second = (link(half) for half in self._centroids(self.subjects.targets, vectors))
        people = np.arange(len(first))
        return {
            "same user, two items": {"auc": mean_over_users(per_item, self.users[kept])},
            "user, by other items": ranking(first @ second.T, people, people),
            "user, shuffled": ranking(first @ second.T, self.other_people, people),
        }

    def facts(self) -> dict[str, float]:
        """Return the sizes that chance levels follow from."""
        words = [word.lower() for text in self.subjects.contents_of(self.probes) for word in words_of(text)]
        known = set(self._train_words.words)
        return {
            "candidate_texts": len(self.candidates),
            "probed_vectors": len(self.probes),
            "training_vectors": len(self.train),
            "decoder_words": len(known),
            "share_of_words_in_decoder": round(float(np.mean([word in known for word in words])), 3),
            "names": len(self._guesses["names"][0]),
            "rare_words": len(self._guesses["rare words"][0]),
        }

    @staticmethod
    def _centroids(people: tuple[Person, ...], vectors: Float16Array) -> tuple[Array, Array]:
        halves = [(person.rows[::2], person.rows[1::2]) for person in people]
        first, second = (np.stack([vectors[rows].mean(axis=0) for rows in part]) for part in zip(*halves, strict=True))
        return unit(first), unit(second)

    def _encode(self, texts: list[str]) -> Array:
        return unit(self.subjects.models.encoder.encode(texts))

    @cached_property
    def _whole(self) -> Array:
        return self._encode(self.subjects.texts_of(self.candidates))

    @cached_property
    def _half(self) -> Array:
        texts = (text.split() for text in self.subjects.texts_of(self.candidates))
        return self._encode([" ".join(words[: (len(words) + 1) // 2]) for words in texts])

    @cached_property
    def _other_encoder(self) -> tuple[Array, Array]:
        encoder = HashEncoder(512)
        train, candidates = self.subjects.texts_of(self.train), self.subjects.texts_of(self.candidates)
        return unit(encoder.encode(train)), unit(encoder.encode(candidates))

    def _mapped(self, vectors: Float16Array) -> Array:
        """Candidates by another encoder, mapped to the store's space as strangers' texts and vectors show."""
        train, candidates = self._other_encoder
        own = unit(vectors[self.train])[self.slice_]
        true: Indices = np.arange(len(own))
        to_store, _ = best_ridge(
            train,
            vectors[self.train],
            slice_=self.slice_,
            score=lambda mapped: float((1 / ranks_of(own @ unit(mapped).T, true)).mean()),
        )
        return unit(to_store(candidates))

    @cached_property
    def _train_words(self) -> Vocabulary:
        texts = self.subjects.contents_of(self.train)
        return vocabulary(texts, frequent_words(texts, least=LEAST_TEXTS))

    @cached_property
    def _word_vectors(self) -> Array:
        return self._encode(list(self._train_words.words))

    @cached_property
    def _target_words(self) -> npt.NDArray[np.bool_]:
        return vocabulary(self.subjects.contents_of(self.probes), self._train_words.words).holds

    @cached_property
    def _guesses(self) -> dict[str, tuple[list[str], Array]]:
        texts = self.subjects.contents_of(np.unique(np.concatenate([self.train, self.probes])))
        names = proper_names(texts)
        common = set(frequent_words(texts, least=LEAST_TEXTS))
        rare = set(frequent_words(texts, least=1)) - common - names
        drawn = {kind: self._draw(words) for kind, words in (("names", names), ("rare words", rare))}
        return {kind: (words, self._encode(words)) for kind, words in drawn.items()}

    def _draw(self, words: set[str]) -> list[str]:
        random = np.random.default_rng([self.subjects.seed, 3])
        return sorted(random.permutation(sorted(words))[:MOST_GUESSES].tolist())
