"""The plug's layers: item attention (eq. 3), projector (eq. 4), query head (eq. 2), option hint, label prior."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from personaplug.config import PlugConfig
from personaplug.encoders import Encoder, QueryEncoder
from personaplug.errors import ConfigError, ShapeMismatch


class Aggregator(nn.Module):
    """Weighs the items of histories, user by user.

    With shrinkage there is one more, trained score in each user's softmax, of what is common to all: the weights then
    sum to less than 1, the less the fewer the items are and the lower their scores.

    Attributes:
        asks: whether the weights depend on the query.
    """

    asks = True

    def __init__(self, *, shrinkage: bool = False) -> None:
        super().__init__()
        self.common = nn.Parameter(torch.ones(1)) if shrinkage else None

    def forward(self, query: Tensor, items: Tensor, *, lengths: Sequence[int]) -> Tensor:
        """Return one weight per item; each user's sum to 1, or to less with shrinkage.

        Args:
            query: (B, E) unit vectors.
            items: (M, E) unit vectors, one user's behind the other's.
            lengths: how many each of the B users has, M together; 0 is allowed.
        Returns:
            (M,) in the format of `query`.
        Raises:
            ShapeMismatch: if query and items were made by encoders of different width, or the lengths do not fit.
        """
        if query.shape[-1] != items.shape[-1]:
            raise ShapeMismatch(
                f"The query has {query.shape[-1]} values and the items have {items.shape[-1]}: "
                f"both must come from the same encoder."
            )
        if len(lengths) != len(query) or sum(lengths) != len(items):
            raise ShapeMismatch(
                f"{len(query)} queries need as many lengths, {len(items)} items together; found {len(lengths)} with "
                f"{sum(lengths)}."
            )
        users = zip(query, per_user(items, lengths), strict=True)
        return torch.cat([self._softmax(self.scores(one, own.to(query.dtype))) for one, own in users])

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.common is None:
            return torch.softmax(scores, dim=0)
        return torch.softmax(torch.cat([scores, self.common.to(scores.dtype)]), dim=0)[:-1]

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        """Return (n,) scores of one user's (n, E) items for a query (E,), before the softmax."""
        raise NotImplementedError


class DotAttention(Aggregator):
    """Weigh items by their dot product with the query (PPlug, eq. 3).

    w_i = exp(x·h_i / temperature) / Σ_k exp(x·h_k / temperature)

    With unit vectors and temperature 1 the weights are close to uniform: x·h lies in [-1, 1], so no item
    outweighs another by more than e² ≈ 7.4 times. The paper uses temperature 1; it is the default here too.

    Source: PPlug, https://arxiv.org/abs/2409.11901, eq. 3.
    """

    def __init__(self, temperature: float = 1.0, *, shrinkage: bool = False) -> None:
        super().__init__(shrinkage=shrinkage)
        self.temperature = temperature

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items @ query / self.temperature


class MeanPooling(Aggregator):
    """Weigh all items alike (PPlug, Table 8, "without IA")."""

    asks = False

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items.new_zeros(len(items))


def per_user(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """What lies one user's behind the other's, user by user."""
    return torch.split_with_sizes(values, list(lengths))


def build_pooling(config: PlugConfig) -> Aggregator:
    """The aggregator that a plug's config names.

    Raises:
        ConfigError: for an unknown name.
    """
    if config.aggregator == "dot":
        return DotAttention(config.temperature, shrinkage=config.shrinkage)
    if config.aggregator == "mean":
        return MeanPooling(shrinkage=config.shrinkage)
    raise ConfigError(f"plug.aggregator must be one of dot, mean; found {config.aggregator!r}.")


class Projector(nn.Module):
    """Proj of eq. 4: a two-layer MLP from an item's vector to K soft tokens of width D.

    It starts with outputs of unit variance: unit vectors are stretched by √E so that each value is about 1, and both
    layers keep that size. An item's answer, where it is a channel of its own, is added to the hidden layer; that is
    the same as a one-hot, or its form, beside the vector.
    """

    def __init__(self, width: int, *, hidden: int, tokens: int, out: int, labels: int, forms: int) -> None:
        super().__init__()
        self.tokens, self.stretch = tokens, math.sqrt(width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, tokens * out)
        self.answer = nn.Embedding(labels + 1, hidden) if labels else None
        self.form = nn.Linear(forms, hidden, bias=False) if forms else None
        if self.answer is not None:
            nn.init.zeros_(self.answer.weight[0])  # no answer adds nothing, even where training never shows one
        nn.init.normal_(self.inner.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.inner.bias)
        # E[gelu(z)²] = 0.425 for a standard normal z.
        nn.init.normal_(self.outer.weight, std=1 / math.sqrt(0.425 * hidden))
        nn.init.zeros_(self.outer.bias)
        if self.form is not None:
            nn.init.normal_(self.form.weight, std=1 / math.sqrt(forms))

    def hidden(self, items: Tensor, *, answers: Tensor, forms: Tensor) -> Tensor:
        """The inner layer's output for items one by one, (M, hidden), in the number format of the items.

        Args:
            items: (M, E) unit vectors.
            answers: (M,) int64, -1 where an item has none.
            forms: (M, F), or (M, 0) if they are not read.
        """
        # The weights are stretched in place of the items: there are fewer of them.
        weight, bias = (self.inner.weight * self.stretch).to(items.dtype), self.inner.bias.to(items.dtype)
        inner = nn.functional.linear(items, weight, bias)
        if self.answer is not None:
            inner = inner + self.answer(answers + 1).to(items.dtype)
        if self.form is not None:
            inner = inner + nn.functional.linear(forms.to(items.dtype), self.form.weight.to(items.dtype))
        return nn.functional.gelu(inner)

    def out(self, hidden: Tensor, *, shares: Tensor, tokens: slice) -> Tensor:
        """Some tokens' outer layer for weighted sums, Σ w_i (A·g_i + b) = A·(Σ w_i g_i) + b·Σ w_i; (B, k, D).

        Args:
            hidden: (B, hidden) Σ w_i g_i.
            shares: (B,) Σ w_i.
            tokens: which k of the K.
        """
        weight = self.outer.weight.view(self.tokens, -1, hidden.shape[1])[tokens]
        bias = self.outer.bias.view(self.tokens, -1)[tokens]
        return torch.einsum("bh,kdh->bkd", hidden, weight) + shares[:, None, None] * bias


_KNOWN = 65_536  # texts whose vectors are remembered; 100 MB with MiniLM


class FrozenQueries:
    """Vectors of texts that are asked again and again, by an encoder that does not change; for one thread at a time.

    The texts themselves are not kept, only digests of them.

    Args:
        encoder: makes them, as it makes those of queries.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._made_by = encoder
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, E) unit vectors on the CPU."""
        self.remember(texts)
        return torch.stack([self._known[_digest(text)] for text in texts])

    def remember(self, texts: Sequence[str]) -> None:
        """Encode what is not known yet; beyond a bound, what is not asked for now is forgotten."""
        wanted = {_digest(text): text for text in texts}
        missing = {digest: text for digest, text in wanted.items() if digest not in self._known}
        if missing and len(self._known) + len(missing) > _KNOWN:
            self._known = {digest: self._known[digest] for digest in wanted if digest in self._known}
        if missing:
            vectors = torch.from_numpy(self._encoder.encode(list(missing.values())))
            self._known.update(zip(missing, vectors, strict=True))

    @cached_property
    def _encoder(self) -> QueryEncoder:
        return self._made_by.query_encoder().eval().requires_grad_(False)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class QueryHead(nn.Module):
    """A trained linear map of frozen vectors; starts as the identity."""

    def __init__(self, width: int, *, frozen: FrozenQueries) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.linear.weight)
        self.frozen = frozen  # no module: nothing of it is registered, saved or trained

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, E) unit vectors."""
        vectors = self.frozen(texts).to(self.linear.weight.device)
        return nn.functional.normalize(self.linear(vectors), dim=-1)


_LIKENESSES = 3


class OptionHint(nn.Module):
    """One token that leans towards the better options.

    T = Σ_c tanh(a · (f_c − the other options' mean f)) · V_c, with f_c the likenesses of option c: to the question, to
    the user's items on average, and to the nearest of them; a and V are trained. Options that are alike give no signal.

    Args:
        options: how many a prompt has (C).
        width: of the language model's embedding (D).
    """

    def __init__(self, options: int, *, width: int) -> None:
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.full((_LIKENESSES,), math.log(3)))
        self.places = nn.Parameter(torch.randn(options, width))

    def forward(self, question: Tensor, options: Tensor, items: Tensor) -> Tensor:
        """The token of one user, (D,).

        Args:
            question: (E,) unit vector.
            options: (C, E) unit vectors.
            items: (n, E) unit vectors of the history; n may be 0.
        """
        likeness = torch.stack([options @ question, *_to_items(options @ items.T)], dim=1)
        others = (likeness.sum(dim=0) - likeness) / (len(options) - 1)
        leaning = torch.tanh((likeness - others) @ self.log_sharpness.exp())
        return leaning @ self.places


def _to_items(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the largest cosine of each option, (C,) each, of (C, n); 0 without items."""
    if not cosines.shape[1]:
        nothing = cosines.new_zeros(len(cosines))
        return nothing, nothing
    return cosines.mean(dim=1), cosines.amax(dim=1)


_DOUBT = 4.0  # answers that a user must have given to be believed as much as everybody is, before training


class LabelPrior(nn.Module):
    """What a user's own answers add to the log-probability of each label.

    b_c = trust · log( (n_c + doubt · π_c) / ((n + doubt) · π_c) ), with n_c of the user's n answers being label c and
    π_c everybody's share of it; doubt and trust are trained, two numbers in all. A user without answers has b = 0.

    Args:
        labels: how many there are (C).
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.log_doubt = nn.Parameter(torch.tensor(math.log(_DOUBT)))
        self.trust = nn.Parameter(torch.tensor(1.0))
        self.usual: Tensor
        self.register_buffer("usual", torch.full((labels,), 1 / labels))

    def start_from(self, answers: Tensor) -> None:
        """Take everybody's shares from some answers: places among the labels, (n,), -1 for none of them."""
        counts = torch.bincount(answers[answers >= 0], minlength=len(self.usual)) + 1  # none of them is impossible
        self.usual.copy_(counts / counts.sum())

    def forward(self, answers: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """b of each user, (B, C).

        Args:
            answers: (M,) place of each item's answer among the labels, -1 for none of them.
            lengths: how many of the items each of the B users has.
        """
        counts = self._counts(answers, lengths)
        doubt = self.log_doubt.exp()
        own = (counts + doubt * self.usual) / (counts.sum(dim=1, keepdim=True) + doubt)
        return self.trust * (own / self.usual).log()

    def _counts(self, answers: Tensor, lengths: tuple[int, ...]) -> Tensor:
        labels, users = len(self.usual), len(lengths)
        owners = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=answers.device))
        places = (owners * labels + answers)[answers >= 0]
        return torch.bincount(places, minlength=users * labels).view(users, labels).to(self.usual)
