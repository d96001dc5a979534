"""The concepts of live users that a request mentions or shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from personaplug.data.parsing import Flaw
from personaplug.data.pictures import Picture, picture_of
from personaplug.data.task import Task
from personaplug.encoders.base import EncoderIdentity, Vectors
from personaplug.encoders.concepts import Concept, FoundConcepts, concepts_of, find_concepts, nearest, threshold_of
from personaplug.encoders.embedding_store import Float16Array
from personaplug.encoders.joint import PICTURE, JointEncoder, part_slice
from personaplug.encoders.pictures import PictureEncoder
from personaplug.errors import RequestError, StoreConflict
from personaplug.serving.snapshots import snapshot
from personaplug.store.history_store import HistoryStore, Ticket

_MAX_ITEMS = 1000  # the latest items of a user, among which concepts are found
_MAX_PICTURES = 8  # in one request


@dataclass(frozen=True)
class ConceptFinder:
    """Finds the concepts of the users of a store. Each call reads the history anew, so edits count at once.

    Attributes:
        threshold: the smallest cosine at which a picture shows a concept; None = that of the picture encoder.
    """

    store: HistoryStore
    threshold: float | None = None

    def check(self, task: Task) -> None:
        """Raise StoreConflict if the items of a task are concepts and the store keeps no texts."""
        if task.name_field is not None and not self.store.settings.keep_text:
            raise StoreConflict(
                f"Task {task.name} has a 'name_field', so questions get the texts of items, but the store has none. "
                f"Name another store, which then keeps texts, or remove 'name_field' from task.json."
            )

    def sees_pictures(self, task: Task) -> bool:
        """Return True if pictures in a question are compared with the concepts of a task."""
        return task.name_field is not None and self._picture_encoder is not None

    def find(self, task: Task, ticket: Ticket, *, question: str, pictures: Sequence[Picture] = ()) -> FoundConcepts:
        """Return what a question of the ticket's user is about.

        ItemError if a picture is damaged or too large, UserErased if the user was erased meanwhile.
        """
        tenant, user, encoder = ticket.tenant, ticket.user, self._picture_encoder
        if not pictures or encoder is None:
            found = find_concepts(concepts_of(task, self.store.list_items(tenant, user, latest=_MAX_ITEMS)), question)
        else:
            rows = encoder.encode(pictures)
            items, history = snapshot(self.store, tenant, user, latest=_MAX_ITEMS)
            concepts, stored = concepts_of(task, items), _picture_part(history.vectors, self.store.identity)
            shown = [nearest(concepts, pictures=stored, picture=row) for row in rows]
            threshold = threshold_of(encoder) if self.threshold is None else self.threshold
            found = find_concepts(concepts, question, shown=shown, threshold=threshold)
        self.store.check(ticket)
        return found

    @property
    def _picture_encoder(self) -> PictureEncoder | None:
        return self.store.encoder.pictures if isinstance(self.store.encoder, JointEncoder) else None


def read_pictures(urls: Sequence[object]) -> list[Picture]:
    """Convert the URLs of the pictures in a message; RequestError (400) if one is not a data URL of a picture."""
    if len(urls) > _MAX_PICTURES:
        raise RequestError(f"A message may have at most {_MAX_PICTURES} pictures; found {len(urls)}.", code=PICTURE)
    return [_picture(url, f"picture {number}") for number, url in enumerate(urls, 1)]


def _picture(url: object, what: str) -> Picture:
    try:
        picture = picture_of(url, what) if isinstance(url, str) else None
    except Flaw as flaw:
        raise RequestError(f"{flaw}. The server fetches no URLs.", code=PICTURE) from None
    if picture is None:
        message = f'{what} has no URL. Send {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,…"}}}}.'
        raise RequestError(message, code=PICTURE)
    return picture


def _picture_part(vectors: Float16Array, identity: EncoderIdentity) -> Vectors:
    """Return the (items, E) unit vectors of the pictures of items; zeros for an item without one."""
    part = vectors[:, part_slice(identity, PICTURE)].astype(np.float32)
    norms = np.linalg.norm(part, axis=1, keepdims=True)
    units: Vectors = part / np.maximum(norms, np.finfo(np.float32).tiny)
    return units


def header_of(concepts: Sequence[Concept]) -> str:
    """Return the ids of concepts as the value of a header: percent-encoded, joined by commas."""
    return ",".join(quote(concept.id, safe="") for concept in concepts)
