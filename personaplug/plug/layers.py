"""The layers of a plug: PPlug's equations 2 to 4 (https://arxiv.org/abs/2409.11901) and extensions.

Shapes: B users, M items of all users together, E encoder width, D language model width, K persona tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from personaplug.encoders import Encoder, QueryEncoder
from personaplug.encoders.base import FrozenQueries, frozen_queries
from personaplug.encoders.embedding_store import content_key
from personaplug.encoders.encoded_sample import PREFERENCE_KIND, Int8Array
from personaplug.errors import ShapeMismatch
from personaplug.plug.history_batch import HistoryBatch, split_by_user

_SMALLEST_PART = 1e-3  # norm of a part that an item has; the smallest is 1 / √3
_MAX_CACHED_TEXTS = 65_536  # 100 MB with MiniLM


class FrozenQueryEncoder:
    """Encode texts with a frozen encoder and cache their vectors, but not the texts. Not thread-safe."""

    def __init__(self, encoder: Encoder) -> None:
        self._source, self._cache = encoder, dict[bytes, Tensor]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (n, E) unit vectors on the CPU."""
        self.cache(texts)
        return torch.stack([self._cache[content_key(text)] for text in texts])

    def cache(self, texts: Sequence[str]) -> None:
        """Encode the texts that are not cached. A full cache drops the vectors of all other texts."""
        text_by_key = {content_key(text): text for text in texts}
        missing = {key: text for key, text in text_by_key.items() if key not in self._cache}
        if missing and len(self._cache) + len(missing) > _MAX_CACHED_TEXTS:
            self._cache = {key: self._cache[key] for key in text_by_key if key in self._cache}
        if missing:
            vectors = torch.from_numpy(self._encoder.encode(list(missing.values())))
            self._cache.update(zip(missing, vectors, strict=True))

    @cached_property
    def _encoder(self) -> FrozenQueries:
        return frozen_queries(self._source)


class QueryHead(QueryEncoder):
    """Eq. 2 with a trained linear map of frozen vectors, not a trained encoder. The map starts as the identity."""

    def __init__(self, width: int, *, frozen: FrozenQueryEncoder) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.linear.weight)
        self.frozen = frozen  # not a module, so neither saved nor trained

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"vectors": self.frozen(texts)}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return (B, E) unit vectors."""
        vectors = features["vectors"].to(self.linear.weight.device)
        return nn.functional.normalize(self.linear(vectors), dim=-1)


class Aggregator(nn.Module):
    """Weigh the items of each user with a softmax over scores.

    With `shrinkage`, the population persona also has a score. With `kinds`, stated preferences share a trained part of
    the total weight, initially half, so that many answers do not outweigh them.
    """

    def __init__(self, *, shrinkage: bool = False, kinds: bool = False) -> None:
        super().__init__()
        self.population_score = nn.Parameter(torch.ones(1)) if shrinkage else None
        self.preference_share = nn.Parameter(torch.zeros(1)) if kinds else None  # before a sigmoid

    def forward(self, query: Tensor, items: Tensor, *, lengths: Sequence[int], kind_ids: Tensor) -> Tensor:
        """Return the weights, (M,), of (M, E) items, ordered by user, for (B, E) queries. All vectors have length 1."""
        if query.shape[-1] != items.shape[-1]:
            widths = f"The query has {query.shape[-1]} values and the items have {items.shape[-1]}"
            raise ShapeMismatch(f"{widths}: both must come from the same encoder.")
        if len(lengths) != len(query) or sum(lengths) != len(items):
            raise ShapeMismatch(
                f"{len(query)} queries with {len(items)} items need {len(query)} lengths with the sum {len(items)}; "
                f"found {len(lengths)} lengths with the sum {sum(lengths)}."
            )
        users = zip(query, split_by_user(items, lengths), split_by_user(kind_ids, lengths), strict=True)
        return torch.cat([self._weigh(self.scores(x, own.to(query.dtype)), kinds) for x, own, kinds in users])

    def _weigh(self, scores: Tensor, kind_ids: Tensor) -> Tensor:
        is_preference = kind_ids == PREFERENCE_KIND
        if self.preference_share is None or not is_preference.any() or is_preference.all():
            return self._softmax(scores)
        share = torch.sigmoid(self.preference_share).to(scores.dtype)
        weights = torch.empty_like(scores)
        weights[is_preference] = share * torch.softmax(scores[is_preference], dim=0)
        weights[~is_preference] = (1 - share) * self._softmax(scores[~is_preference])
        return weights

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.population_score is None:
            return torch.softmax(scores, dim=0)
        return torch.softmax(torch.cat([scores, self.population_score.to(scores.dtype)]), dim=0)[:-1]

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        """Return the scores, (n,), of one user's items (n, E) for a query (E,)."""
        raise NotImplementedError


class DotAttention(Aggregator):
    """Eq. 3: w_i = exp(x·h_i / temperature) / Σ_k exp(x·h_k / temperature).

    With the paper's temperature of 1 and unit vectors, the weights of two items differ at most by a factor of e² ≈ 7.4.
    """

    def __init__(self, temperature: float = 1.0, *, shrinkage: bool = False, kinds: bool = False) -> None:
        super().__init__(shrinkage=shrinkage, kinds=kinds)
        self.temperature = temperature

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items @ query / self.temperature


class MeanPooling(Aggregator):
    """Weigh all items equally (PPlug, Table 8, "without IA")."""

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items.new_zeros(len(items))


class Projector(nn.Module):
    """Proj of eq. 4: a two-layer MLP from an item's vector (E,) to K soft tokens of width D.

    The initial outputs have unit variance: unit vectors are multiplied by √E, and both layers keep the variance.

    The hidden layer also reads the label of an item's answer, its style (F features) and the item's kind. An input is
    left out if `labels`, `style` or `kinds` is 0. The kind `answer` adds nothing.
    """

    def __init__(self, width: int, *, hidden: int, tokens: int, out: int, labels: int, style: int, kinds: int) -> None:
        super().__init__()
        self.tokens, self.input_scale = tokens, math.sqrt(width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, tokens * out)
        self.label = nn.Embedding(labels + 1, hidden) if labels else None
        self.style = nn.Linear(style, hidden, bias=False) if style else None
        self.kind = (
            nn.Parameter(torch.zeros(kinds - 1, hidden)) if kinds else None
        )  # one row for each kind except answers
        if self.label is not None:
            nn.init.zeros_(self.label.weight[0])  # no label adds nothing, even if all training items have labels
        nn.init.normal_(self.inner.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.inner.bias)
        # E[gelu(z)²] = 0.425 for a standard normal z.
        nn.init.normal_(self.outer.weight, std=1 / math.sqrt(0.425 * hidden))
        nn.init.zeros_(self.outer.bias)
        if self.style is not None:
            nn.init.normal_(self.style.weight, std=1 / math.sqrt(style))

    def hidden(self, items: Tensor, *, label_ids: Tensor, style: Tensor, kind_ids: Tensor) -> Tensor:
        """Return the (M, hidden) layer of (M, E) unit vectors.

        Label ids are (M,), -1 for none; kind ids (M,), 0 for an answer; style is (M, F).
        """
        # Scale the weights instead of the items, because there are fewer weights.
        weight, bias = (self.inner.weight * self.input_scale).to(items.dtype), self.inner.bias.to(items.dtype)
        inner = nn.functional.linear(items, weight, bias)
        if self.label is not None:
            inner = inner + self.label(label_ids + 1).to(items.dtype)
        if self.style is not None:
            inner = inner + nn.functional.linear(style.to(items.dtype), self.style.weight.to(items.dtype))
        if self.kind is not None and kind_ids.any():
            inner = inner + nn.functional.pad(self.kind, (0, 0, 1, 0))[kind_ids].to(items.dtype)
        return nn.functional.gelu(inner)

    def out(self, hidden: Tensor, *, weight_sums: Tensor, tokens: slice) -> Tensor:
        """Apply the outer layer of k of the K tokens to weighted sums; return (B, k, D).

        Σ w_i (A·g_i + b) = A·(Σ w_i g_i) + b·Σ w_i. `hidden` is Σ w_i g_i, (B, hidden). `weight_sums` is Σ w_i, (B,).
        """
        weight = self.outer.weight.view(self.tokens, -1, hidden.shape[1])[tokens]
        bias = self.outer.bias.view(self.tokens, -1)[tokens]
        return torch.einsum("bh,kdh->bkd", hidden, weight) + weight_sums[:, None, None] * bias


class JointProjector(nn.Module):
    """A projector for each part of joint vectors: text, picture, vector from outside; see `JointEncoder`.

    Σ_p s_p · Proj_p(part p): the shares s are a softmax of trained numbers over the parts that an item has. A part that
    is missing, which is a block of zeros, gets no share.

    Args:
        widths: of the parts, in order.
        settings: of each `Projector`.
    """

    def __init__(self, widths: Sequence[int], *, hidden: int, **settings: int) -> None:
        super().__init__()
        self.widths, self.hidden_width = list(widths), hidden
        self.parts = nn.ModuleList(Projector(width, hidden=hidden, **settings) for width in widths)
        self.part_scores = nn.Parameter(torch.zeros(len(self.widths)))

    @property
    def _parts(self) -> list[Projector]:
        return list(self.parts)  # type: ignore[arg-type]  # a ModuleList does not say what it holds

    @property
    def kind(self) -> Tensor | None:
        """The largest weight of each kind of items but answers, (kinds - 1, hidden); see `Projector`."""
        kinds: list[Tensor] = [part.kind for part in self._parts if part.kind is not None]
        return torch.stack(kinds).abs().amax(dim=0) if kinds else None

    def hidden(self, items: Tensor, *, label_ids: Tensor, style: Tensor, kind_ids: Tensor) -> Tensor:
        """Return (M, P·hidden + P): the hidden layers of (M, E) joint vectors times the shares, then the shares."""
        blocks = torch.split_with_sizes(items, self.widths, dim=1)
        norms = torch.stack([block.float().norm(dim=1) for block in blocks], dim=1)  # (M, P)
        scores = self.part_scores.masked_fill(norms < _SMALLEST_PART, -torch.inf).exp()
        shares = (scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-30)).to(items.dtype)
        answers = {"label_ids": label_ids, "style": style, "kind_ids": kind_ids}
        layers = [
            share[:, None] * part.hidden((block / norm.clamp_min(_SMALLEST_PART)[:, None]).to(items.dtype), **answers)
            for part, block, norm, share in zip(self._parts, blocks, norms.T, shares.T, strict=True)
        ]
        return torch.cat([*layers, shares], dim=1)

    def out(self, hidden: Tensor, *, weight_sums: Tensor, tokens: slice) -> Tensor:
        """Apply the outer layers to weighted sums of `hidden`, (B, P·hidden + P); return (B, k, D).

        The last columns are the weighted shares of the parts; they weigh the outer biases in place of `weight_sums`.
        """
        sizes = [*[self.hidden_width] * len(self.parts), len(self.parts)]
        *layers, shares = torch.split_with_sizes(hidden, sizes, dim=1)
        outputs = [
            part.out(layer, weight_sums=share, tokens=tokens)
            for part, layer, share in zip(self._parts, layers, shares.T, strict=True)
        ]
        return torch.stack(outputs).sum(dim=0)


class OptionHint(nn.Module):
    """Make one token that points to the options that fit the question and the user best.

    T = Σ_c tanh(a · (f_c − mean f of the other options)) · V_c. The features f_c are cosines of option c of C: to the
    question, to the user's items (mean), and to the nearest item. a and V are trained.
    """

    def __init__(self, options: int, *, width: int) -> None:
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.full((3,), math.log(3)))
        self.option_vectors = nn.Parameter(torch.randn(options, width))

    def forward(self, question: Tensor, options: Tensor, items: Tensor) -> Tensor:
        """Return one user's token (D,) from unit vectors: question (E,), options (C, E), items (n, E); n may be 0."""
        cosines = options @ items.T if len(items) else options.new_zeros(len(options), 1)
        features = torch.stack([options @ question, cosines.mean(dim=1), cosines.amax(dim=1)], dim=1)
        others = (features.sum(dim=0) - features) / (len(options) - 1)
        preference = torch.tanh((features - others) @ self.log_sharpness.exp())
        return preference @ self.option_vectors


class ColdStart(nn.Module):
    """Give users with at most `max_items` items the unscaled `tokens` (S, D) in place of a persona, and no label bias.

    Without `tokens`, these users get the prompt of a user without items. With `prior_numbers`, these users get the bias
    of the plug's label prior with these numbers. A user with a stated preference is never cold, because only a persona
    can read the preference.

    Args:
        prior_numbers: see `LabelPrior.numbers`; needs `tokens`.
    """

    tokens: Tensor | None
    prior_numbers: Tensor | None

    def __init__(
        self, tokens: Tensor | None = None, *, max_items: int = 0, prior_numbers: Tensor | None = None
    ) -> None:
        super().__init__()
        self.max_items = max_items
        self.register_buffer("tokens", tokens)
        self.register_buffer("prior_numbers", prior_numbers)

    @property
    def ignored_items(self) -> int:
        """Largest number of items that have no effect on the prompt."""
        return self.max_items if self.prior_numbers is None else 0

    def is_cold(self, history: HistoryBatch) -> Tensor:
        """Return which users are cold, (B,) bool, on the CPU."""
        return torch.tensor([self.covers(kinds) for kinds in split_by_user(history.kind_ids.cpu(), history.lengths)])

    def covers(self, kind_ids: Tensor | Int8Array) -> bool:
        """Return True if a user with items of these kinds, (N,), is cold."""
        return len(kind_ids) <= self.max_items and not bool((kind_ids == PREFERENCE_KIND).any())

    def ignores(self, kind_ids: Tensor | Int8Array) -> bool:
        """Return True if the items of a user, with these kinds, (N,), have no effect on the prompt."""
        return self.covers(kind_ids) and len(kind_ids) <= self.ignored_items

    def hide_items(self, history: HistoryBatch, is_cold: Tensor) -> HistoryBatch:
        """Drop the items of cold users, unless `replace_tokens` replaces their soft tokens."""
        lengths = torch.tensor(history.lengths)
        if self.tokens is not None or not (is_cold & (lengths > 0)).any():
            return history
        items = (~is_cold).repeat_interleave(lengths).nonzero().squeeze(1)
        return history.select(items.to(history.vectors.device), lengths=tuple((lengths * ~is_cold).tolist()))

    def replaces_all(self, is_cold: Tensor) -> bool:
        """Return True if no user of a batch gets a persona's tokens."""
        return self.tokens is not None and bool(is_cold.all())

    def replace_tokens(self, soft: Tensor, is_cold: Tensor) -> Tensor:
        """Replace the soft tokens, (B, S, D), of cold users by `tokens`."""
        if self.tokens is None:
            return soft
        if self.replaces_all(is_cold):
            return self.tokens.expand(len(is_cold), -1, -1)
        return torch.where(is_cold[:, None, None].to(soft.device), self.tokens, soft)

    def label_bias(self, is_cold: Tensor, *, bias_with: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Return the label bias, (B, C). That of cold users is 0 or, with `prior_numbers`, the bias with these numbers.

        Args:
            bias_with: returns the bias of all users with these numbers; None = the plug's own.
        """
        if self.prior_numbers is not None and bool(is_cold.all()):
            return bias_with(self.prior_numbers)
        bias = bias_with(None)
        if not is_cold.any():
            return bias
        other = torch.zeros_like(bias) if self.prior_numbers is None else bias_with(self.prior_numbers)
        return torch.where(is_cold[:, None].to(bias.device), other, bias)
