"""Build a Service from a run's folder: plug, history store, engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from personaplug.data.task_prompts import TaskPrompts
from personaplug.encoders import Encoder, open_encoder
from personaplug.errors import ConfigError, StoreConflict
from personaplug.llm.copied_answers import check_answers
from personaplug.llm.loading import choose_device
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import COPY_HEAD, Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.copied_answers import AnswerReader
from personaplug.serving.engines import RegisteredEngine, find_engine
from personaplug.serving.engines.base import Engine, LoadPlug
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.serving.served_task import ServedTask
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

logger = logging.getLogger(__name__)

_CACHE_BYTES = 256 * 2**20  # for the personas of all tasks


def open_service(run: Run, config: ServingConfig, *, others: Sequence[Run] = ()) -> Service:
    """Load the models and open the store, but do not start the engine.

    Args:
        others: runs of further tasks that share a plug with the first run.
    """
    registered = find_engine(config.engine)
    if config.copy_head:
        _check_copy_heads((run, *others), engine=registered, seed=config.seed)  # before the models are loaded
    encoder, load_plug = open_parts(run, seed=config.seed)
    engine, plug = registered.open(run.config.model, config, load_plug)
    store = open_store(plug, encoder, config=config)
    plugs = [plug, *(_load_other(plug, other, encoder=encoder, seed=config.seed) for other in others)]
    first, *further = [
        PersonaCache(
            Personalizer(each_plug, persona_scale=config.persona_scale),
            store,
            fallback=config.fallback,
            reader=_answer_reader(engine, each, config),
            cache_bytes=_CACHE_BYTES // len(plugs),
        )
        for each, each_plug in zip((run, *others), plugs, strict=True)
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


def _answer_reader(engine: Engine, run: Run, config: ServingConfig) -> AnswerReader | None:
    seed = run.config.training.seed_or_first(config.seed)
    return engine.load_copy_head(run, seed=seed) if config.copy_head else None


def _check_copy_heads(runs: Sequence[Run], *, engine: RegisteredEngine, seed: int | None) -> None:
    for run in runs:
        check_answers(run.task)
    if not engine.supports_copy_head:
        raise ConfigError("This engine does not support --copy-head. Remove --copy-head or use --engine local.")
    for run in runs:
        run.check_trained(COPY_HEAD, seed=run.config.training.seed_or_first(seed))


def log_tasks(tasks: Sequence[TaskPrompts]) -> None:
    """Log which prompts each task answers, and warn if a task answers none."""
    chats = [prompts.task.name for prompts in tasks if prompts.task.kind == "chat"]
    for prompts in tasks:
        if prompts.task.name in chats[1:]:
            logger.warning("task %s: answers no prompts, because task %s answers chats", prompts.task.name, chats[0])
        else:
            _log_task(prompts, is_alone=len(tasks) == 1)


def _load_other(plug: PersonaPlug, run: Run, *, encoder: Encoder, seed: int | None) -> PersonaPlug:
    """Load the plug of another task for the same models, on the same device."""
    other = PersonaPlug.from_pretrained(_plug_folder(run, seed=seed), encoder=encoder, llm=plug.spec.llm)
    if plug.persona is not None and other.persona is not None:
        other.persona.item_dtype = plug.persona.item_dtype
    return other.to(plug.instruction.device)


def _log_task(prompts: TaskPrompts, *, is_alone: bool) -> None:
    description = prompts.describe()
    if prompts.task.kind == "chat":
        condition = "" if is_alone else " that matches no other task's wording"
        logger.info("task %s: uses a persona for every user message of a chat%s", description["name"], condition)
        return
    wordings = " or ".join(map(repr, description["wordings"]))
    logger.info("task %s: uses a persona for prompts with the wording %s", description["name"], wordings)
    if not is_alone and not prompts.is_distinct:
        logger.warning("task %s: answers no prompts, because no wording identifies its prompts", description["name"])
    elif not any(wording.opening or wording.lead for wording in prompts.wordings):
        logger.warning("the training prompts share no wording, so only the task's marker or pattern identifies them")


def open_parts(run: Run, *, seed: int | None) -> tuple[Encoder, LoadPlug]:
    """Open a run's encoder, and return it with a function that loads the plug. Seed None = the run's first seed."""
    folder = _plug_folder(run, seed=seed)
    models = run.config.model
    encoder = open_encoder(models.encoder, device=choose_device(models.device), engine=models.encoder_engine)
    return encoder, lambda llm: PersonaPlug.from_pretrained(folder, encoder=encoder, llm=llm)


def _plug_folder(run: Run, *, seed: int | None) -> Path:
    return run.check_trained("plug", seed=run.config.training.seed_or_first(seed))


def open_store(plug: PersonaPlug, encoder: Encoder, *, config: ServingConfig) -> HistoryStore:
    """Open or create the store for a plug's histories."""
    open_with = partial(
        HistoryStore.open, config.store, retention=config.retention, secret=config.secret, create=config.create
    )
    try:
        return open_with(encoder, settings=store_settings(plug, keep_text=config.keep_text or config.copy_head))
    except StoreConflict:
        # An existing store may have other settings. PersonaCache checks the ones that the plug needs.
        return open_with(encoder)
