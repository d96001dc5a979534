"""PersonaCache: soft tokens for live users, made from the histories in a store.

It uses the Personalizer of the evaluation, so the served personas are the evaluated ones.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from cachetools import LRUCache

from personaplug.config import MAX_PERSONA_SCALE
from personaplug.data.records import Options
from personaplug.encoders.encoded_sample import all_answers, past_answers
from personaplug.encoders.style_features import style_features_of
from personaplug.errors import ConfigError, EncoderMismatch, StoreConflict
from personaplug.llm.copied_answers import MAX_ANSWERS
from personaplug.llm.copy_head import Copying
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.serving.copied_answers import AnswerReader, CopiedAnswers
from personaplug.store.history_store import HistoryStore, StoredHistory, StoreSettings, Ticket

Fallback = Literal["population", "plain"]
"""The persona of users without a history: the population's, or none (plain model)."""

Applied = Literal["user", "population", "plain"]
"""The persona that a request got. Users with few items get the population's."""

_OTHER_STORE = "Name another store; `personaplug load` creates one. In Python, create it with `store_settings(plug)`."
_ENTRY_BYTES = 1024  # size of an entry without its arrays


@dataclass(frozen=True)
class Persona:
    """Soft tokens for one request, with the facts that the reply's headers report."""

    soft: SoftPrompt | None  # (1, S, D); None = the plain model answers
    applied: Applied
    items: int  # length of the history
    persona_scale: float
    cached: bool = False  # True if the cache had the current version of the history
    copying: Copying | None = None  # a copy head and the user's past answers, one row


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Entry:
    """A user's soft tokens or, if they depend on the query, the precomputed history."""

    version: int
    items: int
    is_cold: bool  # too few items to have an effect
    answers: CopiedAnswers | None = None
    soft: SoftPrompt | None = None
    history: HistoryBatch | None = None
    first_day: int = 0  # first day of the history under the store's retention rules

    @property
    def bytes(self) -> int:
        arrays = (self.soft.vectors if self.soft else None, self.history, self.answers)
        return _ENTRY_BYTES + sum(array.nbytes for array in arrays if array is not None)


class PersonaCache:
    """Computes personas and caches all that does not depend on the query. Thread-safe.

    An entry is valid only while the store reports the same version of the history. The next request therefore sees
    every write and erasure, including those of other processes.

    Args:
        fallback: the persona of requests without a user or whose user has no history.
        reader: the copy head of the answers, and how it reads past answers; None = no copy head.
    """

    def __init__(
        self,
        personalizer: Personalizer,
        store: HistoryStore,
        *,
        fallback: Fallback = "population",
        reader: AnswerReader | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        if fallback not in get_args(Fallback):
            raise ConfigError(f"fallback must be one of {', '.join(get_args(Fallback))}; found {fallback!r}.")
        if not 0 <= personalizer.persona_scale <= MAX_PERSONA_SCALE:
            raise ConfigError(
                f"persona_scale must be between 0 and {MAX_PERSONA_SCALE}; found {personalizer.persona_scale}."
            )
        if reader is not None and not store.settings.keep_text:
            raise StoreConflict(
                "A copy head needs the items' texts, but the store has none. Create a store with keep_text."
            )
        check_fits(personalizer.plug, store)
        self.personalizer, self.plug, self.store = personalizer, personalizer.plug, store
        self.fallback, self._reader = fallback, reader
        self.plug_lock = threading.Lock()  # for computing soft tokens, because the plug is not thread-safe
        self._entries: LRUCache[tuple[str, str], _Entry] = LRUCache(cache_bytes, getsizeof=lambda entry: entry.bytes)
        self._entries_lock = threading.Lock()
        self._erasures = 0
        self._population = self._entry(_empty_history(self.plug), answers=self._answers(None))

    def persona(
        self,
        ticket: Ticket | None,
        *,
        query: str,
        options: Options | None = None,
        persona_scale: float | None = None,
    ) -> Persona:
        """Compute the soft tokens for a query of the ticket's user or, without a ticket, of no user.

        `persona_scale` 0 = plain model. Raise UserErased if the user is erased meanwhile, so that no persona of an
        erased history is returned. Without a ticket, the store is not read.
        """
        default_scale = self.personalizer.persona_scale
        scale = default_scale if persona_scale is None else persona_scale
        if scale == 0:
            return Persona(None, "plain", 0, scale)
        entry, cached = (self._population, True) if ticket is None else self._lookup(ticket)
        if not entry.items and self.fallback == "plain":
            return Persona(None, "plain", 0, scale)
        soft = entry.soft
        if soft is None or scale != default_scale:
            history = entry.history or self.personalizer.precompute(self._read(ticket))
            with self.plug_lock:
                soft = self.personalizer.persona(query, history, options=options, persona_scale=scale)
        applied: Applied = "population" if entry.is_cold else "user"
        copying = None if entry.answers is None else entry.answers.copying()
        return Persona(soft, applied, entry.items, scale, cached, copying)

    def forget(self, tenant: str, user: str) -> None:
        """Drop the entry of an erased user."""
        with self._entries_lock:
            self._erasures += 1
            self._entries.pop((tenant, user), None)

    def reads_history(self, ticket: Ticket) -> bool:
        """Return True if a persona of the ticket's user must wait until the model has read all past answers."""
        return self._reader is not None and (ticket.tenant, ticket.user) not in self._entries

    @property
    def cached_users(self) -> int:
        return len(self._entries)

    @property
    def cached_bytes(self) -> int:
        return int(self._entries.currsize)

    def _lookup(self, ticket: Ticket) -> tuple[_Entry, bool]:
        """Return a user's entry, and whether it came from the cache."""
        tenant, user, first_day = ticket.tenant, ticket.user, self.store.retention.first_day()
        version = self.store.version(tenant, user)
        with self._entries_lock:
            entry, erasures = self._entries.get((tenant, user)), self._erasures
        if entry is not None and (entry.version, entry.first_day) == (version, first_day):
            return entry, True
        if not version:  # the user is unknown, or another process erased the user
            self.forget(tenant, user)
            return self._population, False
        history, answers = self._read(ticket), self._answers(ticket, None if entry is None else entry.answers)
        entry = replace(self._entry(history, answers=answers), first_day=first_day)
        self.store.check(ticket)
        with self._entries_lock:
            # Do not cache a history that was read before an erasure, because it may be the erased one.
            if self._erasures == erasures and entry.bytes <= self._entries.maxsize:
                self._entries[tenant, user] = entry
        return entry, False

    def _read(self, ticket: Ticket | None) -> StoredHistory:
        if ticket is None:
            return _empty_history(self.plug)
        history = self.store.load_history(ticket.tenant, ticket.user, latest=self.plug.config.max_history)
        return history.select(self.plug.known_items(history.kind_ids))

    def _answers(self, ticket: Ticket | None, earlier: CopiedAnswers | None = None) -> CopiedAnswers | None:
        """Read the answers that a copy head may copy; `earlier` are those of an older version of the history."""
        if self._reader is None:
            return None
        items = [] if ticket is None else self.store.list_items(ticket.tenant, ticket.user, latest=MAX_ANSWERS)
        return CopiedAnswers.read(self._reader, past_answers(items), earlier=earlier)

    def _entry(self, history: StoredHistory, *, answers: CopiedAnswers | None) -> _Entry:
        facts = (history.version, len(history), self.plug.cold_start.ignores(history.kind_ids))
        if not self.plug.ignores_query:
            return _Entry(*facts, answers, history=self.personalizer.precompute(history))
        with self.plug_lock:
            return _Entry(*facts, answers, soft=self.personalizer.persona("", history))


def _empty_history(plug: PersonaPlug) -> StoredHistory:
    return StoredHistory(
        vectors=np.empty((0, plug.spec.encoder.width), dtype=np.float16),
        label_ids=np.empty(0, dtype=np.int16),
        style=style_features_of([]),
        kind_ids=all_answers(),
        version=0,
    )


def check_fits(plug: PersonaPlug, store: HistoryStore) -> None:
    """Check that a plug can read the histories of a store; EncoderMismatch or StoreConflict if it cannot."""
    settings, config = store.settings, plug.config
    if not store.identity.same_items_as(plug.spec.encoder):
        raise EncoderMismatch("The plug", expected=plug.spec.encoder.describe(), found=store.identity.describe())
    if settings.encodes_answers != config.encodes_answers:
        kinds = ["of items without the user's answer", "of whole items"]
        raise StoreConflict(
            f"The plug reads vectors {kinds[config.encodes_answers]} (answer_channel={config.answer_channel}), but the "
            f"store has vectors {kinds[settings.encodes_answers]}. {_OTHER_STORE}"
        )
    if config.reads_labels and settings.labels != plug.spec.labels:
        raise StoreConflict(
            f"The plug has {len(plug.spec.labels)} labels; the store was created with other labels "
            f"({len(settings.labels)}). {_OTHER_STORE}"
        )


def store_settings(plug: PersonaPlug, *, keep_text: bool = False, keep_pictures: bool = False) -> StoreSettings:
    """Return the store settings for a plug's histories. A copy head and explanations with texts need `keep_text`."""
    labels = plug.spec.labels if plug.config.reads_labels else ()
    return StoreSettings(
        labels=labels,
        encodes_answers=plug.config.encodes_answers,
        keep_text=keep_text,
        keep_pictures=keep_pictures,
    )
