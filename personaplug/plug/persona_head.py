"""PersonaHead: make the persona tokens of a plug from a user's history and a query (PPlug, eq. 2 to 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from personaplug.config import PlugConfig
from personaplug.data.records import ITEM_KINDS, Options
from personaplug.encoders import Encoder, QueryEncoder
from personaplug.encoders.style_features import FEATURES
from personaplug.plug.history_batch import HistoryBatch, split_by_user
from personaplug.plug.layers import (
    DotAttention,
    FrozenQueryEncoder,
    JointProjector,
    MeanPooling,
    OptionHint,
    Projector,
    QueryHead,
)

_CONVERTED_ITEMS = 1024  # at once, so that their float32 copy fits into the CPU cache


class PersonaHead(nn.Module):
    """Make K persona tokens, and one more token if options are compared.

    The first `state_tokens` tokens weigh all items equally and represent the user's state. The others attend to the
    query. `width` is the embedding width of the language model (D). `labels` is the number of item labels, `options`
    the number of options in a prompt.
    """

    def __init__(self, config: PlugConfig, *, encoder: Encoder, width: int, labels: int, options: int) -> None:
        super().__init__()
        self.tokens, self.shrinkage, self.encoder_width = config.persona_tokens, config.shrinkage, encoder.width
        self.state_tokens, self.item_dtype = config.state_tokens, torch.float32
        self.frozen_encoder = FrozenQueryEncoder(encoder)
        has_attention = self.state_tokens < self.tokens
        mixing = {"shrinkage": config.shrinkage, "kinds": config.kinds}
        self.item_attention = DotAttention(config.temperature, **mixing) if has_attention else None
        self.state_pooling = MeanPooling(**mixing) if self.state_tokens else None
        self.query_encoder: QueryEncoder | None = None
        if has_attention and config.query_encoder == "trained":
            self.query_encoder = encoder.query_encoder()
        elif has_attention:
            self.query_encoder = QueryHead(encoder.width, frozen=self.frozen_encoder)
        settings = {
            "hidden": width,
            "tokens": self.tokens,
            "out": width,
            "labels": labels if config.projects_labels else 0,
            "style": len(FEATURES) if config.reads_style else 0,
            "kinds": len(ITEM_KINDS) if config.kinds else 0,
        }
        widths = [part_width for _, part_width in encoder.identity.parts]
        # Typed as Any, because the parameters of the two kinds have different names.
        self.projector: Any = JointProjector(widths, **settings) if widths else Projector(encoder.width, **settings)
        # Gets the weight that the user's items do not take: all weight if there are no items. It starts at zero and
        # learns from samples whose history training drops (`training.drop_history_prob`).
        self.population = nn.Parameter(torch.zeros(self.tokens, width))
        self.hint = OptionHint(options, width=width) if config.options == "compare" else None

    def forward(
        self,
        queries: Sequence[str],
        history: HistoryBatch,
        *,
        options: Sequence[Options | None] = (),
        persona_scale: float = 1.0,
    ) -> Tensor:
        """Return the unscaled tokens, (B, K, D) or (B, K + 1, D); see `PersonaPlug.forward`."""
        persona = self._persona(queries, history)
        if persona_scale != 1:
            persona = torch.lerp(self.population.expand_as(persona), persona, persona_scale)
        if self.hint is None:
            return persona
        hints = self._hints(self.hint, options, history=history, persona_scale=persona_scale)
        return torch.cat([persona, hints], dim=1)

    def share(self, other: PersonaHead) -> None:
        """Use another head's parameters, except for the hint, whose options belong to one task."""
        self.query_encoder, self.projector, self.population = other.query_encoder, other.projector, other.population
        self.item_attention, self.state_pooling = other.item_attention, other.state_pooling
        self.frozen_encoder = other.frozen_encoder

    def population_tokens(self) -> Tensor:
        """Return the tokens of the population persona, (K, D) or (K + 1, D)."""
        if self.hint is None:
            return self.population
        return torch.cat([self.population, torch.zeros_like(self.population[:1])])

    def item_weights(self, queries: Sequence[str], history: HistoryBatch) -> Tensor:
        """Return the items' weights of eq. 3, (M,), averaged over the persona tokens."""
        shares = [len(range(self.tokens)[tokens]) * w for tokens, w in self._token_weights(queries, history)]
        return torch.stack(shares).sum(dim=0) / self.tokens

    def precompute(self, history: HistoryBatch) -> HistoryBatch:
        """Compute the hidden layer of the items in advance. It depends on no query and is most of the cost."""
        return replace(history, hidden=self._hidden(history))

    def cache_queries(self, queries: Sequence[str], options: Sequence[Options | None] = ()) -> None:
        """Encode and cache queries and options in advance, if a frozen encoder encodes them."""
        texts = list(queries) if isinstance(self.query_encoder, QueryHead) else []
        self.frozen_encoder.cache(texts + (_option_texts(options) if self.hint is not None else []))

    def _persona(self, queries: Sequence[str], history: HistoryBatch) -> Tensor:
        """Return P = Σ_i w_i · Proj(h_i) of eq. 4, plus the population persona for the remaining weight; (B, K, D).

        The projector's outer layer is linear, so it runs once per user instead of once per item.
        """
        hidden = self._hidden(history) if history.hidden is None else history.hidden
        user_hidden, dtype = split_by_user(hidden, history.lengths), self.population.dtype
        parts = []
        for tokens, weights in self._token_weights(queries, history):
            user_weights = split_by_user(weights, history.lengths)
            pooled = torch.stack([w.to(g.dtype) @ g for w, g in zip(user_weights, user_hidden, strict=True)])
            # Without shrinkage, use exactly 1 or 0: a rounding error would train the population persona with noise.
            sums = [w.sum() if self.shrinkage else w.new_tensor(float(len(w) > 0)) for w in user_weights]
            weight_sums = torch.stack(sums).to(dtype)
            rest = (1 - weight_sums)[:, None, None] * self.population[tokens]
            parts.append(self.projector.out(pooled.to(dtype), weight_sums=weight_sums, tokens=tokens) + rest)
        return torch.cat(parts, dim=1)

    def _token_weights(self, queries: Sequence[str], history: HistoryBatch) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the persona tokens with their (M,) item weights.

        The weights are float32, because a low temperature magnifies rounding errors.
        """
        x, shape = self._encode_queries(queries), {"lengths": history.lengths, "kind_ids": history.kind_ids}
        if self.state_pooling is not None:
            yield slice(0, self.state_tokens), self.state_pooling(x, history.vectors, **shape)
        if self.item_attention is not None:
            yield slice(self.state_tokens, None), self.item_attention(x, history.vectors, **shape)

    def _encode_queries(self, queries: Sequence[str]) -> Tensor:
        """Return x of eq. 2, (B, E); equal queries are encoded once. Zeros if no token depends on the query."""
        if self.query_encoder is None:
            return self.population.new_zeros(len(queries), self.encoder_width)
        distinct = list(dict.fromkeys(queries))
        vectors: Tensor = self.query_encoder(self.query_encoder.features(distinct))
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors[[rows[text] for text in queries]]

    def _hidden(self, history: HistoryBatch) -> Tensor:
        items = _convert(history.vectors, self.item_dtype)
        answers = {"label_ids": history.label_ids, "style": history.style, "kind_ids": history.kind_ids}
        hidden: Tensor = self.projector.hidden(items, **answers)
        return hidden

    def _hints(
        self, hint: OptionHint, options: Sequence[Options | None], *, history: HistoryBatch, persona_scale: float
    ) -> Tensor:
        """Return a token for each user, (B, 1, D); zeros if a prompt has no options."""
        self.frozen_encoder.cache(_option_texts(options))  # in one batch
        hints = []
        for choice, items in zip(options, split_by_user(history.vectors, history.lengths), strict=True):
            if choice is None:
                hints.append(torch.zeros_like(hint.option_vectors[0]))
                continue
            vectors = self.frozen_encoder([choice.question, *choice.texts]).to(hint.option_vectors.device)
            hint_for = partial(hint, vectors[0], vectors[1:])
            own = hint_for(items.to(vectors.dtype))
            if persona_scale != 1:  # scale only the effect of the items, because the question's effect is not personal
                own = torch.lerp(hint_for(vectors[:0]), own, persona_scale)
            hints.append(own)
        return torch.stack(hints)[:, None]


def _option_texts(options: Sequence[Options | None]) -> list[str]:
    return [text for choice in options if choice for text in (choice.question, *choice.texts)]


def _convert(items: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert (M, E) items to another dtype."""
    if items.device.type != "cpu" or (items.dtype, dtype) != (torch.float16, torch.bfloat16):
        return items.to(dtype)
    # CPUs convert between 16-bit formats value by value. A conversion through float32 takes a third of the time.
    converted = torch.empty(items.shape, dtype=dtype)
    for start in range(0, len(items), _CONVERTED_ITEMS):
        chunk = slice(start, start + _CONVERTED_ITEMS)
        converted[chunk] = items[chunk].float()
    return converted
