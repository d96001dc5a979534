"""Each user's score with the own history and with a stranger's, from the trials beside a results file.

Trial files have no ids, so users have numbers, in the order of their first sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.method_info import main_row
from personaplug.analysis.metrics import Array, Metric
from personaplug.analysis.results import matched_by_seed
from personaplug.analysis.trials import Trial
from personaplug.analysis.trials_of_results import ResultTrials, metric_of_means

_MIN_USERS = 3


@dataclass(frozen=True, eq=False)
class UserScores:
    """The scores of the main row and of its wrong-user control, user by user.

    Attributes:
        method, control: names of the two rows.
        metric: the leading metric of the results.
        numbers: (u,) number of each user.
        samples: (u,) number of samples of each user.
        history_items: (u,) mean number of items in the user's history.
        scores: for each metric, (u, 2): the score with the own history and with a stranger's.
        higher_is_better: for each metric, whether a higher score is better.
    """

    method: str
    control: str
    metric: str
    numbers: NDArray[np.int64]
    samples: NDArray[np.int64]
    history_items: Array
    scores: dict[str, Array]
    higher_is_better: dict[str, bool]

    @cached_property
    def gains(self) -> Array:
        """The advantage of the own history in the leading metric: (u,)."""
        own, stranger = self.scores[self.metric].T
        with np.errstate(invalid="ignore"):  # scores may be infinite
            gains: Array = own - stranger if self.higher_is_better[self.metric] else stranger - own
        gains[np.isclose(gains, 0, atol=1e-9)] = 0  # a rounding error is no advantage
        return gains

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers of users with a better, a worse and an equal score with the own history."""
        return int((self.gains > 0).sum()), int((self.gains < 0).sum()), int((self.gains == 0).sum())

    def extremes(self, count: int) -> list[int]:
        """Return the indices of the users who gain most, then of those who lose most: up to `count` each.

        Of equal gains, the one with more samples comes first.
        """
        finite = [index for index in range(len(self.gains)) if np.isfinite(self.gains[index])]
        ranked = sorted(finite, key=lambda index: (-abs(self.gains[index]), -self.samples[index], index))
        best = [index for index in ranked if self.gains[index] > 0][:count]
        return best + [index for index in ranked if self.gains[index] < 0][:count]


def user_scores(loaded: ResultTrials) -> UserScores | None:
    """Return the scores of users; None if the trials lack the main row or its control, or have too few users.

    None also if the leading metric is not meaningful for one user, such as the macro-F1.
    """
    results = loaded.results
    main = main_row([row.method for row in results.rows])
    control = next((row.name for row in results.rows if main and row.method.gain_of == main.name), None)
    metric = results.leading_metric
    if main is None or control is None or len(set(loaded.samples.groups)) < _MIN_USERS:
        return None
    numbers, places, samples = np.unique(loaded.samples.groups, return_inverse=True, return_counts=True)
    pairs = matched_by_seed(loaded.trials[main.name], loaded.trials[control]) if loaded.trials[control] else []
    scores = {}
    for name in results.metric_names:
        kind = metric_of_means(name)
        if kind is not None and kind.averages_over_users and (of_users := _of_users(pairs, kind, places=places)):
            scores[name] = np.stack(of_users, axis=1)
    if metric not in scores:
        return None
    items = np.bincount(places, weights=loaded.samples.history_items) / samples
    kinds = {name: metric_of_means(name) for name in scores}
    directions = {name: kind.greater_is_better for name, kind in kinds.items() if kind}
    return UserScores(main.name, control, metric, numbers, samples, items, scores, directions)


def _of_users(pairs: list[tuple[Trial, Trial]], metric: Metric, *, places: NDArray[np.int64]) -> list[Array]:
    """Return the users' scores of both sides of the pairs; an empty list if a trial lacks the metric."""
    if not pairs or any(metric.name not in trial.statistics for pair in pairs for trial in pair):
        return []
    sides = []
    for side in (0, 1):
        stats = np.stack([pair[side].statistics[metric.name] for pair in pairs]).mean(axis=0)
        sums = np.zeros((places.max() + 1, stats.shape[1]))
        np.add.at(sums, places, stats)
        with np.errstate(all="ignore"):
            sides.append(np.asarray(metric.value(sums / np.bincount(places)[:, None]), dtype=np.float64))
    return sides
