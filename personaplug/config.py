"""All settings of a run: meaning, unit, default and range.

`config_parsing.py` derives YAML files, `key=value` words, the help text and the JSON schema from these classes.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

LEARNING_RATES = {"learning_rate": 0.001, "token_learning_rate": 0.1}
CHAT_LEARNING_RATES = {"learning_rate": 0.1, "token_learning_rate": 1.0}
"""Defaults for labels and texts, and for conversations. Each was chosen on held-out users."""

WARMUP_RATIO, PARTS_WARMUP_RATIO = 0.05, 0.2
"""Defaults for items of texts alone, and for items with pictures or vectors, where a short warmup can diverge."""

MAX_PERSONA_SCALE = 10
"""Upper bound of `persona_scale`; see `PersonaPlug.forward`."""

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _check_day(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise ValueError("expected auto or a day such as 2026-11-29")
    return text if text == "auto" else date.fromisoformat(text).isoformat()


def _as_text(value: object) -> object:
    return value.isoformat() if isinstance(value, date) else value  # YAML parses a day as a date


Day = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check_day)]

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The two frozen models and how they run."""

    llm: str = Field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="frozen language model: hub name, local folder, package:NAME, or `toy` (random weights, no "
        "download)",
    )
    encoder: str = Field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        description="frozen encoder of history items: hub name, local folder, package:NAME, or `hash` (no download)",
    )
    encoder_engine: Literal["torch", "openvino", "auto"] = Field(
        default="torch",
        description="library that encodes items in bulk and queries: torch; openvino (CPU only, needs the extra "
        "`fast`; cosine similarity to torch's vectors above 0.9999); auto = openvino if it is installed and a probe "
        "shows that it is faster with equal vectors, else torch",
    )
    device: str = Field(default="auto", description="device of both models: auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="number format of the language model; auto = bfloat16 if the hardware supports it, else float32",
    )
    max_prompt_tokens: int = Field(
        default=512,
        description="maximum prompt length in tokens; longer prompts are truncated at the end, and counted",
        ge=8,
    )
    chat_date: Day = Field(
        default="auto",
        description="date for chat templates that write the current date, such as 2026-11-29; auto = the day on which "
        "the run is created; other templates ignore it",
    )
    prompt_cache: Literal["auto", "memory", "disk", "nowhere"] = Field(
        default="auto",
        description="where to cache the hidden states of prompts, so that each prompt is computed once "
        "(placement=suffix); auto = the first of GPU, memory and disk ($TMPDIR) in which the cache needs "
        "at most half of the free space",
    )
    prompt_cache_gigabytes: float = Field(
        default=0.0, description="maximum size of the prompt cache; 0 = half of the free space in that place", ge=0
    )


@dataclass(frozen=True, config=STRICT)
class PlugConfig:
    """The trained module. docs/plug.md explains the defaults; `preset=paper` selects the plug of the paper."""

    instruction_tokens: int = Field(
        default=4, description="trained tokens that all users share (I in eq. 5)", ge=0, le=256
    )
    persona_tokens: int = Field(
        default=4,
        description="tokens computed from the user's history (P in eq. 5); 0 = instruction only",
        ge=0,
        le=256,
    )
    instruction_start: Literal["auto", "words", "random"] = Field(
        default="auto",
        description="initialization of the instruction tokens: words = embedded tokens of training answers, drawn by "
        "seed; random; auto = words for free text, random for a closed label set",
    )
    placement: Literal["prefix", "suffix"] = Field(
        default="suffix",
        description="position of the soft tokens: prefix = before the text (the paper); suffix = right before the "
        "answer, so that each prompt is computed once for all epochs, views and users",
    )
    temperature: float = Field(
        default=0.1, description="softmax temperature of eq. 3; 1 = the paper, with nearly equal weights", gt=0
    )
    state_tokens: int = Field(
        default=2,
        description="persona tokens that weigh all items equally and ignore the query (the user's state); 0 = the "
        "paper; equal to persona_tokens = no attention to the query (an ablation)",
        ge=0,
        le=256,
    )
    query_encoder: Literal["trained", "head"] = Field(
        default="head",
        description="query encoder of eq. 2: trained = a trained copy of the encoder (the paper); head = the frozen "
        "encoder with a trained linear map",
    )
    answer_channel: Literal["text", "label", "style", "all", "auto"] = Field(
        default="auto",
        description="how the plug reads the answer of a history item: text = in the encoded text (the paper's Table "
        "7); label = one-hot beside the vector (closed sets only); style = in the text, and its length, "
        "case and punctuation beside the vector; all = in the text, and its label (if it has one) and "
        "style beside the vector; auto = label for closed sets with answers in the items, text for other "
        "closed sets, style for free text, all if tasks share a plug",
    )
    shrinkage: bool = Field(
        default=True,
        description="mix the population persona into a user's persona; its trained share falls as the user has more "
        "items; false = the paper: only users without items get the population persona",
    )
    kinds: bool = Field(
        default=True,
        description="distinguish rejected answers and stated preferences from answers, and reserve a trained share of "
        "the weight for preferences; false = the paper: all items are treated alike",
    )
    item_parts: Literal["all", "text", "picture", "vector"] = Field(
        default="all",
        description="parts of an item that the plug reads, if the encoder has several: all, or one of them alone (the "
        "rows `plug:text`, `plug:picture` and `plug:vector`)",
    )
    options: Literal["ignore", "compare", "auto"] = Field(
        default="auto",
        description="options in the prompt that stand for the labels ([1]: … [2]: …): compare = one more token with "
        "the similarity of each option to the question and to the user's items; auto = compare if the "
        "task's query_pattern has a group for each label",
    )
    label_prior: Literal["neighbors", "counts", "none", "auto"] = Field(
        default="auto",
        description="add the log frequency of each label in the user's answers, relative to all users, to the label "
        "scores: neighbors = above all in answers to similar questions, by a trained metric; counts = in all answers; "
        "none = the paper; auto = neighbors for closed sets with answers in the items, if labels are scored and no "
        "tasks share the plug; else none",
    )
    max_history: int = Field(
        default=512,
        description="maximum history items; only the latest are used, and the others are counted",
        ge=1,
        le=512,
    )

    @property
    def soft_tokens(self) -> int:
        """Total number of soft tokens (S)."""
        compared = self.options == "compare" and self.persona_tokens > 0
        return self.instruction_tokens + self.persona_tokens + compared

    @property
    def encodes_answers(self) -> bool:
        """Whether the text that the encoder reads includes the item's answer."""
        return self.answer_channel != "label"

    @property
    def reads_history(self) -> bool:
        """Whether the plug uses the user's items."""
        return self.persona_tokens > 0 or self.label_prior != "none"

    @property
    def projects_labels(self) -> bool:
        """Whether the projector gets an item's label beside its vector."""
        return self.persona_tokens > 0 and self.answer_channel in ("label", "all")

    @property
    def reads_labels(self) -> bool:
        """Whether the plug uses the label of an item's answer."""
        return self.label_prior != "none" or self.projects_labels

    @property
    def reads_style(self) -> bool:
        """Whether the plug uses the style of an item's answer."""
        return self.answer_channel in ("style", "all")


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The training loop. `seeds` determines everything random."""

    seeds: tuple[Seed, ...] = Field(default=(0,), description="train one plug and one control for each seed")
    controls: bool = Field(
        default=True,
        description="also train instruction-only: same data, steps and number of soft tokens, no history; users with "
        "up to five items get its tokens, or the plug's tokens for no items, if this lowers the loss of "
        "held-out users",
    )
    epochs: int = Field(default=5, description="passes over the training samples", ge=1)
    max_steps: int = Field(default=0, description="stop after this many steps; 0 = no limit", ge=0)
    batch_size: int = Field(default=16, description="samples per step, over all processes", ge=1)
    views: int = Field(
        default=0, description="random sub-histories added per sample and epoch (the paper's code uses 10)", ge=0
    )
    drop_history_prob: float = Field(
        default=0.2,
        description="share of samples per epoch whose history is hidden, to train for users without a history; 0 = "
        "the paper",
        ge=0,
        le=1,
    )
    subsample_history_prob: float = Field(
        default=0.7,
        description="share of samples per epoch that use a random part of their history (at least one item); prevents "
        "the plug from memorizing histories, and trains it for short ones; 0 = the paper",
        ge=0,
        le=1,
    )
    train_eos: Literal["auto", "always"] = Field(
        default="auto",
        description="train answers with the end-of-text token: always (the paper; needed for decoding=generate on "
        "labels); auto = only free text, because labels of a closed set are scored",
    )
    preference_loss: Literal["none", "dpo", "simpo"] = Field(
        default="none",
        description="extra loss for samples with rejected answers; it lowers their likelihood relative to the "
        "accepted answer: dpo uses the plain model as reference, simpo uses no reference",
    )
    preference_weight: float = Field(
        default=1.0, description="weight of preference_loss against the loss of the answers", ge=0, le=100
    )
    max_tokens_per_microbatch: int = Field(
        default=1024,
        description="maximum tokens, padding included, in one forward and backward pass; larger batches are split and "
        "their gradients summed; 0 = no limit",
        ge=0,
    )
    learning_rate: float = Field(
        default=0.0,
        description="AdamW learning rate of the projector and the query head; 0 = 0.1 for conversations, 0.001 for "
        "other tasks",
        ge=0,
        le=1,
    )
    token_learning_rate: float = Field(
        default=0.0,
        description="learning rate of the tokens that are parameters (instruction and population); 0 = 1 for "
        "conversations, 0.1 for other tasks",
        ge=0,
        le=1,
    )
    encoder_learning_rate: float = Field(
        default=5e-5, description="learning rate of the trained copy of the encoder (query_encoder=trained)", ge=0, le=1
    )
    weight_decay: float = Field(default=1e-4, description="weight decay of AdamW", ge=0, le=1)
    warmup_ratio: float = Field(
        default=0.0,
        description="share of the steps in which the learning rate rises; it then falls linearly to 0; 0 = 0.2 if "
        "items have pictures or vectors, 0.05 otherwise",
        ge=0,
        le=1,
    )
    max_grad_norm: float = Field(
        default=1.0, description="gradients with a larger norm are scaled down to this norm", gt=0
    )
    train_limit: int = Field(default=0, description="maximum training samples, drawn by seed 0; 0 = all", ge=0)
    validation_share: float = Field(
        default=0.1, description="share of the training users held out to choose the checkpoint", gt=0, le=0.5
    )
    validation_limit: int = Field(default=256, description="maximum samples of held-out users to score", ge=1)
    eval_steps: int = Field(default=0, description="steps between validations; 0 = validate four times per epoch", ge=0)
    save_steps: int = Field(
        default=25, description="steps between checkpoints; a stopped run resumes from the last checkpoint", ge=1
    )
    report_to: Literal["none", "tensorboard", "wandb", "all"] = Field(
        default="none",
        description="also report losses and personal gain to TensorBoard, to Weights & Biases, or to both (all); each "
        "needs the extra of its name",
    )

    def seed_or_first(self, seed: int | None) -> int:
        """Return a seed, or the first seed of the training if it is None."""
        return self.seeds[0] if seed is None else seed


@dataclass(frozen=True, config=STRICT)
class RetrievalConfig:
    """The table rows that add texts of the history to the prompt: retrieved items, or a generated profile."""

    history_tokens: int = Field(
        default=0,
        description="maximum tokens of a prompt for texts of the history; 0 = the rest of max_prompt_tokens",
        ge=0,
    )
    profile_tokens: int = Field(
        default=64, description="maximum length in tokens of the profile that the model writes of a user", ge=4
    )
    retriever_candidates: int = Field(
        default=8, description="items per query whose usefulness to the model trains the retriever (ROPG-KD)", ge=2
    )
    retriever_samples: int = Field(default=0, description="maximum training samples of the retriever; 0 = all", ge=0)


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """The table rows with LoRA: one adapter for the task, then one for each user (OPPU)."""

    lora_rank: int = Field(default=8, description="rank of the LoRA matrices", ge=1, le=256)
    lora_alpha: float = Field(default=16.0, description="scale of the LoRA update, divided by the rank", gt=0)
    lora_targets: str = Field(
        default="q_proj,v_proj",
        description="names of the layers that get a LoRA, comma-separated; auto = PEFT's default for the model",
    )
    lora_learning_rate: float = Field(
        default=1e-3, description="AdamW learning rate of the task's LoRA and of each user's LoRA", gt=0, le=1
    )
    user_epochs: int = Field(default=1, description="passes over a user's own items", ge=1)
    user_items: int = Field(
        default=64, description="maximum items to train a user's LoRA on; the latest are used", ge=1
    )
    user_batch_size: int = Field(default=4, description="items per step in the training of a user's LoRA", ge=1)


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How to predict and how to compare predictions."""

    decoding: Literal["auto", "score", "generate"] = Field(
        default="auto",
        description="score = take the most likely label of a closed set; generate = generate text; auto = score if "
        "possible",
    )
    evaluation_batch_size: int = Field(default=16, description="samples per batch", ge=1)
    num_beams: int = Field(
        default=4, description="beams for generation (LaMP and the paper: 4; 1 = greedy)", ge=1, le=64
    )
    sample_temperature: float = Field(
        default=0.0,
        description="0 = the most likely text; above 0 = sample with this temperature (`generate` only; needs "
        "num_beams=1). Also the temperature of `sampled_answers`, where 0 means 1",
        ge=0,
        le=10,
    )
    sampled_answers: int = Field(
        default=0,
        description="sampled answers for each sample of an evaluation, for the expected score and the best of them "
        "(free text; 8 shows differences that one answer hides); 0 = none",
        ge=0,
        le=64,
    )
    max_new_tokens: int = Field(
        default=0, description="maximum answer length in tokens; 0 = the task's own limit", ge=0, le=65_536
    )
    max_eval_history: int = Field(
        default=-1,
        description="maximum items of each history in the evaluation (a cold-start curve); the latest are used; -1 = "
        "all",
        ge=-1,
    )
    item_kinds: Literal["all", "answers", "preferences"] = Field(
        default="all",
        description="kinds of history items in the evaluation: answers (with rejected answers), stated preferences, "
        "or all",
    )
    persona_scale: float = Field(
        default=1.0,
        description="strength of the persona: 1 = as trained; above 1 = farther from what all users share; 0 = no "
        "soft tokens (the plain model)",
        ge=0,
        le=MAX_PERSONA_SCALE,
    )
    identification_samples: int = Field(
        default=0,
        description="samples on which rows with personas must tell the user from 19 others by likelihood (free text; "
        "about 20 more answers per sample); 0 = none",
        ge=0,
    )
    limit: int = Field(default=0, description="maximum samples to score, drawn by `draw_seed`; 0 = all", ge=0)
    draw_seed: int = Field(
        default=0, description="seed that draws the wrong users, the shuffles, the limit and the bootstrap", ge=0
    )
    resamples: int = Field(default=10_000, description="resamples of the bootstrap over users", ge=100)


@dataclass(frozen=True, config=STRICT)
class Config:
    """All settings of one run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    plug: PlugConfig = Field(default_factory=PlugConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "plug": PlugConfig,
    "training": TrainingConfig,
    "retrieval": RetrievalConfig,
    "adapter": AdapterConfig,
    "evaluation": EvaluationConfig,
}

FIXED = ("model", "plug", "training", "retrieval", "adapter")
"""The sections that trained parts depend on."""

SPEED_ONLY = (
    *("model.device", "model.encoder_engine", "model.prompt_cache", "model.prompt_cache_gigabytes"),
    "training.report_to",
)
"""Settings of these sections that affect only speed, place and reports, not results."""

PAPER = PlugConfig(
    instruction_tokens=1,
    persona_tokens=1,
    instruction_start="random",
    placement="prefix",
    temperature=1.0,
    state_tokens=0,
    query_encoder="trained",
    answer_channel="text",
    shrinkage=False,
    kinds=False,
    options="ignore",
    label_prior="none",
)
"""The plug of the paper (PPlug, arXiv 2409.11901, eq. 1 to 5 and Table 7)."""

PRESETS: dict[str, Config] = {
    "default": Config(),
    "paper": Config(
        plug=PAPER, training=TrainingConfig(train_eos="always", drop_history_prob=0.0, subsample_history_prob=0.0)
    ),
}
"""Starting points of a config, by name: `preset=paper`."""
