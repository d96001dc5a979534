"""A frozen encoder's vectors of what is asked, each text encoded once, and a trained linear map behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from personaplug.encoder import Encoder, QueryEncoder

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
