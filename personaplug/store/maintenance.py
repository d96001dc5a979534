"""Maintenance: a thread of a server that removes expired items and finishes interrupted erasures."""

from __future__ import annotations

import logging
import threading

from personaplug.errors import PersonaPlugError
from personaplug.store.history_store import HistoryStore

logger = logging.getLogger(__name__)

_PAUSE_S = 600.0


class Maintenance:
    """Calls `HistoryStore.maintain` every ten minutes until it is stopped."""

    def __init__(self, store: HistoryStore) -> None:
        self._store, self._stopped = store, threading.Event()
        threading.Thread(target=self._run, name="personaplug-maintenance", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(_PAUSE_S):
            try:
                self._store.maintain()
            except PersonaPlugError as error:
                logger.warning("Maintenance of the store failed and is retried in %.0f s: %s", _PAUSE_S, error)
