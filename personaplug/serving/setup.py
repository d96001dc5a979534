"""Build a Service from a run's folder: plug, store of histories, engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from personaplug.data.task_prompts import TaskPrompts
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
from personaplug.serving.served_task import ServedTask
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

logger = logging.getLogger(__name__)

_CACHE_BYTES = 256 * 2**20  # of the personas of all tasks


def open_service(run: Run, config: ServingConfig, *, others: Sequence[Run] = ()) -> Service:
    """Load the models and open the store. The engine is not started yet.

    Args:
        others: the runs of further tasks, which share a plug with the first one.
    """
    registered = find_engine(config.engine)
    if config.phrases:  # before the models are loaded
        for own in (run, *others):
            check_ngrams(own.task)
        if not registered.supports_phrases:
            raise ConfigError(
                "Phrases are mixed in by the local engine; this one chooses its tokens itself. Leave --phrases out."
            )
    encoder, load_plug = open_parts(run, seed=config.seed)
    engine, plug = registered.open(run.config.model, config, load_plug)
    store = open_store(plug, encoder, config=config)
    plugs = [plug, *(_load_beside(plug, other, encoder=encoder, seed=config.seed) for other in others)]
    first, *further = [
        PersonaCache(
            Personalizer(own, persona_scale=config.persona_scale),
            store,
            fallback=config.fallback,
            build_phrases=engine.build_phrases if config.phrases else None,
            cache_bytes=_CACHE_BYTES // len(plugs),
        )
        for own in plugs
    ]
    service = Service(
        first,
        engine,
        task=run.task,
        wordings=run.wordings,
        apply_off_task=config.apply_off_task,
        others=[
            ServedTask.of(other.task, personas, wordings=other.wordings)
            for other, personas in zip(others, further, strict=True)
        ],
    )
    log_tasks([served.prompts for served in service.tasks])
    return service


def log_tasks(tasks: Sequence[TaskPrompts]) -> None:
    """Say which prompts each task gets, and warn of a task that gets none."""
    chats = [prompts.task.name for prompts in tasks if prompts.task.kind == "chat"]
    for prompts in tasks:
        if prompts.task.name in chats[1:]:
            logger.warning("task %s: it gets no prompt, because %s answers conversations", prompts.task.name, chats[0])
        else:
            _log_task(prompts, is_alone=len(tasks) == 1)


def _load_beside(plug: PersonaPlug, run: Run, *, encoder: Encoder, seed: int | None) -> PersonaPlug:
    """Load the plug of another task for the same models, on the same device."""
    other = PersonaPlug.from_pretrained(_plug_folder(run, seed=seed), encoder=encoder, llm=plug.spec.llm)
    if plug.persona is not None and other.persona is not None:
        other.persona.item_dtype = plug.persona.item_dtype
    return other.to(plug.instruction.device)


def _log_task(prompts: TaskPrompts, *, is_alone: bool) -> None:
    about = prompts.describe()
    if prompts.task.kind == "chat":
        where = "in a chat" if is_alone else "in a chat, but in no other task's wording,"
        logger.info("task %s: every message of a user %s is answered with a persona", about["name"], where)
        return
    wordings = " or ".join(map(repr, about["wordings"]))
    logger.info("task %s: prompts are personal in the wording %s", about["name"], wordings)
    if not is_alone and not prompts.is_distinct:
        logger.warning("task %s: nothing tells its prompts from others, so none is taken for one", about["name"])
    elif not any(wording.opening or wording.lead for wording in prompts.wordings):
        logger.warning("the training prompts have no wording in common: the task's marker or pattern alone decides")


def open_parts(run: Run, *, seed: int | None) -> tuple[Encoder, LoadPlug]:
    """Open a run's encoder, and a loader of its plug. A seed of None is the run's first."""
    folder = _plug_folder(run, seed=seed)
    models = run.config.model
    encoder = open_encoder(models.encoder, device=choose_device(models.device), engine=models.encoder_engine)
    return encoder, lambda llm: PersonaPlug.from_pretrained(folder, encoder=encoder, llm=llm)


def _plug_folder(run: Run, *, seed: int | None) -> Path:
    return run.check_trained("plug", seed=run.config.training.seeds[0] if seed is None else seed)


def open_store(plug: PersonaPlug, encoder: Encoder, *, config: ServingConfig) -> HistoryStore:
    """Open the store of a plug's histories, or create it."""
    open_it = partial(
        HistoryStore.open, config.store, retention=config.retention, secret=config.secret, create=config.create
    )
    try:
        return open_it(encoder, settings=store_settings(plug, keep_text=config.keep_text or config.phrases))
    except StoreConflict:
        # An existing store may differ in what it keeps; PersonaCache checks what the plug needs.
        return open_it(encoder)
