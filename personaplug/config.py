"""Every setting of a run: its meaning, unit, default and range, once.

The YAML file, the command line's `key=value`, the help text and the JSON schema come from these classes
(`config_parsing.py`).
"""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

LEARNING_RATES = {"learning_rate": 0.001, "token_learning_rate": 0.1}
CHAT_LEARNING_RATES = {"learning_rate": 0.1, "token_learning_rate": 1.0}
"""Unless they are given; chosen on held-out users of labels and texts, and of conversations."""

MAX_PERSONA_SCALE = 10
"""The farthest that a persona may go beyond what is common to all users; see `PersonaPlug.forward`."""

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _check_day(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise ValueError("expected auto or a day such as 2026-11-29")
    return text if text == "auto" else date.fromisoformat(text).isoformat()


def _as_text(value: object) -> object:
    return value.isoformat() if isinstance(value, date) else value  # YAML reads a day as a date


Day = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check_day)]

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The two frozen models, and how they run."""

    llm: str = Field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="frozen language model: hub name, local folder, package:NAME, or `toy` (seeded, no download)",
    )
    encoder: str = Field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        description="frozen encoder of history items: hub name, local folder, package:NAME, or `hash` (no download)",
    )
    encoder_engine: Literal["torch", "openvino", "auto"] = Field(
        default="torch",
        description="what encodes items in bulk: torch; openvino (CPU only, needs the extra `fast`; cosine to torch's "
        "vectors above 0.9999); auto = openvino if it is installed, faster and equal on a probe, else torch",
    )
    device: str = Field(default="auto", description="where both models run: auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="number format of the language model; auto = bfloat16 if the hardware supports it, else float32",
    )
    max_prompt_tokens: int = Field(
        default=512, description="longest prompt in tokens; the end of a longer text is cut and counted", ge=8
    )
    chat_date: Day = Field(
        default="auto",
        description="day that a chat template writes if it would write today's date, such as 2026-11-29; auto = the "
        "day on which the run is made; other templates hold no date",
    )
    prompt_cache: Literal["auto", "memory", "disk", "nowhere"] = Field(
        default="auto",
        description="where the hidden states of prompts are cached, so that each is read once (placement=suffix); auto "
        "= the first of GPU, memory and disk ($TMPDIR) with half of its free space enough",
    )
    prompt_cache_gigabytes: float = Field(
        default=0.0, description="largest prompt cache; 0 = half of what is free in that place", ge=0
    )


@dataclass(frozen=True, config=STRICT)
class PlugConfig:
    """The trained module. The defaults proved personal (docs/plug.md); `preset=paper` gives the plug of the paper."""

    instruction_tokens: int = Field(
        default=4, description="trained tokens that are the same for everybody (I in eq. 5)", ge=0, le=256
    )
    persona_tokens: int = Field(
        default=4, description="tokens made from the user's history (P in eq. 5); 0 = instruction only", ge=0, le=256
    )
    instruction_start: Literal["auto", "words", "random"] = Field(
        default="auto",
        description="initial instruction tokens: words = embedded tokens of training answers, drawn by seed; random; "
        "auto = words for free text, random for a closed set",
    )
    placement: Literal["prefix", "suffix"] = Field(
        default="suffix",
        description="position of the soft tokens: prefix = before the text (the paper); suffix = right before the "
        "answer, so that each prompt is read once for all epochs, views and users",
    )
    temperature: float = Field(
        default=0.1, description="divides the scores of eq. 3; 1 = the paper, with nearly equal weights", gt=0
    )
    state_tokens: int = Field(
        default=2,
        description="persona tokens that weigh all items equally, whatever the query: the user's state; 0 = the paper; "
        "all of persona_tokens = no attention to the query (an ablation)",
        ge=0,
        le=256,
    )
    query_encoder: Literal["trained", "head"] = Field(
        default="head",
        description="eq. 2: trained = a trained copy of the encoder (the paper); head = frozen encoder and a trained "
        "linear map",
    )
    answer_channel: Literal["text", "label", "style", "all", "auto"] = Field(
        default="auto",
        description="where an item's answer goes: text = into the encoded text (the paper's Table 7); label = one-hot "
        "beside the vector (closed sets only); style = into the text, with its length, case and marks beside the "
        "vector; all = into the text, with its label, if it is one, and its style beside the vector; auto = label for "
        "closed sets with answers in the items, text for other closed sets, else style; all if tasks share a plug",
    )
    shrinkage: bool = Field(
        default=True,
        description="mix the population persona into a user's, by a trained share that falls with more items; false = "
        "the paper: only users without items get it",
    )
    kinds: bool = Field(
        default=True,
        description="tell rejected answers and stated preferences from answers, and keep a trained share of the weight "
        "for preferences; false = the paper: an item is an item",
    )
    options: Literal["ignore", "compare", "auto"] = Field(
        default="auto",
        description="options in the prompt that stand for the labels ([1]: … [2]: …): compare = one more token with "
        "the likeness of each to the question and to the user's items; auto = compare if the task's query_pattern has "
        "a group for each label",
    )
    label_prior: Literal["own", "none"] = Field(
        default="none",
        description="own = add log(P(label | user) / P(label)), scaled by a trained weight, to the labels' scores; "
        "needs a closed set and items with answers from it; none = the paper",
    )
    max_history: int = Field(
        default=512, description="latest items of a history that are used; older ones are cut and counted", ge=1, le=512
    )

    @property
    def soft_tokens(self) -> int:
        """Number of soft tokens in all (S)."""
        compared = self.options == "compare" and self.persona_tokens > 0
        return self.instruction_tokens + self.persona_tokens + compared

    @property
    def encodes_answers(self) -> bool:
        """Whether the encoder reads items with their answers."""
        return self.answer_channel != "label"

    @property
    def reads_history(self) -> bool:
        """Whether the plug uses a user's items at all."""
        return self.persona_tokens > 0 or self.label_prior == "own"

    @property
    def projects_labels(self) -> bool:
        """Whether the label of an item's answer goes beside its vector."""
        return self.persona_tokens > 0 and self.answer_channel in ("label", "all")

    @property
    def reads_labels(self) -> bool:
        """Whether the plug uses the label of an item's answer."""
        return self.label_prior == "own" or self.projects_labels

    @property
    def reads_style(self) -> bool:
        """Whether the plug uses the style of an item's answer."""
        return self.answer_channel in ("style", "all")


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The training loop. Everything random comes from `seeds`."""

    seeds: tuple[Seed, ...] = Field(default=(0,), description="one plug and one control are trained for each seed")
    controls: bool = Field(
        default=True,
        description="also train instruction-only: same data, steps and number of soft tokens, no history; users with "
        "up to five items get its tokens, or the plug's own for no items, if held-out users lose less by that",
    )
    epochs: int = Field(default=5, description="passes over the training samples", ge=1)
    max_steps: int = Field(default=0, description="stop after this many steps; 0 = no bound", ge=0)
    batch_size: int = Field(default=16, description="samples in a step, over all processes", ge=1)
    views: int = Field(
        default=0, description="random sub-histories added for each sample and epoch (the paper's code uses 10)", ge=0
    )
    drop_history_prob: float = Field(
        default=0.2,
        description="share of samples with a hidden history in an epoch, to train for users without one; 0 = the paper",
        ge=0,
        le=1,
    )
    subsample_history_prob: float = Field(
        default=0.7,
        description="share of samples that show a random part of their history in an epoch, from one item up: keeps "
        "the plug from learning histories by heart, and trains it for short ones; 0 = the paper",
        ge=0,
        le=1,
    )
    train_eos: Literal["auto", "always"] = Field(
        default="auto",
        description="train answers with the end-of-text token: always (the paper; needed for decoding=generate on "
        "labels); auto = not for labels of a closed set, which are scored",
    )
    preference_loss: Literal["none", "dpo", "simpo"] = Field(
        default="none",
        description="added for samples with rejected answers, whose likelihood it lowers beside that of the kept "
        "answer: dpo compares with the plain model, simpo with nothing",
    )
    preference_weight: float = Field(default=1.0, description="of that loss beside that of the answers", ge=0, le=100)
    max_tokens_per_microbatch: int = Field(
        default=1024,
        description="most tokens, padding included, in one forward and backward pass; larger batches are split and "
        "their gradients summed; 0 = no bound",
        ge=0,
    )
    learning_rate: float = Field(
        default=0.0,
        description="of the projector and the query head (AdamW); 0 = 0.1 for conversations, 0.001 for other tasks",
        ge=0,
        le=1,
    )
    token_learning_rate: float = Field(
        default=0.0,
        description="of the tokens that are parameters: instruction and population; 0 = 1 for conversations, 0.1 for "
        "other tasks",
        ge=0,
        le=1,
    )
    encoder_learning_rate: float = Field(default=5e-5, description="of the trained copy of the encoder", ge=0, le=1)
    weight_decay: float = Field(default=1e-4, description="of AdamW", ge=0, le=1)
    warmup_ratio: float = Field(
        default=0.05, description="share of the steps with a rising rate; it then falls linearly to 0", ge=0, le=1
    )
    max_grad_norm: float = Field(default=1.0, description="longer gradients are scaled down to this norm", gt=0)
    train_limit: int = Field(default=0, description="use this many training samples, drawn by seed 0; 0 = all", ge=0)
    validation_share: float = Field(
        default=0.1, description="share of the training users held out to choose the checkpoint", gt=0, le=0.5
    )
    validation_limit: int = Field(default=256, description="most samples of the held-out users that are scored", ge=1)
    eval_steps: int = Field(default=0, description="steps between validations; 0 = four times an epoch", ge=0)
    save_steps: int = Field(default=25, description="steps between checkpoints that a stopped run resumes from", ge=1)
    tensorboard: bool = Field(
        default=False, description="write TensorBoard events beside the JSON lines (needs the extra `tensorboard`)"
    )


@dataclass(frozen=True, config=STRICT)
class RetrievalConfig:
    """The rows that put texts of a history into the prompt: retrieved items, a written profile."""

    history_tokens: int = Field(
        default=0,
        description="most tokens of a prompt for texts of the history; 0 = all that max_prompt_tokens leaves",
        ge=0,
    )
    profile_tokens: int = Field(default=64, description="longest profile that the model writes of a user", ge=4)
    retriever_candidates: int = Field(
        default=8, description="items for each query whose use to the model trains the retriever (ROPG-KD)", ge=2
    )
    retriever_samples: int = Field(default=0, description="training samples of the trained retriever; 0 = all", ge=0)


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """The rows with LoRA: one for the task, then one for each user (OPPU)."""

    lora_rank: int = Field(default=8, description="rank of the matrices", ge=1, le=256)
    lora_alpha: float = Field(default=16.0, description="scale of the update, over the rank", gt=0)
    lora_targets: str = Field(
        default="q_proj,v_proj",
        description="names of the layers with a LoRA, comma-separated; auto = PEFT's choice for the model",
    )
    lora_learning_rate: float = Field(
        default=1e-3, description="of the task's LoRA and of each user's (AdamW)", gt=0, le=1
    )
    user_epochs: int = Field(default=1, description="passes over a user's own items", ge=1)
    user_items: int = Field(default=64, description="latest items that a user's LoRA is trained on", ge=1)
    user_batch_size: int = Field(default=4, description="items in a step of a user's training", ge=1)


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How predictions are made and compared."""

    decoding: Literal["auto", "score", "generate"] = Field(
        default="auto",
        description="score = the likeliest label of a closed set; generate = write; auto = score if possible",
    )
    evaluation_batch_size: int = Field(default=16, description="samples in a batch", ge=1)
    num_beams: int = Field(
        default=4, description="beams of generation (LaMP and the paper: 4; 1 = greedy)", ge=1, le=64
    )
    sample_temperature: float = Field(
        default=0.0,
        description="0 = the likeliest text; above = sample with this temperature (`generate` only; needs num_beams=1)",
        ge=0,
        le=10,
    )
    max_new_tokens: int = Field(default=0, description="longest answer in tokens; 0 = the task's own", ge=0, le=65_536)
    max_eval_history: int = Field(
        default=-1, description="show only this many latest items of each history (a cold-start curve); -1 = all", ge=-1
    )
    item_kinds: Literal["all", "answers", "preferences"] = Field(
        default="all",
        description="items of each history that rows are shown: answers (with the rejected ones), stated preferences, "
        "or all",
    )
    persona_scale: float = Field(
        default=1.0,
        description="how far a persona goes from what is common to all users: 1 = as trained, above = farther; 0 = no "
        "soft tokens, the plain model",
        ge=0,
        le=MAX_PERSONA_SCALE,
    )
    limit: int = Field(default=0, description="score this many samples, drawn by `draw_seed`; 0 = all", ge=0)
    draw_seed: int = Field(
        default=0, description="draws the wrong users, the shuffles, the limit and the bootstrap", ge=0
    )
    resamples: int = Field(default=10_000, description="of the bootstrap over users", ge=100)


@dataclass(frozen=True, config=STRICT)
class Config:
    """Everything that one run needs."""

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
)
"""The plug of the paper (PPlug, arXiv 2409.11901, eq. 1 to 5 and Table 7)."""

PRESETS: dict[str, Config] = {
    "default": Config(),
    "paper": Config(
        plug=PAPER, training=TrainingConfig(train_eos="always", drop_history_prob=0.0, subsample_history_prob=0.0)
    ),
}
"""Starting points of a config, by name: `preset=paper`."""
