"""PersonaCache: (tenant, user, query) to soft tokens, out of the store of a service.

The personas are made by the Personalizer that evaluations use, so what is served is what was measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from personaplug.config import MAX_PERSONA_SCALE
from personaplug.data.records import Options
from personaplug.encoders.encoded_sample import EncodedHistory, past_answers
from personaplug.encoders.style_features import style_features_of
from personaplug.errors import ConfigError, EncoderMismatch, StoreConflict
from personaplug.llm.ngram_cache import UserNgramCache
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.attribution import item_weights
from personaplug.plug.model import HistoryBatch, PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.store.history_store import HistoryStore, StoredHistory, StoreSettings

Unknown = Literal["population", "plain"]
UNKNOWN: tuple[Unknown, ...] = ("population", "plain")
"""What somebody gets whose history is not known: what is common to all users, or the bare model."""

_OVERHEAD = 1024  # bytes of a kept user beside the arrays


@dataclass(frozen=True)
class Persona:
    """Soft tokens for one request, and what to say of them.

    Attributes:
        soft: (1, S, D); None = the bare model answers.
        applied: `user` = made from the user's own items, `population` = what is common to all, as users of few items
            get it too, `plain` = none.
        items: of the history that it was made from.
        persona_scale: as `PersonaPlug.forward` takes it.
        kept: whether it was at hand, unchanged since an earlier request.
        phrases: of the user's own answers, to be mixed into what is written; None where that is not wanted.
    """

    soft: SoftPrompt | None
    applied: Literal["user", "population", "plain"]
    items: int
    persona_scale: float
    kept: bool = False
    phrases: UserNgramCache | None = None


class PersonaCache:
    """Makes personas of users whose histories grow, change and go; for several threads at once.

    What a request needs of a user is kept within a bound of bytes (the soft tokens, or the read history where tokens
    depend on the query), and served only while the store says that the history is the same: a write or erasure
    by another process is seen by the next request too.

    Args:
        personalizer: makes them.
        store: where the histories are; its vectors have to be the plug's encoder's.
        unknown: what users get whose history is unknown or empty, and requests without a user.
        phrases: makes phrases of a user's own answers, for an engine that mixes them in; None = it does not.
        cache_bytes: most that is kept in memory.
    Raises:
        ConfigError: if `unknown` is neither, or persona_scale is out of bounds.
        StoreConflict: if the store keeps other answers or other vectors than the plug was trained on, or no texts where
            phrases are wanted.
    """

    def __init__(
        self,
        personalizer: Personalizer,
        store: HistoryStore,
        *,
        unknown: Unknown = "population",
        phrases: Callable[[Sequence[str]], UserNgramCache] | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        if unknown not in UNKNOWN:
            raise ConfigError(f"Unknown users get one of {', '.join(UNKNOWN)}; found {unknown!r}.")
        if not 0 <= personalizer.persona_scale <= MAX_PERSONA_SCALE:
            raise ConfigError(f"persona_scale goes from 0 to {MAX_PERSONA_SCALE}; found {personalizer.persona_scale}.")
        if phrases is not None and not store.settings.keep_text:
            raise StoreConflict(
                "Phrases are read from items' texts, and the store keeps none. Make one with keep_text."
            )
        self.personalizer, self.store, self.unknown, self._phrases = personalizer, store, unknown, phrases
        self.plug = personalizer.plug
        _check_fits(self.plug, store)
        self._kept: LRUCache[tuple[str, str], _Kept] = LRUCache(cache_bytes, getsizeof=lambda kept: kept.bytes)
        self._forgotten = 0
        self._lock = threading.Lock()  # of what is kept
        self._making = threading.Lock()  # the plug's own memory of queries is for one thread at a time
        self._nobody = self._worth_keeping(self._history("", None))

    def persona(
        self,
        tenant: str,
        user: str | None,
        query: str,
        *,
        options: Options | None = None,
        persona_scale: float | None = None,
    ) -> Persona:
        """The soft tokens for a user's query.

        Args:
            tenant: whose user it is.
            user: None = nobody in particular.
            query: what is asked, as the plug's task cuts it out of a prompt.
            options: what the prompt lets choose from, for a plug that compares that.
            persona_scale: as `PersonaPlug.forward` takes it; None = the personalizer's.
        Raises:
            StorageError, EncoderMismatch, ItemError: as `HistoryStore.load_history`.
        """
        persona_scale = self.personalizer.persona_scale if persona_scale is None else persona_scale
        if persona_scale == 0:
            return Persona(None, "plain", 0, persona_scale)
        kept, at_hand = (self._nobody, True) if user is None else self._known(tenant, user)
        if not kept.items and self.unknown == "plain":
            return Persona(None, "plain", 0, persona_scale)
        soft = kept.soft if persona_scale == self.personalizer.persona_scale else None
        if soft is None:
            read = kept.read or self.personalizer.read(self._history(tenant, user))
            with self._making:
                soft = self.personalizer.of_read(query, read, options=options, persona_scale=persona_scale)
        applied: Literal["user", "population"] = "user" if kept.items > self.plug.few else "population"
        return Persona(soft, applied, kept.items, persona_scale, kept=at_hand, phrases=kept.phrases)

    def made(
        self, query: str, history: EncodedHistory, *, options: Options | None = None, persona_scale: float | None = None
    ) -> SoftPrompt:
        """Soft tokens for a query and a history that is given; see `Personalizer.of_history`."""
        with self._making:
            return self.personalizer.of_history(query, history, options=options, persona_scale=persona_scale)

    def selected(self, query: str, history: EncodedHistory) -> npt.NDArray[np.intp]:
        """Places of the items that a persona is made from, where the plug takes only the nearest to the query."""
        with self._making:
            return self.personalizer.selected(query, history.vectors)

    def weights(self, query: str, history: EncodedHistory) -> npt.NDArray[np.float32]:
        """How much each item counts; see `explain.item_weights`."""
        with self._making:
            return item_weights(self.personalizer, query, history)

    def forget(self, tenant: str, user: str) -> None:
        """Let go of what is kept of a user, at once: to be called when the user is erased or their history changes."""
        with self._lock:
            self._forgotten += 1
            self._kept.pop((tenant, user), None)

    @property
    def kept_users(self) -> int:
        """How many users something is kept of."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """How much that is."""
        return int(self._kept.currsize)

    def _known(self, tenant: str, user: str) -> tuple[_Kept, bool]:
        """What is kept of a user, or worth keeping from now on, and whether it was at hand."""
        version = self.store.version(tenant, user)
        with self._lock:
            kept, forgotten = self._kept.get((tenant, user)), self._forgotten
        if kept is not None and kept.version == version:
            return kept, True
        if not version:
            self.forget(tenant, user)
            return self._nobody, False
        kept = self._worth_keeping(self._history(tenant, user), phrases=self._phrases_of(tenant, user))
        with self._lock:
            # Nothing is put back that was read before somebody was forgotten: it may be what had to go.
            if self._forgotten == forgotten and kept.bytes <= self._kept.maxsize:
                self._kept[tenant, user] = kept
        return kept, False

    def _history(self, tenant: str, user: str | None) -> StoredHistory:
        if user is None:
            return _no_history(self.plug)
        return self.store.load_history(tenant, user, latest=self.plug.config.max_history)

    def _phrases_of(self, tenant: str, user: str) -> UserNgramCache | None:
        if self._phrases is None:
            return None
        latest = self.plug.config.max_history
        return self._phrases(past_answers(self.store.list_items(tenant, user, latest=latest), latest=latest))

    def _worth_keeping(self, history: StoredHistory, *, phrases: UserNgramCache | None = None) -> _Kept:
        """The tokens, if they are the same whatever is asked, else the history, read as far as that goes."""
        if self.plug.ignores_query:
            return _Kept(history.version, len(history), phrases, soft=self.made("", history))
        return _Kept(history.version, len(history), phrases, read=self.personalizer.read(history))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Kept:
    """What is kept of a user: soft tokens, or the read history that they are made from for each query."""

    version: int
    items: int
    phrases: UserNgramCache | None = None
    soft: SoftPrompt | None = None
    read: HistoryBatch | None = None

    @property
    def bytes(self) -> int:
        arrays = (self.soft.vectors.nbytes if self.soft else 0) + (self.read.nbytes if self.read else 0)
        return _OVERHEAD + arrays + (self.phrases.nbytes if self.phrases else 0)


def _no_history(plug: PersonaPlug) -> StoredHistory:
    return StoredHistory(
        vectors=np.empty((0, plug.spec.encoder.width), dtype=np.float16),
        answers=np.empty(0, dtype=np.int16),
        forms=style_features_of([]),
        version=0,
    )


def _check_fits(plug: PersonaPlug, store: HistoryStore) -> None:
    settings, config = store.settings, plug.config
    if not store.identity.same_items_as(plug.spec.encoder):
        raise EncoderMismatch("The plug", expected=plug.spec.encoder.describe(), found=store.identity.describe())
    if settings.encodes_answers != config.encodes_answers:
        ways = {True: "of whole items", False: "of items without the user's answer"}
        raise StoreConflict(
            f"The plug reads vectors {ways[config.encodes_answers]} (answer_channel={config.answer_channel}); "
            f"the store keeps "
            f"vectors {ways[settings.encodes_answers]}. Make a store with `store_settings(plug)`."
        )
    if config.reads_labels and settings.labels != plug.spec.labels:
        raise StoreConflict(
            f"The plug knows {len(plug.spec.labels)} labels as answers; the store was made with other ones "
            f"({len(settings.labels)}). Make a store with `store_settings(plug)`."
        )


def store_settings(plug: PersonaPlug, *, keep_text: bool = False) -> StoreSettings:
    """What a store of histories for a plug has to be made with.

    Args:
        keep_text: keep the items' fields too, for explanations that show them and for a later change of encoder.
    """
    labels = plug.spec.labels if plug.config.reads_labels else ()
    return StoreSettings(labels=labels, encodes_answers=plug.config.encodes_answers, keep_text=keep_text)
