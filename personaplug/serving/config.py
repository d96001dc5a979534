"""Settings of a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from personaplug.errors import ConfigError
from personaplug.serving.persona_cache import Fallback
from personaplug.store.history_store import Retention


@dataclass(frozen=True)
class ServingConfig:
    """Settings for serving a run. The help of `personaplug serve` describes the other ones.

    Attributes:
        store: file or URL of the history store.
        create: create the store if it does not exist.
        gguf: file of the engine `llamacpp`, or `package:NAME`.
        retention: retention rules of the store; None = the rules that it was last opened with.
        seed: training seed of the plug to serve; None = the run's first seed.
    """

    store: str
    create: bool = True
    secret: Path | None = None
    engine: str = "local"
    engine_key: str | None = None
    gguf: str = ""
    model: str = ""
    seed: int | None = None
    fallback: Fallback = "population"
    persona_scale: float = 1.0
    apply_off_task: bool = False
    keep_text: bool = False
    keep_pictures: bool = False
    copy_head: bool = False
    picture_threshold: float | None = None
    retention: Retention | None = None
    encoder_engine: str = "auto"
    max_rows: int = 16
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if (self.engine == "llamacpp") != bool(self.gguf):
            raise ConfigError("--engine llamacpp and --gguf FILE must be given together.")
