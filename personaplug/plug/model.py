"""PersonaPlug: the trained module that turns a user's history and a query into soft tokens (PPlug, eq. 2 to 5).

It knows an encoder and nothing of files of users or of a language model beyond its identity. Saved as safetensors and
JSON: the plug alone, never the models it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personaplug.config import PlugConfig
from personaplug.data.records import Options
from personaplug.encoders import Encoder, QueryEncoder
from personaplug.encoders.style_features import FEATURES
from personaplug.errors import ConfigError, EncoderMismatch, LLMMismatch, MissingData
from personaplug.infra.atomic_io import atomic_write, write_text
from personaplug.infra.model_hub import LLMIdentity
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.layers import (
    FrozenQueries,
    LabelPrior,
    MeanPooling,
    OptionHint,
    Projector,
    QueryHead,
    build_pooling,
    per_user,
)
from personaplug.plug.model_card import model_card
from personaplug.plug.saving import ABOUT, PlugSpec, read_plug_json, write_plug_json

_CHUNK = 1024  # items converted at once
_WEIGHTS, _CARD = "plug.safetensors", "README.md"


@dataclass(frozen=True)
class HistoryBatch:
    """The histories of a batch of queries, one behind the other, without padding.

    Attributes:
        vectors: (M, E) unit vectors of all items.
        lengths: how many items each of the B users has; their sum is M.
        answers: (M,) int64 place of each item's answer among the task's labels, -1 where there is none.
        forms: (M, F) how each item's answer is written; F = 0 where that is not read.
        hidden: (M, hidden) what a plug's projector makes of each item, if it has read them; see `PersonaPlug.read`.
    """

    vectors: Tensor
    lengths: tuple[int, ...]
    answers: Tensor
    forms: Tensor
    hidden: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        parts = (self.vectors, self.answers, self.forms, self.hidden)
        return sum(part.nbytes for part in parts if part is not None)

    def only(self, places: Tensor) -> HistoryBatch:
        """Some of the items of a single user, in order."""
        return self._at(places, (len(places),))

    def without(self, users: Tensor) -> HistoryBatch:
        """The same, but for some users, (B,) bool, as if they had no items."""
        lengths = torch.tensor(self.lengths, device=users.device)
        kept = (~users).repeat_interleave(lengths).to(self.vectors.device)
        return self._at(kept, tuple(lengths.masked_fill(users, 0).tolist()))

    def _at(self, places: Tensor, lengths: tuple[int, ...]) -> HistoryBatch:
        hidden = None if self.hidden is None else self.hidden[places]
        return HistoryBatch(self.vectors[places], lengths, self.answers[places], self.forms[places], hidden=hidden)


class PersonaPlug(nn.Module):
    """I trained instruction tokens and K persona tokens: [I; P] of eq. 5.

    Args:
        config: how it is built.
        fitting: what it is made for.
        encoder: a frozen encoder of the fitting's identity; its trained copy is made from it.
    Raises:
        ConfigError: if it would have no tokens at all, or answers as labels without a closed label set.
        EncoderMismatch: if the encoder is another than the fitting's.
    """

    def __init__(self, config: PlugConfig, *, spec: PlugSpec, encoder: Encoder) -> None:
        super().__init__()
        _check_fits(config, spec=spec, encoder=encoder)
        self.config, self.spec = config, spec
        self.item_dtype = torch.float32
        width, tokens = spec.llm.width, config.persona_tokens
        self.instruction = nn.Parameter(torch.randn(config.instruction_tokens, width))
        # Up to how many items users are served as if they had none, where that serves them better, and all their tokens
        # then, (S, D), not scaled, where those of another training do better than the population persona.
        self.cold_start: Tensor | None
        self.cold_items: Tensor | None
        self.register_buffer("cold_start", None)
        self.register_buffer("cold_items", None)
        self.label_prior = LabelPrior(len(spec.labels)) if config.label_prior == "own" else None
        if tokens:
            self.frozen = FrozenQueries(encoder)
            self.aggregator = build_pooling(config)
            # Of the user's state, which does not depend on the query.
            self.state = MeanPooling(shrinkage=config.shrinkage) if config.keeps_state else None
            self.query_encoder: QueryEncoder | QueryHead | None = None
            if self.aggregator.asks:
                self.query_encoder = (
                    encoder.query_encoder()
                    if config.query_encoder == "trained"
                    else QueryHead(encoder.width, frozen=self.frozen)
                )
            self.projector = Projector(
                encoder.width,
                hidden=config.projector_width or width,
                tokens=tokens,
                out=width,
                labels=len(spec.labels) if config.answer_channel == "label" else 0,
                forms=len(FEATURES) if config.reads_forms else 0,
            )
            # What makes up for the weight that a user's items leave: all of it without any item, where the sum of eq. 4
            # would be empty. It starts as no signal at all and learns from the samples whose history is hidden in
            # training (`training.drop_history_prob`).
            self.population = nn.Parameter(torch.zeros(tokens, width))
            self.hint = OptionHint(len(spec.labels), width=width) if config.options == "compare" else None

    @property
    def ignores_query(self) -> bool:
        """Whether its personas are the same whatever is asked."""
        if not self.config.persona_tokens:
            return True
        return self.query_encoder is None and self.hint is None and not self.config.selected_items

    @torch.no_grad()
    def start_from(self, embedded: Tensor) -> None:
        """Let the instruction tokens start as some of the language model's own, (I, D)."""
        self.instruction.copy_(embedded.to(self.instruction) / self.spec.embedding_scale)

    def forward(
        self,
        queries: Sequence[str],
        history: HistoryBatch | None,
        *,
        options: Sequence[Options | None] = (),
        persona_scale: float = 1.0,
    ) -> SoftPrompt:
        """Make the soft tokens of a batch.

        Args:
            queries: B texts.
            history: their users' items; None is allowed where the plug reads none.
            options: what the prompts let choose from, one per query; only read where they are compared.
            persona_scale: how far personas go from the population persona (near 0) to the user's own (1) and beyond;
                at 0 there are no soft tokens at all. Users without items get the same tokens at every scale.
        Returns:
            (B, S, D), of the size of the language model's own embedded tokens: S = I + K, one more where options are
            compared, 0 for a persona_scale of 0; with the label bias of the users' own answers, if it is read.
        """
        if persona_scale == 0:
            nothing = self.instruction.new_empty(len(queries), 0, self.spec.llm.width)
            return SoftPrompt(nothing, placement=self.config.placement)
        if self.config.reads_history and history is None:
            raise ConfigError("This plug reads histories; it needs one for every query (it may be empty).")
        parts = [self.instruction.expand(len(queries), -1, -1)]
        history = self._counted(history)
        if self.config.persona_tokens and history is not None:
            own = self.persona(queries, history)
            parts.append(own if persona_scale == 1 else torch.lerp(self.population.expand_as(own), own, persona_scale))
            if self.hint is not None:
                parts.append(self._hints(self.hint, options, history=history, persona_scale=persona_scale))
        made = self._with_cold_start(torch.cat(parts, dim=1), history)
        bias = self._label_bias(history)
        return SoftPrompt(
            made * self.spec.embedding_scale,
            placement=self.config.placement,
            label_bias=None if bias is None else persona_scale * bias,
        )

    @torch.no_grad()
    def common(self) -> SoftPrompt:
        """The soft tokens without anything of a user's own in them, (1, S, D); what personas are told apart by."""
        parts: list[Tensor] = [self.instruction]
        if self.config.persona_tokens:
            parts.append(self.population)
            if self.hint is not None:
                parts.append(torch.zeros_like(self.hint.places[:1]))
        return SoftPrompt(torch.cat(parts)[None] * self.spec.embedding_scale, placement=self.config.placement)

    def set_cold_start(self, tokens: Tensor | None, *, items: int = 0) -> None:
        """Serve users of at most so many items with tokens that know of nobody.

        Args:
            tokens: (S, D), not scaled; None = what the plug makes for users without any item.
        """
        self.cold_start = tokens
        self.cold_items = None if tokens is None and not items else torch.tensor(items)

    @property
    def few(self) -> int:
        """Up to how many items a user gets what is common to all, and nothing of their own."""
        return 0 if self.cold_items is None else int(self.cold_items)

    def _counted(self, history: HistoryBatch | None) -> HistoryBatch | None:
        """The histories that personas are made of: none of users with too few items, unless other tokens serve them."""
        if history is None or self.cold_start is not None or not self.few or min(history.lengths, default=0) > self.few:
            return history
        return history.without(self._cold(history))

    def _with_cold_start(self, tokens: Tensor, history: HistoryBatch | None) -> Tensor:
        """The (B, S, D) tokens, those of `cold_start` in the place of users' who have too few items."""
        if self.cold_start is None or history is None or min(history.lengths, default=0) > self.few:
            return tokens
        return torch.where(self._cold(history)[:, None, None], self.cold_start, tokens)

    def _label_bias(self, history: HistoryBatch | None) -> Tensor | None:
        """(B, C) of the users' own answers; 0 for those who have too few items."""
        if history is None or self.label_prior is None:
            return None
        bias: Tensor = self.label_prior(history.answers, history.lengths)
        return bias if self.cold_items is None else bias.masked_fill(self._cold(history)[:, None], 0)

    def _cold(self, history: HistoryBatch) -> Tensor:
        """(B,) whether each user has too few items for tokens of their own."""
        return torch.tensor([length <= self.few for length in history.lengths], device=self.instruction.device)

    def persona(self, queries: Sequence[str], history: HistoryBatch) -> Tensor:
        """P of eq. 4 before scaling, and of the population persona what the items' weights leave of 1; (B, K, D).

        P = Σ_i w_i · Proj(h_i): the projector's outer layer is linear, so it runs once for a user and not for every
        item.
        """
        hidden = self._hidden(history) if history.hidden is None else history.hidden
        users, parts = per_user(hidden, history.lengths), []
        for tokens, weights in self._weighings(queries, history):
            each = per_user(weights, history.lengths)
            summed = torch.stack([own.to(values.dtype) @ values for own, values in zip(each, users, strict=True)])
            shares = torch.stack([_share(own, shrinkage=self.config.shrinkage) for own in each])
            summed, shares = summed.to(self.population.dtype), shares.to(self.population.dtype)
            common = (1 - shares)[:, None, None] * self.population[tokens]
            parts.append(self.projector.out(summed, shares=shares, tokens=tokens) + common)
        return torch.cat(parts, dim=1)

    def read(self, history: HistoryBatch) -> HistoryBatch:
        """Do what does not depend on any query, which is most of what a long history costs."""
        return replace(history, hidden=self._hidden(history))

    def _hidden(self, history: HistoryBatch) -> Tensor:
        items = _converted(history.vectors, self.item_dtype)
        return self.projector.hidden(items, answers=history.answers, forms=history.forms)

    def _hints(
        self, hint: OptionHint, options: Sequence[Options | None], *, history: HistoryBatch, persona_scale: float
    ) -> Tensor:
        """A token for each user, (B, 1, D); zeros where a prompt has no options."""
        self.frozen.remember(_texts_of(options))  # all at once, where they are not known yet
        hints = []
        for choice, items in zip(options, per_user(history.vectors, history.lengths), strict=True):
            if choice is None:
                hints.append(torch.zeros_like(hint.places[0]))
                continue
            question, *texts = self.frozen([choice.question, *choice.texts]).to(hint.places.device)
            compared, items = partial(hint, question, torch.stack(texts)), items.to(question.dtype)
            # What nobody's items say of the options is the question's part, which is no persona.
            own = compared(items)
            hints.append(own if persona_scale == 1 else torch.lerp(compared(items[:0]), own, persona_scale))
        return torch.stack(hints)[:, None]

    def weights(self, queries: Sequence[str], history: HistoryBatch) -> Tensor:
        """w of eq. 3, (M,): how much each item counts for its query, the mean over the persona tokens."""
        weighings = self._weighings(queries, history)
        counts = [len(range(self.config.persona_tokens)[tokens]) for tokens, _ in weighings]
        weighed = [count * weights for count, (_, weights) in zip(counts, weighings, strict=True)]
        return torch.stack(weighed).sum(dim=0) / self.config.persona_tokens

    def _weighings(self, queries: Sequence[str], history: HistoryBatch) -> list[tuple[slice, Tensor]]:
        """Which persona tokens are made with which (M,) weights of the items.

        The weights are in float32, since a low temperature magnifies.
        """
        asked, lengths = self._query(queries), history.lengths
        if self.state is None:
            return [(slice(None), self.aggregator(asked, history.vectors, lengths=lengths))]
        state = self.config.state_tokens
        return [
            (slice(state), self.state(asked, history.vectors, lengths=lengths)),
            (slice(state, None), self.aggregator(asked, history.vectors, lengths=lengths)),
        ]

    def computing_items_in(self, dtype: str) -> PersonaPlug:
        """Read histories in a backend's number format where that is bfloat16, else in float32; returns itself.

        A model in bfloat16 rounds the persona to it anyway, and in float32 512 items cost more than the model. The
        weights of eq. 3 stay in float32.
        """
        self.item_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return self

    def _query(self, queries: Sequence[str]) -> Tensor:
        """x of eq. 2, (B, E); a query that several rows share is encoded once. Zeros where none is asked for."""
        distinct, encoder = list(dict.fromkeys(queries)), self.query_encoder
        if encoder is None:
            return self.population.new_zeros(len(queries), self.spec.encoder.width)
        vectors = encoder(distinct) if isinstance(encoder, QueryHead) else encoder(encoder.features(distinct))
        places = {text: place for place, text in enumerate(distinct)}
        return vectors[[places[text] for text in queries]]  # type: ignore[no-any-return]

    def remember(self, queries: Sequence[str], options: Sequence[Options | None] = ()) -> None:
        """Encode queries and options ahead of their use, as far as the encoder is frozen for them."""
        if not self.config.persona_tokens:
            return
        asked = list(queries) if isinstance(self.query_encoder, QueryHead) else []
        self.frozen.remember(asked + (_texts_of(options) if self.hint is not None else []))

    def save_pretrained(self, folder: str | Path, *, facts: dict[str, Any] | None = None) -> None:
        """Write the plug, its config and a model card; nothing of the models it belongs to.

        Args:
            folder: made if absent.
            facts: what the card should tell of the training (data, steps, losses).
        Raises:
            StorageError: if the disk is full or not writable; what was complete before stays.
        """
        folder = Path(folder)
        state = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        (folder / ABOUT).unlink(missing_ok=True)  # an earlier plug's config must not stand beside these weights
        atomic_write(folder / _WEIGHTS, lambda path: save_file(state, path))
        values = sum(parameter.numel() for parameter in self.parameters())
        card = model_card(self.config, self.spec.llm, encoder=self.spec.encoder, values=values, facts=facts or {})
        write_text(folder / _CARD, card)
        # Last, since its presence says that the plug is complete.
        write_plug_json(folder, self.config, spec=self.spec)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, encoder: Encoder, llm: LLMIdentity | None) -> PersonaPlug:
        """Load a plug for the two models at hand.

        Args:
            llm: the language model; None = it runs elsewhere, and whoever asks it has to see that it is the plug's.
        Raises:
            MissingData: if the folder holds no plug, or a broken or newer one.
            EncoderMismatch: if it was trained with another encoder.
            LLMMismatch: if it was trained for another language model.
        """
        folder = Path(folder)
        config, spec = read_plug_json(folder)
        if llm is not None and (spec.llm.fingerprint, spec.llm.width) != (llm.fingerprint, llm.width):
            raise LLMMismatch(trained_for=spec.llm.describe(), given=llm.describe())
        plug = cls(config, spec=spec, encoder=encoder)
        try:
            state = load_file(folder / _WEIGHTS)
            tokens = state.get("cold_start")
            if tokens is not None:
                state.setdefault("cold_items", torch.tensor(0))  # plugs from before there was a choice have none
                _check_cold_start(tokens, plug)
            plug.set_cold_start(tokens, items=int(state.get("cold_items", 0)))
            known = plug.state_dict()  # plugs of earlier versions hold a query side all the same
            plug.load_state_dict({k: v for k, v in state.items() if k in known or not k.startswith("query_encoder.")})
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise MissingData(f"{folder / _WEIGHTS} cannot be read as this plug's weights: {reason}") from error
        return plug.eval()


def _texts_of(options: Sequence[Options | None]) -> list[str]:
    return [text for one in options if one for text in (one.question, *one.texts)]


def _check_cold_start(tokens: Tensor, plug: PersonaPlug) -> None:
    shape = (plug.config.soft_tokens, plug.spec.llm.width)
    if tokens.shape != shape:
        raise RuntimeError(f"cold_start should be of the shape {shape}, and is of {tuple(tokens.shape)}")


def _share(weights: Tensor, *, shrinkage: bool) -> Tensor:
    """Σ_i w_i of one user."""
    # Without shrinkage exactly 1 or 0: what rounding leaves of 1 would train the population persona with noise.
    return weights.sum() if shrinkage else weights.new_tensor(float(len(weights) > 0))


def _converted(items: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, E) items in another number format."""
    if items.device.type != "cpu" or (items.dtype, dtype) != (torch.float16, torch.bfloat16):
        return items.to(dtype)
    # A processor converts between the two 16-bit formats value by value; by way of float32 it takes a third of the time
    # as long as that stays in its cache.
    found = torch.empty(items.shape, dtype=dtype)
    for source, target in zip(items.split(_CHUNK), found.split(_CHUNK), strict=True):  # type: ignore[no-untyped-call]
        target.copy_(source.float())
    return found


def _check_fits(config: PlugConfig, *, spec: PlugSpec, encoder: Encoder) -> None:
    if config.instruction_tokens + config.persona_tokens == 0:
        raise ConfigError("A plug needs instruction_tokens or persona_tokens above 0; both are 0.")
    if "auto" in (config.answer_channel, config.options):
        raise ConfigError("answer_channel=auto and options=auto are settled by a task; see `run.resolved`.")
    if config.reads_labels and not spec.labels:
        raise ConfigError(
            "answer_channel=label and label_prior=own need a task with a closed set of labels; this one has none. Use "
            "answer_channel=text and label_prior=none."
        )
    if config.aggregator == "dot" and 0 < config.persona_tokens <= config.state_tokens:
        raise ConfigError(
            f"state_tokens={config.state_tokens} leaves none of persona_tokens={config.persona_tokens} for the query. "
            f"Give fewer, or aggregator=mean for a persona that is the same whatever is asked."
        )
    if config.options == "compare" and config.persona_tokens and len(spec.labels) < 2:
        raise ConfigError("options=compare needs a task whose labels stand for two or more options in the prompt.")
    if not encoder.identity.same_as(spec.encoder):
        raise EncoderMismatch("This plug", expected=spec.encoder.describe(), found=encoder.identity.describe())
