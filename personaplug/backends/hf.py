"""Frozen language models through transformers: decoder-only (with or without a chat template) and encoder-decoder.

Soft tokens are spliced into the embedded prompt right before the user's text (PPlug, eq. 5: [I; P; x]), or at the place
in it that `soft_at` names (retrieved texts stand in front of them in the paper's Table 3); what a chat template puts in
front of the text stays in front. Nothing is added to the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplug.backends.base import Generation, GenerationConfig, Measure, pad
from personaplug.backends.rendering import Renderer
from personaplug.errors import MissingModel
from personaplug.soft_prompt import IGNORED, SoftPrompt, Spliced, splice
from personaplug.weights import LLMIdentity, find_model, fingerprint, quiet_unless_terminal, revision_of

logger = logging.getLogger(__name__)

_LABEL_ROWS = 64  # rows of (sample, label) that are scored at once; bounds the copies of the prompt's cache


class HFBackend:
    """What both kinds of model share; use `load_hf` or one of the two classes below.

    Args:
        model: a transformers model with a language-modelling head; it is frozen here.
        tokenizer: its tokenizer, left as it is.
        name: what error messages and artefacts call it.
        revision: the hub's commit, where known.
        max_prompt_tokens: longest prompt; longer texts are cut at the end and counted.
        padding_side: where the shorter prompts of a loss are padded; generation always pads left.
    """

    encoder_decoder = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None = None,
        max_prompt_tokens: int = 512,
        padding_side: str = "left",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.renderer = Renderer(tokenizer, max_tokens=max_prompt_tokens, encoder_decoder=self.encoder_decoder)
        self.room = self.renderer.room
        self.padding_side = padding_side
        self.embed = model.get_input_embeddings()
        self.identity = LLMIdentity(name, revision, fingerprint(model), self._width())
        self.embedding_scale = self._measure_scale()
        self.dtype = str(model.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the embedding table is; soft tokens go there."""
        return torch.device(self.embed.weight.device)

    def measure(self, prompts: Sequence[str], *, targets: Sequence[str] | None = None) -> list[Measure]:
        """Say how long each prompt is, with its target's tokens if given, and whether it was cut."""
        rows = self.renderer.prompts(prompts)
        more = [0] * len(rows) if targets is None else [len(self.renderer.answer(target)) for target in targets]
        return [Measure(len(row.ids) + extra, row.truncated) for row, extra in zip(rows, more, strict=True)]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Say how many tokens each text is by itself, without template."""
        return self.renderer.count(texts)

    def cut_text(self, text: str, tokens: int) -> str:
        """Return the longest beginning of a text that is at most so many tokens; see `Renderer.cut`."""
        return self.renderer.cut(text, tokens)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        soft: SoftPrompt | None,
        config: GenerationConfig,
        soft_at: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Answer each prompt with new text only; see `Backend.generate`."""
        batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side="left")
        end = self._end_ids()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            rows = self.model.generate(
                inputs_embeds=batch.embeds,
                attention_mask=batch.mask,
                max_new_tokens=config.max_new_tokens,
                num_beams=config.num_beams,
                do_sample=config.do_sample,
                temperature=config.temperature if config.do_sample else None,
                top_p=config.top_p if config.do_sample else None,
                top_k=None,
                eos_token_id=end,
                pad_token_id=end[0],
            ).tolist()
        return [self._generation(row, end=end) for row in rows]

    def _generation(self, row: list[int], *, end: list[int]) -> Generation:
        # An encoder-decoder's answer opens with its start token, which is no end even where it has the same id.
        body = row[1:] if self.encoder_decoder else row
        stop = next((i for i, token in enumerate(body) if token in end), None)
        return Generation(self.renderer.decode(body[:stop]), finished=stop is not None)

    def _end_ids(self) -> list[int]:
        from_model = self.model.generation_config.eos_token_id
        listed = from_model if isinstance(from_model, list) else [from_model]
        return list(dict.fromkeys(t for t in [self.renderer.tokenizer.eos_token_id, *listed] if t is not None))

    def _spliced_prompts(
        self,
        prompts: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None,
        side: str,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> Spliced:
        """Embed, pad and splice; with `answers` (decoder-only) they follow their prompts and are the labels."""
        no_soft = soft is None or soft.vectors.shape[1] == 0
        rows = self.renderer.prompts(prompts, None if no_soft else soft_at)
        tails: Sequence[Sequence[int]] = answers if answers is not None else [()] * len(rows)
        ids = pad([(*row.ids, *tail) for row, tail in zip(rows, tails, strict=True)], fill=0, side=side)
        mask = pad([[1] * (len(row.ids) + len(tail)) for row, tail in zip(rows, tails, strict=True)], fill=0, side=side)
        labels = None
        if answers is not None:
            wanted = [[IGNORED] * len(row.ids) + list(tail) for row, tail in zip(rows, tails, strict=True)]
            labels = pad(wanted, fill=IGNORED, side=side).to(self.device)
        at = torch.tensor([row.at for row in rows])
        return splice(self.embed(ids.to(self.device)), mask.to(self.device), soft=soft, at=at, labels=labels)

    @torch.no_grad()
    def _measure_scale(self) -> float:
        # The layer's output, not its table: some families scale the rows on the way out.
        ids = torch.linspace(0, self.embed.num_embeddings - 1, steps=min(4096, self.embed.num_embeddings))
        return float(self.embed(ids.long().to(self.device)).float().pow(2).mean().sqrt())

    def _width(self) -> int:
        return int(self.embed.weight.shape[1])


class DecoderOnlyBackend(HFBackend):
    """Models that read prompt and answer in one stream (Llama, GPT-NeoX, Qwen, Gemma, …)."""

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        super().__init__(model, tokenizer, **settings)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted

    def loss(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return −log p of each target and its number of tokens, both (B,); see `Backend.loss`."""
        answers = [self.renderer.answer(target) for target in targets]
        batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side=self.padding_side, answers=answers)
        assert batch.labels is not None
        first = int((batch.labels != IGNORED).int().argmax(dim=1).min())
        # The logits at position t predict the token at t + 1.
        logits = self._logits(batch, columns=torch.arange(first - 1, batch.labels.shape[1] - 1))
        return _token_loss(logits, batch.labels[:, first:])

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
    ) -> Tensor:
        """Return (B, C) log-probabilities; the prompt is read once, the labels from its cache."""
        answers = self.renderer.answers(labels)
        batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side="left")
        last = torch.tensor([batch.embeds.shape[1] - 1])
        if all(len(answer) == 1 for answer in answers):
            return _log_softmax(self._logits(batch, columns=last)[:, -1])[:, [a[0] for a in answers]]
        out = self.model(
            inputs_embeds=batch.embeds,
            attention_mask=batch.mask,
            use_cache=True,
            **self._options(batch.positions, last),
        )
        first = _log_softmax(out.logits[:, -1])
        step = max(1, _LABEL_ROWS // len(prompts))
        parts = [
            self._continue(out.past_key_values, first, batch=batch, answers=answers[start : start + step])
            for start in range(0, len(answers), step)
        ]
        return torch.cat(parts, dim=1)

    def _continue(self, cache: Any, first: Tensor, *, batch: Spliced, answers: list[list[int]]) -> Tensor:
        """Log-probability of some answers after a cached prompt, (B, len(answers)).

        Args:
            cache: keys and values of the prompt, left as they are.
            first: (B, V) log-probabilities of the first token.
        """
        size, several = first.shape[0], len(answers)
        ids = pad(answers, fill=0, side="right").to(self.device)  # (c, L)
        real = pad([[1] * len(a) for a in answers], fill=0, side="right").to(self.device)
        total = first[:, ids[:, 0]]
        if ids.shape[1] == 1:
            return total
        again = copy.deepcopy(cache)
        again.batch_repeat_interleave(several)
        offset = batch.mask.sum(dim=1, keepdim=True).repeat_interleave(several, dim=0)
        positions = offset + torch.arange(ids.shape[1] - 1, device=self.device)
        out = self.model(
            inputs_embeds=self.embed(ids[:, :-1]).repeat(size, 1, 1),
            attention_mask=torch.cat(
                [batch.mask.repeat_interleave(several, dim=0), real[:, :-1].repeat(size, 1)], dim=1
            ),
            past_key_values=again,
            use_cache=True,
            **({"position_ids": positions} if self._takes_positions else {}),
        )
        wanted = ids[:, 1:].repeat(size, 1).unsqueeze(-1)
        each = _log_softmax(out.logits).gather(-1, wanted).squeeze(-1) * real[:, 1:].repeat(size, 1)
        return total + each.sum(dim=1).view(size, several)

    def _logits(self, batch: Spliced, *, columns: Tensor) -> Tensor:
        """(B, len(columns), V) logits at some columns only; the vocabulary is wide, most columns have no label."""
        out = self.model(
            inputs_embeds=batch.embeds,
            attention_mask=batch.mask,
            use_cache=False,
            **self._options(batch.positions, columns),
        )
        logits: Tensor = out.logits
        return logits if self._takes_keep else logits[:, columns.to(logits.device)]

    def _options(self, positions: Tensor, columns: Tensor) -> dict[str, Tensor]:
        # A tensor of columns, not their number: the slice that a number makes is strided, and torch then multiplies
        # row by row with a copy of the whole head for each (measured: 1.1 s instead of 0.01 s a batch).
        given = {"position_ids": positions} if self._takes_positions else {}
        return {**given, "logits_to_keep": columns.to(self.device)} if self._takes_keep else given


class EncoderDecoderBackend(HFBackend):
    """Models whose encoder reads the prompt and whose decoder writes the answer (T5, the paper's FlanT5)."""

    encoder_decoder = True

    def loss(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return −log p of each target and its number of tokens, both (B,); see `Backend.loss`."""
        batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side=self.padding_side)
        labels = pad([self.renderer.answer(t) for t in targets], fill=IGNORED, side="right").to(self.device)
        logits = self.model(inputs_embeds=batch.embeds, attention_mask=batch.mask, labels=labels).logits
        return _token_loss(logits, labels)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
    ) -> Tensor:
        """Return (B, C) log-probabilities; the encoder reads the prompt once."""
        batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side=self.padding_side)
        states = self.model.get_encoder()(inputs_embeds=batch.embeds, attention_mask=batch.mask)
        columns = []
        for answer in self.renderer.answers(labels):
            wanted = torch.tensor([answer] * len(prompts), device=self.device)
            logits = self.model(encoder_outputs=states, attention_mask=batch.mask, labels=wanted).logits
            columns.append(-_token_loss(logits, wanted)[0])
        return torch.stack(columns, dim=1)


def load_hf(
    name: str, *, dtype: str = "auto", device: str = "cpu", max_prompt_tokens: int = 512
) -> DecoderOnlyBackend | EncoderDecoderBackend:
    """Load a frozen language model from a hub name or a local folder.

    Args:
        name: see `personaplug.weights.find_model` for the places that are looked at.
        dtype: auto, float32, bfloat16 or float16; see `choose_dtype`.
        device: a torch device.
        max_prompt_tokens: longest prompt.
    Raises:
        MissingModel: if it is found nowhere, or what is found is no language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    folder = find_model(name)
    chosen, why = choose_dtype(dtype, device=device)
    logger.info("language model %s in %s (%s)", name, str(chosen).removeprefix("torch."), why)
    try:
        settings = AutoConfig.from_pretrained(folder)
        two_halves = bool(settings.is_encoder_decoder)
        family: Any = AutoModelForSeq2SeqLM if two_halves else AutoModelForCausalLM
        with quiet_unless_terminal():
            model = family.from_pretrained(folder, dtype=chosen, **_attention(chosen, device=device)).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MissingModel(name, tried=[f"{folder}, where transformers says: {str(error).splitlines()[0]}"]) from error
    kind = EncoderDecoderBackend if two_halves else DecoderOnlyBackend
    return kind(model, tokenizer, name=name, revision=revision_of(folder), max_prompt_tokens=max_prompt_tokens)


def choose_dtype(name: str, *, device: str) -> tuple[torch.dtype, str]:
    """The number format, and why; `auto` asks the hardware."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.startswith("cuda"):
        supported = torch.cuda.is_bf16_supported()
    else:
        supported = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return (torch.bfloat16, "the hardware multiplies in it") if supported else (torch.float32, "no fast bfloat16 here")


def _attention(dtype: torch.dtype, *, device: str) -> dict[str, str]:
    # torch's fused attention in bfloat16 on a CPU has a slow backward pass; the plain one takes two thirds of the time.
    return {"attn_implementation": "eager"} if device == "cpu" and dtype == torch.bfloat16 else {}


def _token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of −log p over each row's labels (eq. 6), and how many there are.

    Args:
        logits: (B, L, V), already aligned with the labels.
        labels: (B, L), IGNORED where there is nothing to predict.
    """
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(dim=1), (labels != IGNORED).sum(dim=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)
