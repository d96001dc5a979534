"""Build a Service from a run's folder: plug, history store, engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path

from personaplug.data.task_prompts import TaskPrompts
from personaplug.encoders import Encoder, open_encoder
from personaplug.errors import ConfigError, StoreConflict
from personaplug.llm.copied_answers import check_answers
from personaplug.llm.loading import choose_device
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec, read_description
from personaplug.run import COPY_HEAD, Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.copied_answers import AnswerReader
from personaplug.serving.engines import RegisteredEngine, find_engine
from personaplug.serving.engines.base import Engine, LoadPlug
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.serving.served_task import ServedPlug, ServedTask
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

logger = logging.getLogger(__name__)

_CACHE_BYTES = 256 * 2**20  # for the personas of all tasks


def open_service(
    run: Run,
    config: ServingConfig,
    *,
    others: Sequence[Run] = (),
    plugs: Mapping[str, Sequence[Run]] | None = None,
) -> Service:
    """Load the models and open the store, but do not start the engine.

    Args:
        others: runs of further tasks that share a plug with the first run.
        plugs: the runs of further plugs, by the name of a model in requests. They share the language model, the encoder
            and the store of the first run.
    """
    groups = {"": (run, *others), **(plugs or {})}
    runs = [each for group in groups.values() for each in group]
    has_concepts = any(each.task.name_field for each in runs)
    config = replace(config, keep_text=config.keep_text or has_concepts)  # of a new store
    registered = find_engine(config.engine)
    if config.copy_head:
        _check_copy_heads(runs, engine=registered, seed=config.seed)  # before the models are loaded
    if plugs:
        check_same_models(groups, seed=config.seed)
    encoder, load_plug = open_parts(run, seed=config.seed, encoder_engine=config.encoder_engine)
    engine, plug = registered.open(run.config.model, config, load_plug)
    plug.cache_queries([" "])  # compiles the encoder before the first request
    store = open_store(plug, encoder, config=config)
    opener = _TaskOpener(engine, encoder, store, plug, config, cache_bytes=_CACHE_BYTES // len(runs))
    first, *further = [opener.open_plug(name, group) for name, group in groups.items()]
    service = Service(
        first.personas,
        engine,
        task=run.task,
        wordings=run.wordings,
        apply_off_task=config.apply_off_task,
        others=first.tasks[1:],
        plugs=further,
        picture_threshold=config.picture_threshold,
    )
    for each in service.plugs:
        log_tasks([served.prompts for served in each.tasks], model=each.name)
    return service


@dataclass(frozen=True)
class _TaskOpener:
    """Opens the tasks of plugs that share an engine, an encoder and a store with the first plug."""

    engine: Engine
    encoder: Encoder
    store: HistoryStore
    first: PersonaPlug
    config: ServingConfig
    cache_bytes: int

    def open_plug(self, name: str, runs: Sequence[Run]) -> ServedPlug:
        """Open the tasks of a plug; an empty name stands for the first plug, which is already loaded."""
        seed = self.config.seed
        loaded = [] if name else [self.first]
        plugs = loaded + [_load_other(self.first, run, encoder=self.encoder, seed=seed) for run in runs[len(loaded) :]]
        if self.engine.is_remote and any(plug.config.placement != self.first.config.placement for plug in plugs):
            raise ConfigError(f"--run-for {name}: with vLLM, its plug needs the same placement as the plug of --run.")
        try:
            return ServedPlug(tuple(map(self._open_task, runs, plugs)), name)
        except StoreConflict as conflict:
            raise StoreConflict(f"--run-for {name}: {conflict}" if name else str(conflict)) from None

    def _open_task(self, run: Run, plug: PersonaPlug) -> ServedTask:
        personas = PersonaCache(
            Personalizer(plug, persona_scale=self.config.persona_scale),
            self.store,
            fallback=self.config.fallback,
            reader=_answer_reader(self.engine, run, self.config),
            cache_bytes=self.cache_bytes,
        )
        return ServedTask.of(run.task, personas, wordings=run.wordings)


def check_same_models(groups: Mapping[str, Sequence[Run]], *, seed: int | None) -> None:
    """Check that the plugs of all runs have the models of the first plug; ConfigError if they do not."""
    (_, first), *others = [(name, _spec_of(run, seed=seed)) for name, runs in groups.items() for run in runs]
    (llm, encoder), read_by_plug = (first.llm, first.encoder), attrgetter("fingerprint", "width", "chat_date")
    for name, spec in others:
        if read_by_plug(spec.llm) != read_by_plug(llm):
            raise ConfigError(_other_model(name, "language model", llm.describe(), spec.llm.describe()))
        if not encoder.same_items_as(spec.encoder):
            raise ConfigError(_other_model(name, "encoder", encoder.describe(), spec.encoder.describe()))


def _spec_of(run: Run, *, seed: int | None) -> PlugSpec:
    return read_description(_plug_folder(run, seed=seed))[1]


def _other_model(name: str, kind: str, expected: str, found: str) -> str:
    return (
        f"--run-for {name}: its plug was trained with another {kind} than the plug of --run, but one {kind} serves "
        f"both. Expected {expected}; found {found}. Train it with this {kind}, or start another server for it."
    )


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


def log_tasks(tasks: Sequence[TaskPrompts], *, model: str = "") -> None:
    """Log which prompts each task answers, and warn if a task answers none."""
    if model:
        logger.info("requests with the model %s:", model)
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


def open_parts(run: Run, *, seed: int | None, encoder_engine: str | None = None) -> tuple[Encoder, LoadPlug]:
    """Open a run's encoder, and return it with a function that loads the plug.

    Args:
        seed: None = the run's first seed.
        encoder_engine: None = the engine of the run.
    """
    folder = _plug_folder(run, seed=seed)
    models = run.config.model
    engine, device = encoder_engine or models.encoder_engine, choose_device(models.device)
    encoder = open_encoder(models.encoder, device=device, engine=engine)
    return encoder, lambda llm: PersonaPlug.from_pretrained(folder, encoder=encoder, llm=llm)


def _plug_folder(run: Run, *, seed: int | None) -> Path:
    return run.check_trained("plug", seed=run.config.training.seed_or_first(seed))


def open_store(plug: PersonaPlug, encoder: Encoder, *, config: ServingConfig) -> HistoryStore:
    """Open or create the store for a plug's histories."""
    open_with = partial(
        HistoryStore.open, config.store, retention=config.retention, secret=config.secret, create=config.create
    )
    keep_text, keep_pictures = config.keep_text or config.copy_head, config.keep_pictures
    try:
        return open_with(encoder, settings=store_settings(plug, keep_text=keep_text, keep_pictures=keep_pictures))
    except StoreConflict:
        # An existing store may have other settings. PersonaCache checks the ones that the plug needs.
        store = open_with(encoder)
        kept = store.settings
        missing = {"texts": keep_text > kept.keep_text, "pictures": keep_pictures > kept.keep_pictures}
        for name in (name for name, is_missing in missing.items() if is_missing):
            logger.warning("the store was created to keep no %s of items, so it keeps none; use a new store", name)
        return store
