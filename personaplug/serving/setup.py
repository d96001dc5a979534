"""Build a Service from a run's folder: plug, store of histories, engine."""

from __future__ import annotations

import logging
from functools import partial

from personaplug.encoders import Encoder, open_encoder
from personaplug.errors import ConfigError, StoreConflict
from personaplug.llm.loading import choose_device
from personaplug.llm.ngram_cache import check_ngrams
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines import find_engine
from personaplug.serving.engines.base import LoadPlug
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

logger = logging.getLogger(__name__)


def open_service(run: Run, config: ServingConfig) -> Service:
    """Load the models and open the store. The engine is not started yet."""
    registered = find_engine(config.engine)
    if config.phrases:  # before the models are loaded
        check_ngrams(run.task)
        if not registered.supports_phrases:
            raise ConfigError(
                "Phrases are mixed in by the local engine; this one chooses its tokens itself. Leave --phrases out."
            )
    encoder, load_plug = open_parts(run, seed=config.seed)
    engine, plug = registered.open(run.config.model, config, load_plug)
    personas = PersonaCache(
        Personalizer(plug, persona_scale=config.persona_scale),
        _open_store(plug, encoder, config=config),
        fallback=config.fallback,
        build_phrases=engine.build_phrases if config.phrases else None,
    )
    service = Service(personas, engine, task=run.task, wordings=run.wordings, apply_off_task=config.apply_off_task)
    _log_task(service)
    return service


def _log_task(service: Service) -> None:
    about = service.prompts.describe()
    if service.task.kind == "chat":
        logger.info("task %s: every message of a user in a chat is answered with a persona", about["name"])
        return
    wordings = " or ".join(map(repr, about["wordings"]))
    logger.info("task %s: prompts are personal in the wording %s", about["name"], wordings)
    if not any(wording.opening or wording.lead for wording in service.prompts.wordings):
        logger.warning("the training prompts have no wording in common: the task's marker or pattern alone decides")


def open_parts(run: Run, *, seed: int | None) -> tuple[Encoder, LoadPlug]:
    """Open a run's encoder, and a loader of its plug. A seed of None is the run's first."""
    folder = run.check_trained("plug", seed=run.config.training.seeds[0] if seed is None else seed)
    models = run.config.model
    encoder = open_encoder(models.encoder, device=choose_device(models.device), engine=models.encoder_engine)
    return encoder, lambda llm: PersonaPlug.from_pretrained(folder, encoder=encoder, llm=llm)


def _open_store(plug: PersonaPlug, encoder: Encoder, *, config: ServingConfig) -> HistoryStore:
    open_store = partial(
        HistoryStore.open, config.store, retention=config.retention, secret=config.secret, create=config.create
    )
    try:
        return open_store(encoder, settings=store_settings(plug, keep_text=config.keep_text or config.phrases))
    except StoreConflict:
        # An existing store may differ in what it keeps; PersonaCache checks what the plug needs.
        return open_store(encoder)
