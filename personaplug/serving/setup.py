"""What a server needs, put together from a run's folder: plug, store of histories, language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personaplug.encoders import Encoder, open_encoder
from personaplug.errors import ConfigError, StoreConflict
from personaplug.infra.model_hub import find_model
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.loading import choose_device, open_llm
from personaplug.llm.ngram_cache import UserNgramCache, check_ngrams
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run
from personaplug.serving.engines.base import Engine
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.persona_cache import PersonaCache, Unknown, store_settings
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore, Retention

LOCAL = "local"
"""The engine in this process; any other is the address of a vLLM server."""


@dataclass(frozen=True)
class ServingConfig:
    """How a run is served.

    Attributes:
        store: file or URL of the histories; a file is made where there is none.
        create: whether to make a store where there is none.
        secret: file of the store's secret; None = beside SQLite's file.
        engine: `local`, or the address of a vLLM server (http://…).
        engine_key: that the vLLM server asks for, if any.
        model: by what name requests call the model; empty = that of the run's config, or vLLM's own.
        seed: which of the run's trainings; None = the first.
        unknown: what users get whose history is unknown.
        persona_scale: of personas, where a request does not say.
        elsewhere: use personas also for prompts without the wording of the run's task.
        keep_text: keep the texts of items, in a store that is made now.
        phrases: mix the phrases of users' own answers into what the local engine writes; needs a store with texts.
        retention: what is kept of a user.
        max_rows: answers that the local engine writes side by side.
        max_new_tokens: longest answer of the local engine.
    """

    store: str
    create: bool = True
    secret: Path | None = None
    engine: str = LOCAL
    engine_key: str | None = None
    model: str = ""
    seed: int | None = None
    unknown: Unknown = "population"
    persona_scale: float = 1.0
    elsewhere: bool = False
    keep_text: bool = False
    phrases: bool = False
    retention: Retention = field(default_factory=Retention)
    max_rows: int = 16
    max_new_tokens: int = 512


def open_service(run: Run, hosting: ServingConfig) -> Service:
    """Load what a run's plug needs, open the store, and make a service of them; the engine is not started yet.

    Raises:
        MissingData: if the run has no finished plug, or the store's secret is not there.
        StoreConflict, EncoderMismatch: if the store was made for another plug.
        ConfigError: if the engine cannot serve this plug.
    """
    if hosting.phrases:
        _check_phrases(run, hosting)  # before the models are loaded
    config = run.config.model
    encoder = open_encoder(config.encoder, device=choose_device(config.device), engine=config.encoder_engine)
    seed = run.config.training.seeds[0] if hosting.seed is None else hosting.seed
    folder = run.check_trained("plug", seed=seed)
    engine: Engine
    phrases: Callable[[Sequence[str]], UserNgramCache] | None = None
    if hosting.engine == LOCAL:
        llm = open_llm(config)
        if not isinstance(llm, CausalLM):
            raise ConfigError(
                f"{config.llm} reads prompts with an encoder of its own; the server cannot run that kind."
            )
        plug = PersonaPlug.from_pretrained(folder, encoder=encoder, llm=llm.identity)
        plug = plug.computing_items_in(llm.dtype).to(llm.device)
        phrases = llm.build_ngram_cache if hosting.phrases else None
        name = hosting.model or config.llm
        engine = InProcessEngine(llm, name=name, max_rows=hosting.max_rows, max_new_tokens=hosting.max_new_tokens)
    else:
        # Which model vLLM runs is seen when the engine starts: by its width, and by what it makes of these embeddings.
        plug = PersonaPlug.from_pretrained(folder, encoder=encoder, llm=None).computing_items_in("bfloat16")
        engine = VLLMEngine(
            hosting.engine,
            table=EmbeddingTable.of_folder(find_model(config.llm)),
            width=plug.spec.llm.width,
            placement=plug.config.placement,
            model=hosting.model,
            key=hosting.engine_key,
        )
    personas = PersonaCache(
        Personalizer(plug, persona_scale=hosting.persona_scale),
        open_store(plug, encoder, hosting=hosting),
        unknown=hosting.unknown,
        phrases=phrases,
    )
    return Service(personas, engine, task=run.task, elsewhere=hosting.elsewhere)


def _check_phrases(run: Run, hosting: ServingConfig) -> None:
    check_ngrams(run.task)
    if hosting.engine != LOCAL:
        raise ConfigError(
            "Phrases are mixed in by the local engine; vLLM chooses its tokens itself. Leave --phrases out."
        )


def open_store(plug: PersonaPlug, encoder: Encoder, *, hosting: ServingConfig) -> HistoryStore:
    """The store of histories that a plug's personas are made from; made if it is not there.

    Raises:
        StoreConflict: if its secret is another.
    """
    common = {"retention": hosting.retention, "secret": hosting.secret}
    if not hosting.create:
        HistoryStore.open(hosting.store, **common).close()  # type: ignore[arg-type]  # without an encoder, none is made
    wanted = store_settings(plug, keep_text=hosting.keep_text or hosting.phrases)
    try:
        return HistoryStore.open(hosting.store, encoder, settings=wanted, **common)  # type: ignore[arg-type]
    except StoreConflict:
        # One that is there may keep texts or not, and vectors as it likes; whether it fits the plug is seen later.
        return HistoryStore.open(hosting.store, encoder, **common)  # type: ignore[arg-type]
