"""Build a Service from a run's folder: plug, store of histories, language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from personaplug.encoders import Encoder, open_encoder
from personaplug.errors import ConfigError, StoreConflict
from personaplug.infra.model_hub import find_model
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.loading import choose_device, open_llm
from personaplug.llm.ngram_cache import check_ngrams
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run
from personaplug.serving.engines.base import Engine
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.persona_cache import BuildPhrases, Fallback, PersonaCache, store_settings
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore, Retention

LOCAL = "local"
"""The engine in this process. Any other name is the address of a vLLM server."""


@dataclass(frozen=True)
class ServingConfig:
    """How a run is served; the options of `personaplug serve` explain the rest.

    Attributes:
        store: file or URL of the histories.
        create: make the store if it does not exist.
        seed: of the training; None = the run's first.
        retention: which items of a user are kept.
    """

    store: str
    create: bool = True
    secret: Path | None = None
    engine: str = LOCAL
    engine_key: str | None = None
    model: str = ""
    seed: int | None = None
    fallback: Fallback = "population"
    persona_scale: float = 1.0
    apply_off_task: bool = False
    keep_text: bool = False
    phrases: bool = False
    retention: Retention = field(default_factory=Retention)
    max_rows: int = 16
    max_new_tokens: int = 512


def open_service(run: Run, config: ServingConfig) -> Service:
    """Load the models and open the store. The engine is not started yet."""
    if config.phrases:  # before the models are loaded
        check_ngrams(run.task)
        if config.engine != LOCAL:
            raise ConfigError(
                "Phrases are mixed in by the local engine; vLLM chooses its tokens itself. Leave --phrases out."
            )
    models = run.config.model
    encoder = open_encoder(models.encoder, device=choose_device(models.device), engine=models.encoder_engine)
    seed = run.config.training.seeds[0] if config.seed is None else config.seed
    folder = run.check_trained("plug", seed=seed)
    open_engine = _open_local if config.engine == LOCAL else _open_vllm
    plug, engine, build_phrases = open_engine(run, config, folder=folder, encoder=encoder)
    personas = PersonaCache(
        Personalizer(plug, persona_scale=config.persona_scale),
        open_store(plug, encoder, config=config),
        fallback=config.fallback,
        build_phrases=build_phrases,
    )
    return Service(personas, engine, task=run.task, apply_off_task=config.apply_off_task)


_Opened = tuple[PersonaPlug, Engine, BuildPhrases | None]


def _open_local(run: Run, config: ServingConfig, *, folder: Path, encoder: Encoder) -> _Opened:
    llm = open_llm(run.config.model)
    name = run.config.model.llm
    if not isinstance(llm, CausalLM):
        raise ConfigError(f"{name} reads prompts with an encoder of its own; the server cannot run that kind.")
    plug = PersonaPlug.from_pretrained(folder, encoder=encoder, llm=llm.identity)
    engine = InProcessEngine(
        llm, name=config.model or name, max_rows=config.max_rows, max_new_tokens=config.max_new_tokens
    )
    return plug.compute_items_in(llm.dtype).to(llm.device), engine, llm.build_ngram_cache if config.phrases else None


def _open_vllm(run: Run, config: ServingConfig, *, folder: Path, encoder: Encoder) -> _Opened:
    # The engine checks vLLM's model when it starts, by its width and by its answers to these embeddings.
    plug = PersonaPlug.from_pretrained(folder, encoder=encoder, llm=None).compute_items_in("bfloat16")
    engine = VLLMEngine(
        config.engine,
        table=EmbeddingTable.of_folder(find_model(run.config.model.llm)),
        width=plug.spec.llm.width,
        placement=plug.config.placement,
        model=config.model,
        key=config.engine_key,
    )
    return plug, engine, None


def open_store(plug: PersonaPlug, encoder: Encoder, *, config: ServingConfig) -> HistoryStore:
    """Open the store of a plug's histories; make it if it does not exist and `config.create` is true."""
    opened = partial(HistoryStore.open, config.store, retention=config.retention, secret=config.secret)
    if not config.create:
        opened().close()  # without an encoder, no store is made
    settings = store_settings(plug, keep_text=config.keep_text or config.phrases)
    try:
        return opened(encoder, settings=settings)
    except StoreConflict:
        # An existing store may differ in what it keeps; PersonaCache checks what the plug needs.
        return opened(encoder)
