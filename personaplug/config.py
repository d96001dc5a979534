"""Every setting of a run: its meaning, unit, default and range, once.

The YAML file, the command line's `key=value` and the help text are all made from the dataclasses below.
Keys are written in full (`training.learning_rate`) or, since no two sections share one, bare (`learning_rate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from personaplug.errors import BadConfig, MissingData, nearest


def _option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field with its help text and the values it may take (`low` and `high` included, `above` not)."""
    bounds = {"help": help, "low": low, "high": high, "above": above, "choices": tuple(choices)}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class ModelConfig:
    """The two frozen models, and how they run."""

    llm: str = _option(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "frozen language model: hub name, local folder, or `toy` (seeded, no download)",
    )
    encoder: str = _option(
        "sentence-transformers/all-MiniLM-L6-v2",
        "frozen behaviour encoder: hub name, local folder, or `hash` (no download)",
    )
    encoder_engine: str = _option(
        "torch",
        "what encodes items in bulk: torch; openvino (CPUs only, needs the extra `fast`; cosine to torch's vectors "
        "above 0.9999); auto = openvino where it is installed, faster and the same for a few texts, else torch",
        choices=("torch", "openvino", "auto"),
    )
    device: str = _option("auto", "where both run: auto, cpu, cuda, cuda:1, mps")
    dtype: str = _option(
        "auto",
        "the language model's number format; auto = bfloat16 where the hardware multiplies in it, else float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    max_prompt_tokens: int = _option(
        512, "longest prompt in tokens of the language model; the end of the text is cut and counted", low=8
    )
    keep_prompts: str = _option(
        "auto",
        "where the language model's states of prompts ahead of the soft tokens (placement=suffix) are kept, so that "
        "each is read once: auto = where they fit half of what is free: GPU, memory or disk ($TMPDIR)",
        choices=("auto", "memory", "disk", "nowhere"),
    )
    keep_gigabytes: float = _option(0.0, "most that kept prompts may take; 0 = half of what is free there", low=0)


@dataclass(frozen=True)
class PlugConfig:
    """The trained module. The defaults are the paper's (PPlug, arXiv 2409.11901)."""

    instruction_tokens: int = _option(1, "trained tokens that are the same for everybody (I in eq. 5)", low=0, high=256)
    persona_tokens: int = _option(
        1, "tokens made from the user's history (P in eq. 5); 0 = instruction only", low=0, high=256
    )
    placement: str = _option(
        "prefix",
        "where the soft tokens stand: prefix = before the text (the paper); suffix = right before the answer, so that "
        "the prompt is read once for all epochs, views and users",
        choices=("prefix", "suffix"),
    )
    aggregator: str = _option(
        "dot", "how items are weighed: dot (eq. 3) or mean (the paper's ablation)", choices=("dot", "mean")
    )
    temperature: float = _option(1.0, "divides the scores of eq. 3; 1 = the paper", above=0)
    query_encoder: str = _option(
        "trained",
        "eq. 2: trained = a whole trained copy of the encoder (the paper); head = frozen encoder + trained linear map",
        choices=("trained", "head"),
    )
    answers: str = _option(
        "text",
        "where an item's answer goes: text = into the encoded text (the paper's Table 7); label = one-hot beside the "
        "vector (closed label sets only); form = into the text, and how it is written (length, case, marks) beside the "
        "vector; auto = label for closed sets, else form",
        choices=("text", "label", "form", "auto"),
    )
    shrinkage: bool = _option(
        False,
        "weigh what is common to all users against the items, by a trained share that falls as items come; "
        "false = the paper: it counts for users without any item only",
    )
    projector_width: int = _option(0, "hidden width of the two-layer projector (eq. 4); 0 = the model's own", low=0)
    max_history: int = _option(512, "items used of a history, the latest ones; cuts are counted", low=1, high=512)
    selected_items: int = _option(
        0, "give the plug only so many items, the most similar to the query (the paper's Table 4); 0 = all", low=0
    )

    @property
    def encodes_answers(self) -> bool:
        """Whether the encoder reads items with their answers."""
        return self.answers != "label"


@dataclass(frozen=True)
class TrainingConfig:
    """The loop. Everything that is drawn at random comes from `seeds`."""

    seeds: tuple[int, ...] = _option((0,), "one plug (and one control) is trained per seed", low=0, high=2**32 - 1)
    controls: bool = _option(
        True, "also train instruction-only: same data, steps and number of soft tokens, no history"
    )
    epochs: int = _option(2, "passes over the training samples", low=1)
    max_steps: int = _option(0, "stop after this many steps; 0 = no bound", low=0)
    batch_size: int = _option(16, "samples in a step, over all processes", low=1)
    views: int = _option(0, "random sub-histories added per sample and epoch (the paper's code uses 10)", low=0)
    empty_share: float = _option(
        0.05,
        "share of samples whose history is hidden in an epoch, to train for users without one; 0 = the paper",
        low=0,
        high=1,
    )
    answer_end: str = _option(
        "auto",
        "whether answers are trained with the end of text behind them: always (the paper; needed where labels shall be "
        "written, decoding=generate); auto = not the labels of a closed set, which are scored",
        choices=("auto", "always"),
    )
    pass_tokens: int = _option(
        1024,
        "most tokens, padding included, in one forward and backward pass; larger batches are split and their gradients "
        "summed; 0 = no bound",
        low=0,
    )
    learning_rate: float = _option(3e-3, "of the projector and the query head (AdamW)", above=0, high=1)
    token_learning_rate: float = _option(
        0.3, "of the tokens that are trained as they stand: instruction and population", above=0, high=1
    )
    encoder_learning_rate: float = _option(5e-5, "of the trained copy of the encoder", low=0, high=1)
    weight_decay: float = _option(1e-4, "of AdamW", low=0, high=1)
    warmup_share: float = _option(
        0.05, "share of the steps in which the rate rises; it then falls linearly to 0", low=0, high=1
    )
    clip_norm: float = _option(1.0, "longest gradient; longer ones are scaled down to it", above=0)
    train_limit: int = _option(0, "use this many training samples, drawn by seed 0; 0 = all", low=0)
    validation_share: float = _option(
        0.1, "share of the training users held out to choose the checkpoint", above=0, high=0.5
    )
    validation_limit: int = _option(256, "samples of the held-out users that are scored at most", low=1)
    validate_every: int = _option(0, "steps between validations; 0 = four times an epoch", low=0)
    patience: int = _option(0, "stop after this many validations without a better loss; 0 = never", low=0)
    checkpoint_every: int = _option(25, "steps between states that a stopped run goes on from", low=1)
    tensorboard: bool = _option(False, "write TensorBoard events beside the JSON lines (needs the extra `tensorboard`)")


@dataclass(frozen=True)
class RetrievalConfig:
    """The rows that put texts of a history into the prompt: retrieved items, a written profile."""

    history_tokens: int = _option(
        0, "most tokens of a prompt for texts of the history; 0 = all that max_prompt_tokens leaves", low=0
    )
    profile_tokens: int = _option(64, "longest profile that the model writes of a user", low=4)
    retriever_candidates: int = _option(
        8, "items per query whose use to the model teaches the learned retriever (ROPG-KD)", low=2
    )
    retriever_samples: int = _option(0, "training samples that teach the learned retriever; 0 = all", low=0)
    retriever_temperature: float = _option(
        0.1, "divides the learned retriever's cosines before they are compared with the model's likelihoods", above=0
    )


@dataclass(frozen=True)
class AdapterConfig:
    """The per-user fine-tuning row: a LoRA for the task, then one per user (OPPU)."""

    lora_rank: int = _option(8, "rank of the matrices", low=1, high=256)
    lora_alpha: float = _option(16.0, "what the update is scaled by, over the rank", above=0)
    lora_targets: str = _option(
        "q_proj,v_proj", "names of the layers that get one, comma-separated; auto = PEFT's choice for the model"
    )
    lora_learning_rate: float = _option(1e-3, "of the task's LoRA and of each user's (AdamW)", above=0, high=1)
    user_epochs: int = _option(1, "passes over a user's own items", low=1)
    user_items: int = _option(64, "items a user's LoRA is trained on, the latest ones", low=1)
    user_batch_size: int = _option(4, "items in a step of a user's training", low=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """How answers are obtained and compared."""

    decoding: str = _option(
        "auto",
        "auto = score the label set where there is one, else generate",
        choices=("auto", "score", "generate"),
    )
    evaluation_batch_size: int = _option(16, "samples answered at once", low=1)
    num_beams: int = _option(4, "beams of generation (LaMP and the paper: 4; 1 = greedy)", low=1, high=64)
    sample_temperature: float = _option(
        0.0,
        "0 = the likeliest text; above = draw with this temperature (`generate` only; needs num_beams=1)",
        low=0,
        high=10,
    )
    max_new_tokens: int = _option(0, "longest answer in tokens; 0 = the task's own", low=0)
    rating_fallback: str = _option(
        "lamp",
        "score of an answer that is no number: lamp = the farthest end, pplug = first digit, else 1",
        choices=("lamp", "pplug"),
    )
    shown_items: int = _option(
        -1, "show only so many of each history's latest items at test time (a cold-start curve); -1 = all", low=-1
    )
    strength: float = _option(
        1.0,
        "how far a persona goes from what is common to all users to the user's own: 1 = as trained, above = farther; "
        "0 = no soft tokens at all, the plain model",
        low=0,
        high=10,
    )
    limit: int = _option(0, "score this many samples, drawn by `draw_seed`; 0 = all", low=0)
    draw_seed: int = _option(0, "draws the wrong users, the shuffles, the limit and the bootstrap", low=0)
    resamples: int = _option(10_000, "of the bootstrap by user", low=100)


@dataclass(frozen=True)
class Config:
    """Everything one run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    plug: PlugConfig = field(default_factory=PlugConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


BEFORE: dict[str, Any] = {
    "plug.placement": "prefix",
    "plug.shrinkage": False,
    "training.answer_end": "always",
    "evaluation.strength": 1.0,
}
"""What runs and results did whose settings were written down before there was this choice."""

_IN_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}

SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "plug": PlugConfig,
    "training": TrainingConfig,
    "retrieval": RetrievalConfig,
    "adapter": AdapterConfig,
    "evaluation": EvaluationConfig,
}


def load_config(path: str | Path | None = None, *, overrides: Iterable[str] = (), base: Config | None = None) -> Config:
    """Build a Config from a YAML file and `key=value` words; later ones win.

    Args:
        path: a YAML file of sections (`training: {epochs: 3}`) or bare keys (`epochs: 3`).
        overrides: words as typed on a command line.
        base: what to start from; the defaults otherwise.
    Raises:
        MissingData: if the file does not exist.
        BadConfig: for an unknown key, a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(flatten(read_yaml(Path(path))))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise BadConfig(f"Settings are written key=value; found {word!r}.")
        values[key.strip()] = _parse_yaml(text, source=f"the value of {key.strip()}")
    return with_values(base or Config(), values)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with some settings replaced, each checked.

    Raises:
        BadConfig: for an unknown key, a value of the wrong type or out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = _locate(key)
        changes.setdefault(section, {})[name] = _checked(section, name, value)
    return replace(config, **{s: replace(getattr(config, s), **new) for s, new in changes.items()})


def to_yaml(config: Config) -> str:
    """The whole of a config as YAML that `load_config` reads back to an equal one."""
    plain = {
        s: {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()} for s, part in asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def describe(sections: Sequence[str]) -> str:
    """The help text of some sections: each key with its default, meaning and range."""
    lines = []
    for section in sections:
        lines.append(f"{section}: {(SECTIONS[section].__doc__ or '').strip()}")
        for option in fields(SECTIONS[section]):
            lines.append(f"  {option.name}={_shown(_default(option))}")
            lines.append(f"      {option.metadata['help']}{_range_text(option)}")
    return "\n".join(lines)


def _default(option: Field[Any]) -> Any:
    return getattr(Config(), _locate(option.name)[0]).__getattribute__(option.name)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _range_text(option: Field[Any]) -> str:
    meta = option.metadata
    if meta["choices"]:
        return f" [{' | '.join(meta['choices'])}]"
    parts = [
        f"{word} {meta[key]}"
        for key, word in (("low", "from"), ("above", "above"), ("high", "to"))
        if meta[key] is not None
    ]
    return f" [{' '.join(parts)}]" if parts else ""


def _locate(key: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    known = {(s, f.name) for s, kind in SECTIONS.items() for f in fields(kind)}
    for found in known:
        if found == (section, name) or (not section and found[1] == name):
            return found
    names = {n for _, n in known} | {f"{s}.{n}" for s, n in known if section}
    raise BadConfig(f"There is no setting {key!r}; {nearest(key, names)}")


def _checked(section: str, name: str, value: Any) -> Any:
    option = next(f for f in fields(SECTIONS[section]) if f.name == name)
    wanted = get_type_hints(SECTIONS[section])[name]
    converted = _convert(value, wanted, key=f"{section}.{name}")
    several = converted if isinstance(converted, tuple) else (converted,)
    if len(set(several)) < len(several):
        raise BadConfig(f"{section}.{name} names a value twice: {_shown(converted)}. Name each once.")
    for single in several:
        _check_range(single, option, key=f"{section}.{name}")
    return converted


def _convert(value: Any, wanted: Any, *, key: str) -> Any:
    if wanted == tuple[int, ...]:
        several = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if not several:
            raise BadConfig(f"{key} needs at least one value, found none.")
        return tuple(_convert(_parse_yaml(str(v), source=key), int, key=key) for v in several)
    if wanted is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string, for want of a dot.
        try:
            return float(value)
        except ValueError:
            pass
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise BadConfig(f"{key} must be {_IN_WORDS.get(wanted, wanted.__name__)}; found {value!r}.")


def _check_range(value: Any, option: Field[Any], *, key: str) -> None:
    meta = option.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise BadConfig(f"{key} must be one of {', '.join(meta['choices'])}; found {value!r}.")
    if not isinstance(value, int | float):
        return
    too_low = meta["low"] is not None and not value >= meta["low"]
    not_above = meta["above"] is not None and not value > meta["above"]
    too_high = meta["high"] is not None and not value <= meta["high"]
    # The comparisons are negated so that NaN fails them too.
    if too_low or not_above or too_high:
        raise BadConfig(f"{key} must be a number{_range_text(option)}; found {value}.")


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        MissingData: if it is not there.
        BadConfig: if it is not valid YAML.
    """
    if not path.is_file():
        raise MissingData(f"The config file {path} does not exist.")
    try:
        return _parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    except UnicodeDecodeError:
        raise BadConfig(f"{path} is not UTF-8 text. Save it as UTF-8.") from None


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError as error:
        raise BadConfig(f"{source} is not valid YAML: {str(error).splitlines()[0]}.") from None


def flatten(tree: Any) -> dict[str, Any]:
    """Sections of settings (`training: {epochs: 3}`) or bare ones as a flat mapping that `with_values` takes.

    Raises:
        BadConfig: if it is no mapping.
    """
    if tree in (None, ""):
        return {}
    if not isinstance(tree, dict):
        raise BadConfig("A config file holds `section: {key: value}` or `key: value`; found something else.")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS and (value is None or isinstance(value, dict)):
            flat.update({f"{key}.{name}": inner for name, inner in (value or {}).items()})
        else:
            flat[str(key)] = value
    return flat
