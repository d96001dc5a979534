"""Every setting of a run: its meaning, unit, default and range, once.

The YAML file, the command line's `key=value` and the help text are all made from these dataclasses (`config_text.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_PERSONA_SCALE = 10
"""How far a persona may go beyond what is common to all users; see `PersonaPlug.forward`."""


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
        "frozen language model: hub name, local folder, `package:NAME` = an installed Python package that carries one, "
        "or `toy` (seeded, no download)",
    )
    encoder: str = _option(
        "sentence-transformers/all-MiniLM-L6-v2",
        "frozen behaviour encoder: hub name, local folder, `package:NAME`, or `hash` (no download)",
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
    prompt_cache: str = _option(
        "auto",
        "where the language model's states of prompts ahead of the soft tokens (placement=suffix) are kept, so that "
        "each is read once: auto = where they fit half of what is free: GPU, memory or disk ($TMPDIR)",
        choices=("auto", "memory", "disk", "nowhere"),
    )
    prompt_cache_gigabytes: float = _option(
        0.0, "most that kept prompts may take; 0 = half of what is free there", low=0
    )


@dataclass(frozen=True)
class PlugConfig:
    """The trained module. The defaults are what proved personal (docs/plug.md); `PAPER` is the paper's plug."""

    instruction_tokens: int = _option(4, "trained tokens that are the same for everybody (I in eq. 5)", low=0, high=256)
    persona_tokens: int = _option(
        4, "tokens made from the user's history (P in eq. 5); 0 = instruction only", low=0, high=256
    )
    instruction_start: str = _option(
        "auto",
        "what instruction tokens are before training: words = tokens of training answers, drawn by seed, which the "
        "model understands from the first step on; random; auto = words for free text, random for a closed set, whose "
        "labels would only bias it",
        choices=("auto", "words", "random"),
    )
    placement: str = _option(
        "suffix",
        "where the soft tokens stand: prefix = before the text (the paper); suffix = right before the answer, so that "
        "the prompt is read once for all epochs, views and users",
        choices=("prefix", "suffix"),
    )
    aggregator: str = _option(
        "dot",
        "how items are weighed: dot = by likeness to the query (eq. 3); mean = all alike (the paper's ablation)",
        choices=("dot", "mean"),
    )
    temperature: float = _option(
        0.1, "divides the scores of eq. 3; 1 = the paper, where all items weigh nearly the same", above=0
    )
    state_tokens: int = _option(
        2,
        "of the persona tokens, so many are made of all items alike, whatever is asked: the user's state, which can be "
        "kept; 0 = the paper; no matter with aggregator=mean, where all are",
        low=0,
        high=256,
    )
    query_encoder: str = _option(
        "head",
        "eq. 2: trained = a whole trained copy of the encoder (the paper); head = frozen encoder + trained linear map",
        choices=("trained", "head"),
    )
    answer_channel: str = _option(
        "auto",
        "where an item's answer goes: text = into the encoded text (the paper's Table 7); label = one-hot beside the "
        "vector (closed label sets only); style = into the text, and its length, case and marks beside the vector; "
        " auto = label for closed sets whose items hold answers, text for other closed sets, else style",
        choices=("text", "label", "style", "auto"),
    )
    shrinkage: bool = _option(
        True,
        "weigh what is common to all users against the items, by a trained share that falls as items come; "
        "false = the paper: it counts for users without any item only",
    )
    options: str = _option(
        "auto",
        "options that stand in the prompt for the labels ([1]: … [2]: …): compare = one more token, which says how "
        "like the question and the user's items each is; ignore; auto = compare where the task's query_pattern has a "
        "group for each label",
        choices=("ignore", "compare", "auto"),
    )
    label_prior: str = _option(
        "none",
        "what the shares of the labels among a user's own answers, against everybody's, add to the labels' scores: "
        "own = times a trained number, where a closed set's labels are scored and the items hold answers from it; "
        "none = nothing (the paper)",
        choices=("own", "none"),
    )
    projector_width: int = _option(0, "hidden width of the two-layer projector (eq. 4); 0 = the model's own", low=0)
    max_history: int = _option(512, "items used of a history, the latest ones; cuts are counted", low=1, high=512)
    selected_items: int = _option(
        0, "give the plug only so many items, the most similar to the query (the paper's Table 4); 0 = all", low=0
    )

    @property
    def soft_tokens(self) -> int:
        """How many tokens it makes in all (S)."""
        compared = self.options == "compare" and self.persona_tokens > 0
        return self.instruction_tokens + self.persona_tokens + compared

    @property
    def keeps_state(self) -> bool:
        """Whether some persona tokens, and not all, are the same whatever is asked."""
        return self.aggregator != "mean" and self.state_tokens > 0

    @property
    def encodes_answers(self) -> bool:
        """Whether the encoder reads items with their answers."""
        return self.answer_channel != "label"

    @property
    def reads_history(self) -> bool:
        """Whether anything of a user's items is looked at."""
        return self.persona_tokens > 0 or self.label_prior == "own"

    @property
    def reads_labels(self) -> bool:
        """Whether it matters which of the task's labels an item's answer is."""
        return self.label_prior == "own" or (self.persona_tokens > 0 and self.answer_channel == "label")

    @property
    def reads_forms(self) -> bool:
        """Whether the form of answers is noted."""
        return self.answer_channel == "style"


@dataclass(frozen=True)
class TrainingConfig:
    """The loop. Everything that is drawn at random comes from `seeds`."""

    seeds: tuple[int, ...] = _option((0,), "one plug (and one control) is trained per seed", low=0, high=2**32 - 1)
    controls: bool = _option(
        True,
        "also train instruction-only: same data, steps and number of soft tokens, no history; users without items get "
        "its tokens or the plug's own, and users of up to five items the same, while held-out users lose less by that",
    )
    epochs: int = _option(5, "passes over the training samples", low=1)
    max_steps: int = _option(0, "stop after this many steps; 0 = no bound", low=0)
    batch_size: int = _option(16, "samples in a step, over all processes", low=1)
    views: int = _option(0, "random sub-histories added per sample and epoch (the paper's code uses 10)", low=0)
    drop_history_prob: float = _option(
        0.2,
        "share of samples whose history is hidden in an epoch, to train for users without one; 0 = the paper",
        low=0,
        high=1,
    )
    subsample_history_prob: float = _option(
        0.7,
        "share of samples of whose history an epoch shows a random part only, from one item up: keeps the plug from "
        "learning histories by heart, and makes it serve short ones; 0 = the paper",
        low=0,
        high=1,
    )
    train_eos: str = _option(
        "auto",
        "whether answers are trained with the end of text behind them: always (the paper; needed where labels shall be "
        "written, decoding=generate); auto = not the labels of a closed set, which are scored",
        choices=("auto", "always"),
    )
    max_tokens_per_microbatch: int = _option(
        1024,
        "most tokens, padding included, in one forward and backward pass; larger batches are split and their gradients "
        "summed; 0 = no bound",
        low=0,
    )
    learning_rate: float = _option(1e-3, "of the projector and the query head (AdamW)", above=0, high=1)
    token_learning_rate: float = _option(
        0.1, "of the tokens that are trained as they stand: instruction and population", above=0, high=1
    )
    encoder_learning_rate: float = _option(5e-5, "of the trained copy of the encoder", low=0, high=1)
    weight_decay: float = _option(1e-4, "of AdamW", low=0, high=1)
    warmup_ratio: float = _option(
        0.05, "share of the steps in which the rate rises; it then falls linearly to 0", low=0, high=1
    )
    max_grad_norm: float = _option(1.0, "longest gradient; longer ones are scaled down to it", above=0)
    train_limit: int = _option(0, "use this many training samples, drawn by seed 0; 0 = all", low=0)
    validation_share: float = _option(
        0.1, "share of the training users held out to choose the checkpoint", above=0, high=0.5
    )
    validation_limit: int = _option(256, "samples of the held-out users that are scored at most", low=1)
    eval_steps: int = _option(0, "steps between validations; 0 = four times an epoch", low=0)
    early_stopping_patience: int = _option(
        0, "stop after this many validations without a better loss; 0 = never", low=0
    )
    save_steps: int = _option(25, "steps between states that a stopped run goes on from", low=1)
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
    unparsable_rating: str = _option(
        "lamp",
        "score of an answer that is no number: lamp = the farthest end, pplug = first digit, else 1",
        choices=("lamp", "pplug"),
    )
    max_eval_history: int = _option(
        -1, "show only so many of each history's latest items at test time (a cold-start curve); -1 = all", low=-1
    )
    persona_scale: float = _option(
        1.0,
        "how far a persona goes from what is common to all users to the user's own: 1 = as trained, above = farther; "
        "0 = no soft tokens at all, the plain model",
        low=0,
        high=MAX_PERSONA_SCALE,
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


PAPER = PlugConfig(
    instruction_tokens=1,
    persona_tokens=1,
    instruction_start="random",
    placement="prefix",
    aggregator="dot",
    temperature=1.0,
    state_tokens=0,
    query_encoder="trained",
    answer_channel="text",
    shrinkage=False,
    options="ignore",
    label_prior="none",
    projector_width=0,
    max_history=512,
    selected_items=0,
)
"""The plug as the paper has it (PPlug, arXiv 2409.11901, eq. 1 to 5 and Table 7)."""

BEFORE: dict[str, Any] = {
    "plug.instruction_start": "random",
    "plug.placement": "prefix",
    "plug.state_tokens": 0,
    "plug.shrinkage": False,
    "plug.options": "ignore",
    "plug.label_prior": "none",
    "training.subsample_history_prob": 0.0,
    "training.train_eos": "always",
    "evaluation.persona_scale": 1.0,
}
"""What runs and results did whose settings were written down before there was this choice."""

_GONE = ("plug.heads",)


def without_gone(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that were written down, without those that there are no more, which changed nothing by themselves."""
    return {key: value for key, value in values.items() if key not in _GONE}


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "plug": PlugConfig,
    "training": TrainingConfig,
    "retrieval": RetrievalConfig,
    "adapter": AdapterConfig,
    "evaluation": EvaluationConfig,
}
