"""What the frozen language models of transformers share, whatever their kind.

Soft tokens of the placement `prefix` are spliced into the embedded prompt right before the user's text (PPlug, eq. 5:
[I; P; x]), or at the place in it that `soft_at` names (retrieved texts stand in front of them in the paper's Table 3);
what a chat template puts in front of the text stays in front. With `suffix` they stand right before the answer, so that
nothing in front of them depends on plug or user. Nothing is added to the vocabulary.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from personaplug.infra.distributed import local_world_size
from personaplug.infra.memory import free_memory
from personaplug.infra.model_hub import LLMIdentity, fingerprint
from personaplug.infra.progress import Progress
from personaplug.llm.base import Generation, GenerationConfig, Measure, pad
from personaplug.llm.fp32_logits import use_fp32_logits
from personaplug.llm.label_bias import LabelBias
from personaplug.llm.ngram_cache import LONGEST, UserNgramCache, interpolate_logits
from personaplug.llm.prompt_cache import CachePlan, Layout, PromptCache, plan_cache
from personaplug.llm.prompt_tokenizer import Ids, PromptTokenizer
from personaplug.llm.soft_prompt import IGNORED, SoftPrompt, Spliced, is_behind, splice

logger = logging.getLogger(__name__)
T = TypeVar("T")

_READ_TOKENS = 4096  # of prompts that are read together, padding included


class HFLanguageModel:
    """What both kinds of model share; use `load_hf` or one of the two classes below.

    Args:
        model: a transformers model with a language-modelling head; it is frozen here.
        tokenizer: its tokenizer, left as it is.
        name: what error messages and artefacts call it.
        revision: the hub's commit, where known.
        max_prompt_tokens: longest prompt; longer texts are cut at the end and counted.
        padding_side: where the shorter prompts of a loss are padded; generation always pads left.
        prompt_cache: where `keep` keeps prompts: auto, memory, disk or nowhere.
        keep_bytes: at most; 0 = half of what is free there.
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
        prompt_cache: str = "auto",
        keep_bytes: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        use_fp32_logits(self.model)
        self.prompt_tokenizer = PromptTokenizer(
            tokenizer, max_tokens=max_prompt_tokens, encoder_decoder=self.encoder_decoder
        )
        self.room = self.prompt_tokenizer.room
        self.padding_side = padding_side
        self.embed = model.get_input_embeddings()
        self.identity = LLMIdentity(name, revision, fingerprint(model), self._width())
        self.embedding_scale = self._measure_scale()
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._keeping = (prompt_cache, keep_bytes)
        self._kept: PromptCache | None = None
        self._wanted: frozenset[Ids] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where the embedding table is; soft tokens go there."""
        return torch.device(self.embed.weight.device)

    def measure(self, prompts: Sequence[str], *, targets: Sequence[str] | None = None) -> list[Measure]:
        """Say how long each prompt is, with its target's tokens if given, and whether it was cut."""
        rows = self.prompt_tokenizer.prompts(prompts)
        more = [0] * len(rows) if targets is None else [len(self.prompt_tokenizer.answer(target)) for target in targets]
        return [Measure(len(row.ids) + extra, row.truncated) for row, extra in zip(rows, more, strict=True)]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Say how many tokens each text is by itself, without template."""
        return self.prompt_tokenizer.count(texts)

    @torch.no_grad()
    def embedded(self, texts: Sequence[str]) -> Tensor:
        """Return the embedded tokens of some answers, (n, D); see `LanguageModel.embedded`."""
        end = set(self.end_ids())
        ids = [token for answer in self.prompt_tokenizer.targets(texts) for token in answer if token not in end]
        return self.embed(torch.tensor(ids, dtype=torch.int64, device=self.device))  # type: ignore[no-any-return]

    def phrases(self, answers: Sequence[str]) -> UserNgramCache:
        """Return what a user's answers go on with; see `LanguageModel.phrases`."""
        cut = ((answer[:LONGEST], len(answer) <= LONGEST) for answer in answers)
        return UserNgramCache(self.prompt_tokenizer.unremembered(answer, end=whole) for answer, whole in cut)

    def cut_text(self, text: str, tokens: int) -> str:
        """Return the longest beginning of a text that is at most so many tokens; see `PromptTokenizer.cut`."""
        return self.prompt_tokenizer.cut(text, tokens)

    def room_for(self, tokens: int) -> CachePlan:
        """Say where prompts of so many tokens together would be kept, and why; see `LanguageModel.keep`."""
        layout, (wanted, limit) = self._layout(), self._keeping
        if layout is None:
            return CachePlan("nowhere", 0, "not kept: this model's own cache does not allow it")
        shared = {"memory": free_memory(), "disk": shutil.disk_usage(tempfile.gettempdir()).free}
        free = {place: size // local_world_size() for place, size in shared.items()}
        if self.device.type == "cuda":
            free = {"gpu": torch.cuda.mem_get_info(self.device)[0], **free}
        return plan_cache(tokens * layout.bytes, wanted=wanted, limit=limit // local_world_size(), free=free)

    def supports_prompt_cache(self) -> bool:
        """Return whether prompts can be cached; see `LanguageModel.supports_prompt_cache`."""
        return self._layout() is not None

    def clear_cache(self) -> None:
        """Free what `keep` holds."""
        if self._kept is None and not self._wanted:
            return
        self._kept, self._wanted = None, frozenset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep(self, prompts: Sequence[str]) -> None:
        """Read prompts ahead of the soft tokens behind them, and keep what the model makes of them.

        What was kept is let go, unless these were asked for among them: then all stays as it is.
        """
        wanted = list(dict.fromkeys(row.ids for row in self.prompt_tokenizer.prompts(prompts)))
        if wanted and self._wanted.issuperset(wanted):
            return
        self.clear_cache()
        self._wanted = frozenset(wanted)
        room, layout = self.room_for(sum(map(len, wanted))), self._layout()
        logger.info("%d prompts: %s", len(wanted), room.reason)
        if layout is None or room.place == "nowhere":
            return
        self._kept = PromptCache(layout, room=room, device=self.device)
        with Progress("read prompts", total=len(wanted), unit="prompts") as progress:
            for together in by_length(wanted):
                fitting = [ids for ids in together if self._kept.fits(len(ids))]
                for ids, states in zip(fitting, self._read(fitting), strict=True):
                    if self._kept.fits(len(ids)):  # with those before it in the group
                        self._kept.put(ids, states)
                progress.advance(len(together))

    def _states(self, rows: Sequence[Ids]) -> list[Tensor]:
        """What the model makes of each prompt, kept or read now; each (parts, heads, n, width)."""
        kept = {ids: self._kept.get(ids) if self._kept is not None else None for ids in rows}
        missing = [ids for ids, states in kept.items() if states is None]
        found = {ids: states for ids, states in kept.items() if states is not None}
        for together in by_length(missing):
            found.update(zip(together, self._read(together), strict=True))
        return [found[ids] for ids in rows]

    def _layout(self) -> Layout | None:
        """Of the states of a prompt; None where they cannot be used apart from it."""
        raise NotImplementedError

    def _read(self, rows: Sequence[Ids]) -> list[Tensor]:
        """The states of some prompts, without gradients, each (parts, heads, n, width)."""
        raise NotImplementedError

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        *,
        soft: SoftPrompt | None,
        soft_at: Sequence[int] | None = None,
    ) -> Tensor:
        """Return (B, C) log-probabilities, with what the soft prompt says of the labels; see `LanguageModel.score`."""
        found = self._scores(prompts, labels, soft=soft, soft_at=soft_at)
        return found if soft is None or soft.label_bias is None else found + soft.label_bias.to(found)

    def _scores(
        self, prompts: Sequence[str], labels: Sequence[str], *, soft: SoftPrompt | None, soft_at: Sequence[int] | None
    ) -> Tensor:
        """What the model itself says of the labels behind the soft tokens, (B, C) log-probabilities."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        soft: SoftPrompt | None,
        config: GenerationConfig,
        soft_at: Sequence[int] | None = None,
        phrases: Sequence[UserNgramCache] | None = None,
    ) -> list[Generation]:
        """Answer each prompt with new text only; see `LanguageModel.generate`."""
        batch = self._spliced_prompts(prompts, soft=soft, soft_at=soft_at, side="left")
        given = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask, **self._last_only()}
        rows = self._generated(config, phrases, **given)
        return [self._generation(row, end=self.end_ids()) for row in rows]

    def _last_only(self) -> dict[str, Tensor]:
        """What tells the model that only the last place of a prompt needs logits, in a form that is fast."""
        return {}

    def _generated(
        self, config: GenerationConfig, phrases: Sequence[UserNgramCache] | None, **inputs: Any
    ) -> list[list[int]]:
        """Token ids as transformers generates them from some inputs."""
        end = self.end_ids()
        # An encoder-decoder's answer opens with its start token, which no user wrote.
        mixing = [_Mixing(phrases, config.num_beams, first=int(self.encoder_decoder))] if phrases is not None else []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            rows: list[list[int]] = self.model.generate(
                **inputs,
                max_new_tokens=config.max_new_tokens,
                num_beams=config.num_beams,
                do_sample=config.do_sample,
                temperature=config.temperature if config.do_sample else None,
                top_p=config.top_p if config.do_sample else None,
                top_k=None,
                eos_token_id=end,
                pad_token_id=end[0],
                logits_processor=LogitsProcessorList(mixing),
            ).tolist()
        return rows

    def _generation(self, row: list[int], *, end: list[int]) -> Generation:
        # An encoder-decoder's answer opens with its start token, which is no end even where it has the same id.
        body = row[1:] if self.encoder_decoder else row
        stop = next((i for i, token in enumerate(body) if token in end), None)
        return Generation(self.prompt_tokenizer.decode(body[:stop]), finished=stop is not None)

    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        from_model = self.model.generation_config.eos_token_id
        listed = from_model if isinstance(from_model, list) else [from_model]
        return list(dict.fromkeys(t for t in [self.prompt_tokenizer.tokenizer.eos_token_id, *listed] if t is not None))

    def _with_bias(self, logits: Tensor, wanted: Tensor, *, soft: SoftPrompt | None, labels: Sequence[str]) -> Tensor:
        """Logits of right answers, with what the soft prompt says of the labels where these are all that may be said.

        Args:
            logits: (B, L, V), aligned with (B, L) `wanted`.
        """
        if soft is None or soft.label_bias is None or not labels:
            return logits
        return LabelBias(self.prompt_tokenizer.answers(labels), soft.label_bias).added_to(logits, wanted)

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
        no_place = soft is None or soft.vectors.shape[1] == 0 or is_behind(soft)
        rows = self.prompt_tokenizer.prompts(prompts, None if no_place else soft_at)
        tails: Sequence[Sequence[int]] = answers if answers is not None else [()] * len(rows)
        ids = pad([(*row.ids, *tail) for row, tail in zip(rows, tails, strict=True)], fill=0, side=side)
        mask = pad([[1] * (len(row.ids) + len(tail)) for row, tail in zip(rows, tails, strict=True)], fill=0, side=side)
        labels = None
        if answers is not None:
            wanted = [[IGNORED] * len(row.ids) + list(tail) for row, tail in zip(rows, tails, strict=True)]
            labels = pad(wanted, fill=IGNORED, side=side).to(self.device)
        at = torch.tensor([len(row.ids) if is_behind(soft) else row.at for row in rows])
        return splice(self.embed(ids.to(self.device)), mask.to(self.device), soft=soft, at=at, labels=labels)

    @torch.no_grad()
    def _measure_scale(self) -> float:
        # The layer's output, not its table: some families scale the rows on the way out.
        ids = torch.linspace(0, self.embed.num_embeddings - 1, steps=min(4096, self.embed.num_embeddings))
        return float(self.embed(ids.long().to(self.device)).float().pow(2).mean().sqrt())

    def _width(self) -> int:
        return int(self.embed.weight.shape[1])


def by_length(prompts: Sequence[T], tokens: Callable[[T], int] = len) -> Iterator[list[T]]:  # type: ignore[assignment]
    """Prompts of like length together, the longest first, as many as make `_READ_TOKENS` with their padding.

    Args:
        tokens: how many one has.
    """
    group: list[T] = []
    for prompt in sorted(prompts, key=tokens, reverse=True):
        if group and tokens(group[0]) * (len(group) + 1) > _READ_TOKENS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


class _Mixing(LogitsProcessor):
    """Mixes users' phrases into what transformers is about to choose from."""

    def __init__(self, phrases: Sequence[UserNgramCache], beams: int, *, first: int) -> None:
        self.phrases, self.first = [own for own in phrases for _ in range(beams)], first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return interpolate_logits(scores, self.phrases, input_ids[:, self.first :].tolist())
