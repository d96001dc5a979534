"""Persona map: the personas of many users as points of a plane, and the path of one user's persona over time.

The plane shows the two directions in which the personas differ most (a principal component analysis).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.serving.served_task import ServedPlug
from personaplug.serving.service import Service
from personaplug.store.user_list import list_users

_TRAIL_POINTS = 12
_SMALLEST_SPREAD = 1e-5  # users whose features differ less, relative to their size, are equal up to rounding

Features = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Plane:
    """A projection of features to two dimensions.

    Attributes:
        mean: (F,) the features at the origin.
        axes: (F, 2) the directions of both dimensions.
        explained: (2,) share of the variance in each dimension.
    """

    mean: Features
    axes: Features
    explained: Features

    @classmethod
    def fit(cls, *groups: Features) -> Plane:
        """Find the two directions with the largest variance of N users, with an (N, F_i) array for each group.

        Each group counts alike, whatever its unit. A group in which all users are equal does not count.
        """
        mean = np.concatenate([group.mean(axis=0) for group in groups])
        scale = np.concatenate([np.full(group.shape[1], _scale(group)) for group in groups])
        centered = (np.concatenate(groups, axis=1) - mean) * scale
        # The eigenvectors of an (N, N) matrix take less memory and time than a decomposition of (N, F) features.
        variances, vectors = np.linalg.eigh(centered @ centered.T)
        axes, explained = np.zeros((2, len(mean))), np.zeros(2)
        for place, index in enumerate(np.argsort(-variances)[:2]):
            if variances[index] > 1e-9 * max(variances.sum(), _SMALLEST_SPREAD):
                axis = vectors[:, index] @ centered / np.sqrt(variances[index])
                axes[place] = axis * np.sign(axis[np.abs(axis).argmax()])  # so that equal personas give equal maps
                explained[place] = variances[index] / variances.sum()
        return cls(mean, (axes * scale).T, explained)

    def project(self, *groups: Features) -> Features:
        """Return the points of users, (N, 2)."""
        points: Features = (np.concatenate(groups, axis=1) - self.mean) @ self.axes
        return points


def _scale(group: Features) -> float:
    """Return 1 / the root mean square distance of the users from their mean; 0 if all users are equal."""
    spread = float(np.sqrt(((group - group.mean(axis=0)) ** 2).sum(axis=1).mean()))
    size = float(np.sqrt((group**2).sum(axis=1).mean()))
    return 1 / spread if spread > _SMALLEST_SPREAD * size else 0.0


class PersonaMap:
    """Computes the map of a tenant's users, with the personas of a plug's first task for an empty query."""

    def __init__(self, service: Service, plug: ServedPlug) -> None:
        self.service, self.store, self.personas = service, service.store, plug.personas

    async def describe(self, tenant: str, *, limit: int, trails_of: Sequence[str]) -> dict[str, Any]:
        """Return the points of at most `limit` users, and the paths of the personas of some users.

        Users without items have no path.
        """
        run = self.service.slow
        users = await run.run(tenant, "", partial(list_users, self.store, tenant=tenant, limit=limit + 1))
        shown = [user.user for user in users[:limit]]
        if not shown:
            return {"users": [], "trails": {}, "explained": [0.0, 0.0], "more": False}
        work = partial(self._describe, tenant, shown, trails_of=trails_of)
        cost = len(shown) + _TRAIL_POINTS * len(trails_of)
        return {**await run.run_weighted(tenant, "", work, cost=cost), "more": len(users) > limit}

    def _describe(self, tenant: str, shown: Sequence[str], *, trails_of: Sequence[str]) -> dict[str, Any]:
        counts = [self.store.count(tenant, user) for user in shown]
        groups = self._features(self._history(tenant, user) for user in shown)
        plane = Plane.fit(*groups)
        points = plane.project(*groups).tolist()
        trails = {
            user: self._trail(tenant, user, plane=plane) for user in trails_of if self.store.version(tenant, user)
        }
        return {
            "users": [
                {"user": user, "items": count, "x": x, "y": y}
                for user, count, (x, y) in zip(shown, counts, points, strict=True)
                if self.store.version(tenant, user)  # leave out users who were erased meanwhile
            ],
            "trails": {user: trail for user, trail in trails.items() if self.store.version(tenant, user)},
            "explained": plane.explained.tolist(),
        }

    def _trail(self, tenant: str, user: str, *, plane: Plane) -> list[dict[str, float]]:
        """Return the points after some of a user's items, oldest first; the last one is of the whole history."""
        history = self._history(tenant, user)
        counts = np.linspace(0, len(history), num=min(_TRAIL_POINTS, len(history) + 1)).round().astype(int).tolist()
        points = plane.project(*self._features([history.select(slice(count)) for count in counts])).tolist()
        return [{"items": count, "x": x, "y": y} for count, (x, y) in zip(counts, points, strict=True)]

    def _history(self, tenant: str, user: str) -> EncodedHistory:
        history = self.store.load_history(tenant, user, latest=self.personas.plug.config.max_history)
        return history.select(self.personas.plug.known_items(history.kind_ids))

    def _features(self, histories: Iterable[EncodedHistory]) -> tuple[Features, Features]:
        """Return what a persona adds to the model's input: soft tokens, (N, S · D), and label biases, (N, C)."""
        vectors, biases = [], []
        for history in histories:
            with self.personas.plug_lock:
                soft = self.personas.personalizer.persona("", history)
            vectors.append(_row(soft.vectors))
            biases.append(np.zeros(0) if soft.label_bias is None else _row(soft.label_bias))
        return np.stack(vectors), np.stack(biases)


def _row(tensor: Tensor) -> Features:
    row: Features = tensor.double().flatten().cpu().numpy()
    return row
