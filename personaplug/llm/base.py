"""Interface and common code of frozen language models that take soft prompts.

The placement `prefix` inserts soft tokens into the embedded prompt, right before the user's text (PPlug, eq. 5:
[I; P; x]). `soft_at` moves them further back, for example after retrieved texts (Table 3). The placement `suffix` puts
them right before the answer, so the prompt's states depend on neither plug nor user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from personaplug.data.records import Prompt
from personaplug.errors import ConfigError
from personaplug.infra.model_hub import LLMIdentity, fingerprint
from personaplug.llm.chunked_cross_entropy import log_softmax, token_divergence, token_loss
from personaplug.llm.copy_head import Copying
from personaplug.llm.fp32_logits import use_fp32_logits
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.padding import pad_with_mask
from personaplug.llm.prompt_cache import CachePlan, PromptStates
from personaplug.llm.prompt_state import Layout, PromptState
from personaplug.llm.prompt_tokenizer import Ids, PromptTokenizer
from personaplug.llm.soft_prompt import SoftPrompt, Spliced, splice
from personaplug.llm.token_embedding import TokenEmbedding, find_factor, find_per_layer

if TYPE_CHECKING:
    from personaplug.llm.check_results import ModelCheck


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings, named as in transformers' GenerationConfig."""

    max_new_tokens: int = 128
    num_beams: int = 1  # more than 1 = beam search
    do_sample: bool = False  # False = greedy
    temperature: float = 1.0  # for sampling
    top_p: float = 1.0  # for sampling
    seed: int = 0  # for sampling

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.num_beams) < 1:
            raise ConfigError(
                f"max_new_tokens and num_beams must be 1 or more; found {self.max_new_tokens} and {self.num_beams}."
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature must be above 0 and top_p in (0, 1]; found {self.temperature} and {self.top_p}."
            )


@dataclass(frozen=True)
class Measure:
    """Length of a prompt with the chat template and without soft tokens."""

    tokens: int
    truncated: bool  # True if messages were dropped or text was cut


@dataclass(frozen=True, repr=False)
class Generation:
    """A response, without special tokens and outer white space."""

    text: str
    finished: bool  # False if it stopped at `max_new_tokens`


@dataclass(frozen=True, repr=False)
class PromptBatch:
    """B prompts or conversations before the chat template, with optional soft prompts and a copy head."""

    prompts: Sequence[Prompt]
    soft: SoftPrompt | None = None  # B rows; None = no soft tokens
    soft_at: Sequence[int] | None = None  # characters of each text before its `prefix` soft tokens; None = 0
    copying: Copying | None = None  # mixed with the model; needs `suffix` soft tokens
    seeds: Sequence[int] | None = None  # one per row for sampling; None = one seed for the batch, the config's

    def has_soft(self, placement: str) -> bool:
        """Return True if the batch has soft tokens with this placement."""
        return self.soft is not None and self.soft.placement == placement and self.soft.tokens > 0

    def take(self, indices: Sequence[int]) -> PromptBatch:
        """Return these rows as a batch; a row may occur more than once."""
        return PromptBatch(
            [self.prompts[index] for index in indices],
            None if self.soft is None else self.soft.rows(indices),
            None if self.soft_at is None else [self.soft_at[index] for index in indices],
            None if self.copying is None else self.copying.take(indices),
            None if self.seeds is None else [self.seeds[index] for index in indices],
        )

    def rows(self) -> list[PromptBatch]:
        """Split the batch into batches of one row."""
        return [self.take([index]) for index in range(len(self.prompts))]


@dataclass(frozen=True)
class Decoding:
    """State of token-by-token decoding of R rows."""

    first: Tensor  # (R, V) logits of the first new tokens
    step: Callable[[Tensor], Tensor]  # appends one token per row, (R,), and returns the next logits, (R, V)


class Runner(ABC):
    """Runs prompts, soft tokens and answers through a model. It takes token ids and adds no label bias."""

    @abstractmethod
    def target_logits(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, V) and the target tokens that they predict (B, L); padding is IGNORED."""

    def target_loss(self, batch: PromptBatch, target_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Return −log p of each target and its number of tokens, both (B,)."""
        return token_loss(*self.target_logits(batch, target_ids))

    def label_scores(self, batch: PromptBatch, label_ids: Sequence[Ids]) -> Tensor:
        """Return the log-probability of each label, (B, C).

        This default needs one pass if each label is one token, else one pass per label.
        """
        rows = len(batch.prompts)
        if all(len(ids) == 1 for ids in label_ids):
            logits, _ = self.target_logits(batch, [label_ids[0]] * rows)
            return log_softmax(logits[:, 0])[:, [ids[0] for ids in label_ids]]
        losses = [self.target_loss(batch, [ids] * rows)[0] for ids in label_ids]
        return -torch.stack(losses, dim=1)

    def start_decoding(self, batch: PromptBatch) -> Decoding | None:
        """Run the prompts and return the decoding state; None if transformers does the decoding for this runner."""
        return None

    @abstractmethod
    def generate_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
        """Return the token ids of B responses."""


class LanguageModel(ABC):
    """A frozen transformers model; load it with `open_llm` or `load_hf`.

    Args:
        model: a model with a language-modeling head; its weights are frozen here.
        chat_date: ISO date that the chat template prints; None = today.
        prompt_cache: location of the prompt cache; see `plan_cache`.
        prompt_cache_bytes: size limit of the prompt cache; see `plan_cache`.

    Attributes:
        embedding_scale: root mean square of the embedding values; soft tokens should have the same scale.
        max_text_tokens: largest number of tokens of a prompt's text, chat template excluded.
        max_positions: longest sequence that the model's config allows; None if it sets no limit.
        end_ids: tokens that end a response.
        check: result of the model check.
        ways: runners that take soft tokens at any position or none, by name, fastest first.
        prefix_ways: runners of `suffix` soft tokens after cached prompts, by name, fastest first; empty if those in
            `ways` use the prompt cache themselves.
        whole: the first runner in `ways` that passed the model check.
        prompt_layout: shape of cached prompt states; None if prompts before `suffix` soft tokens cannot be cached.
    """

    is_encoder_decoder: bool
    check: ModelCheck
    ways: dict[str, Runner]
    prefix_ways: Mapping[str, Runner]
    whole: Runner
    prompt_layout: Layout | None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None = None,
        max_prompt_tokens: int = 512,
        chat_date: str | None = None,
        prompt_cache: str = "auto",
        prompt_cache_bytes: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        use_fp32_logits(self.model)
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos_ids = eos if isinstance(eos, list) else [eos]
        self.prompt_tokenizer = PromptTokenizer(
            tokenizer,
            max_tokens=max_prompt_tokens,
            is_encoder_decoder=self.is_encoder_decoder,
            end_id=eos_ids[0] if eos_ids else None,
            chat_date=chat_date,
        )
        self.end_ids = list(dict.fromkeys(end for end in [self.prompt_tokenizer.end_id, *eos_ids] if end is not None))
        self.max_text_tokens = self.prompt_tokenizer.max_text_tokens
        text_config = model.config.get_text_config()
        self.embed = TokenEmbedding(
            model.get_input_embeddings(),
            per_layer=find_per_layer(model),
            pad_id=getattr(text_config, "pad_token_id", None) or 0,
        )
        self.max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        width, day = int(self.embed.weight.shape[1]), self.prompt_tokenizer.chat_date
        self.identity = LLMIdentity(name, revision, fingerprint(model), width, day)
        if self.embed.per_layer is None:
            self.embed.factor = find_factor(
                model,
                self.embed.layer,
                read_ids=lambda ids: self.read(input_ids=ids),
                read_embeds=lambda embeds: self.read(inputs_embeds=embeds),
            )
        self.embedding_scale = self._measure_scale()
        self.dtype = str(model.dtype).removeprefix("torch.")
        # Drop penalties, minimum lengths and forced tokens of the checkpoint; `decode_tokens` does not apply them.
        model.generation_config = plain_generation_config(model.generation_config)
        self.prompt_layout = None  # until the model is checked
        self.prompt_states = PromptStates(
            self.compute_prompt_states, device=self.device, location=prompt_cache, limit=prompt_cache_bytes
        )

    @property
    def device(self) -> torch.device:
        """Device of the embedding table and of soft tokens."""
        return torch.device(self.embed.weight.device)

    @property
    def supports_prompt_cache(self) -> bool:
        """True if the states of prompts before `suffix` soft tokens can be cached."""
        return self.prompt_layout is not None

    def apply_check(self, check: ModelCheck) -> None:
        """Choose the runners that passed the model check."""
        self.check, self.whole, self.prompt_layout = check, self.ways[check.way], check.layout

    @abstractmethod
    def compute_prompt_states(self, prompts: Sequence[Ids]) -> list[PromptState]:
        """Compute the state of each of one or more prompts, without gradients."""

    @abstractmethod
    def choose_runner(self, batch: PromptBatch, *, new_tokens: int, num_beams: int = 1) -> Runner:
        """Return the runner for a batch whose answers have at most `new_tokens` tokens."""

    @abstractmethod
    def model_logits(self, prompt: Ids, target: Ids, *, before: Ids = ()) -> Tensor:
        """Return the logits (L, V) of a target from ids alone: one row, one pass, no padding, no cache.

        The ids `before` take the place of `suffix` soft tokens.
        """

    def measure(self, prompts: Sequence[Prompt], *, targets: Sequence[str] | None = None) -> list[Measure]:
        """Return the length of each prompt, plus the tokens of its target if targets are given."""
        rows = self.prompt_tokenizer.encode_prompts(prompts)
        target_ids = [()] * len(rows) if targets is None else self.prompt_tokenizer.encode_targets(targets)
        return [Measure(len(row.ids) + len(ids), row.truncated) for row, ids in zip(rows, target_ids, strict=True)]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without chat template."""
        return self.prompt_tokenizer.count_tokens(texts)

    def count_prompt_tokens(self, prompt: Prompt, soft_at: int = 0) -> int:
        """Count the tokens of a prompt without the template of a single message; up to `max_text_tokens` fit.

        Args:
            soft_at: characters of the last message before the soft tokens; the message is split there.
        """
        return self.prompt_tokenizer.count_prompt_tokens(prompt, soft_at)

    @property
    def takes_system_messages(self) -> bool:
        """True if a conversation may begin with a system message."""
        return self.prompt_tokenizer.takes_system_messages

    def cut_text(self, text: str, tokens: int) -> str:
        """Return the longest prefix of a text with at most `tokens` tokens."""
        return self.prompt_tokenizer.cut_text(text, tokens)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of the tokens of all texts, concatenated: (n, D)."""
        ids = [token for row in self.prompt_tokenizer.encode_targets(texts) for token in row]
        content_ids = [token for token in ids if token not in self.end_ids]
        return self.embed.vectors(torch.tensor(content_ids, dtype=torch.int64, device=self.device))

    def cache_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Cache the states of prompts before `suffix` soft tokens and drop earlier ones. Only the speed changes."""
        self.prompt_states.fill([row.ids for row in self.prompt_tokenizer.encode_prompts(prompts)], self.prompt_layout)

    def clear_cache(self) -> None:
        self.prompt_states.clear()

    def plan_prompt_cache(self, lengths: Sequence[int]) -> CachePlan:
        """Return where `cache_prompts` would cache prompts with these numbers of tokens."""
        return self.prompt_states.plan(lengths, self.prompt_layout)

    def loss(self, batch: PromptBatch, targets: Sequence[str], *, labels: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
        """Return −log p of each target and its number of tokens, both (B,); `labels` is the closed set of targets."""
        target_ids = self.prompt_tokenizer.encode_targets(targets, labels=labels)
        runner = self.choose_runner(batch, new_tokens=max(map(len, target_ids), default=0))
        if not labels or batch.soft is None or batch.soft.label_bias is None:
            return runner.target_loss(batch, target_ids)
        logits, target_tokens = runner.target_logits(batch, target_ids)
        bias = LabelBias(self.prompt_tokenizer.encode_labels(labels), batch.soft.label_bias)
        return token_loss(bias.add_to(logits, target_tokens), target_tokens)

    @torch.no_grad()
    def score(self, batch: PromptBatch, labels: Sequence[str]) -> Tensor:
        """Return (B, C) log-probabilities of a closed set of labels, plus the label bias, not renormalized."""
        if not batch.prompts:
            return torch.empty(0, len(labels), device=self.device)
        label_ids = self.prompt_tokenizer.encode_labels(labels)
        scores = self.choose_runner(batch, new_tokens=max(map(len, label_ids))).label_scores(batch, label_ids)
        bias = None if batch.soft is None else batch.soft.label_bias
        return scores if bias is None else scores + bias.to(scores)

    @torch.no_grad()
    def generate(self, batch: PromptBatch, config: GenerationConfig) -> list[Generation]:
        rows = [(ids, bool(ids) and ids[-1] in self.end_ids) for ids in self.answer_ids(batch, config)]
        decode = self.prompt_tokenizer.decode
        return [Generation(decode(ids[:-1] if finished else ids), finished=finished) for ids, finished in rows]

    @torch.no_grad()
    def answer_ids(self, batch: PromptBatch, config: GenerationConfig) -> list[Ids]:
        """Return the token ids of responses, end token included; a response cut at `max_new_tokens` has none."""
        if not batch.prompts:
            return []
        runner = self.choose_runner(batch, new_tokens=config.max_new_tokens, num_beams=config.num_beams)
        rows = runner.generate_ids(batch, config)
        ends = [next((index for index, token in enumerate(row, 1) if token in self.end_ids), None) for row in rows]
        return [tuple(row[:end]) for row, end in zip(rows, ends, strict=True)]

    @torch.no_grad()
    def divergence(self, plain: PromptBatch, other: PromptBatch, answers: Sequence[Ids]) -> Tensor:
        """Return the sum of KL(plain ‖ other) over the next tokens of each answer, in nats, (B,)."""
        longest = max(map(len, answers), default=0)
        runners = [self.choose_runner(batch, new_tokens=longest) for batch in (plain, other)]
        return token_divergence(runners[0].target_logits(plain, answers), runners[1].target_logits(other, answers))

    def splice_prompts(self, batch: PromptBatch, target_ids: Sequence[Ids] | None = None) -> Spliced:
        """Tokenize, pad and embed prompts, followed by their targets if given, and insert the soft tokens.

        Rows of an encoder are padded on the right, because it may count positions from the first column.
        """
        soft_at = batch.soft_at if batch.has_soft("prefix") else None
        prompts, is_suffix = self.prompt_tokenizer.encode_prompts(batch.prompts, soft_at), batch.has_soft("suffix")
        rows = [prompt.ids for prompt in prompts]
        at = torch.tensor([len(row.ids) if is_suffix else row.soft_position for row in prompts])
        if target_ids is not None:
            rows = [row + ids for row, ids in zip(rows, target_ids, strict=True)]
        side = "right" if self.is_encoder_decoder else "left"
        ids, mask = pad_with_mask(rows, side=side, device=self.device)
        return splice(self.embed(ids), mask, soft=self.complete(batch.soft), at=at)

    def complete(self, soft: SoftPrompt | None) -> SoftPrompt | None:
        """Return soft tokens as the model reads them; see `TokenEmbedding.complete`."""
        return None if soft is None else replace(soft, vectors=self.embed.complete(soft.vectors))

    @abstractmethod
    def spell(self, ids: Ids) -> Tensor:
        """Return `suffix` soft tokens (1, n, D) that have the same effect as these ids in their place."""

    @abstractmethod
    def read(self, **inputs: Tensor) -> Tensor:
        """Run the part of the model that reads prompts on `input_ids` or `inputs_embeds` and return its output."""

    @torch.no_grad()
    def _measure_scale(self) -> float:
        # Measure the layer's output, because in some families it is a scaled row of the table.
        ids = torch.linspace(0, self.embed.num_embeddings - 1, steps=min(4096, self.embed.num_embeddings))
        return float(self.embed.vectors(ids.long().to(self.device)).float().pow(2).mean().sqrt())


def plain_generation_config(config: Any) -> Any:
    """Return a transformers generation config that keeps only the model's special tokens."""
    from transformers import GenerationConfig as TransformersConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    config_class: Any = TransformersConfig  # untyped constructor
    return config_class(**{name: getattr(config, name, None) for name in names})
