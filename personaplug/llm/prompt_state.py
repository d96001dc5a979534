"""The state of a prompt in a model's cache: what later tokens need of it.

An attention layer caches a key and a value of each token. A recurrent layer (Mamba, gated DeltaNet, short convolution)
caches states of one size, whatever the number of tokens. They cannot be cut or joined, only copied. Parts of equal
shape are stacked into one tensor, a block. Most models have one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; each block begins at a multiple of it


@dataclass(frozen=True)
class Part:
    """Place of one tensor of a layer's cache."""

    layer: int
    name: str  # keys, values, conv.N, recurrent.N, or output for an encoder
    block: int
    index: int  # in the block


@dataclass(frozen=True)
class Block:
    """Shape of parts that are stacked."""

    parts: int
    shape: tuple[int, ...]  # of one part; if it grows, (heads, width) of one token
    dtype: torch.dtype
    grows: bool = True  # True: a part of n tokens is (heads, n, width)

    def nbytes(self, tokens: int) -> int:
        size = self.parts * math.prod(self.shape) * self.dtype.itemsize * (tokens if self.grows else 1)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def part_shape(self, tokens: int) -> tuple[int, ...]:
        return (self.shape[0], tokens, self.shape[1]) if self.grows else self.shape


@dataclass(frozen=True)
class Layout:
    """Shapes of the state of one prompt."""

    blocks: tuple[Block, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of_encoder(cls, width: int, dtype: torch.dtype) -> Layout:
        """Return the layout of an encoder's output: one block, (1, 1, n, width)."""
        return cls((Block(1, (1, width), dtype),), (Part(0, "output", 0, 0),))

    @property
    def token_bytes(self) -> int:
        """Bytes per token, recurrent states excluded."""
        return sum(block.parts * math.prod(block.shape) * block.dtype.itemsize for block in self.blocks if block.grows)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of a prompt's recurrent states; 0 = the model has none."""
        return sum(block.nbytes(0) for block in self.blocks if not block.grows)

    @property
    def values(self) -> tuple[Part, ...]:
        """The attention values, one part for each layer that caches some."""
        return tuple(part for part in self.parts if part.name == "values")

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of the state of a prompt with this many tokens."""
        return sum(block.nbytes(tokens) for block in self.blocks)

    def as_json(self) -> dict[str, Any]:
        blocks = [{**asdict(block), "dtype": str(block.dtype).removeprefix("torch.")} for block in self.blocks]
        return {"blocks": blocks, "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Layout:
        """Reverse `as_json`; AttributeError, KeyError or TypeError if the value is damaged."""
        blocks = [
            Block(**{**block, "shape": tuple(block["shape"]), "dtype": getattr(torch, block["dtype"])})
            for block in value["blocks"]
        ]
        return cls(tuple(blocks), tuple(Part(**part) for part in value["parts"]))


@dataclass(frozen=True, repr=False)
class PromptState:
    """The state of one prompt."""

    layout: Layout
    blocks: tuple[Tensor, ...]  # (parts, heads, n, width) if a block grows, else (parts, *shape)
    tokens: int  # n

    def values(self, layer: int) -> Tensor:
        """Return the attention values of a layer, (n, heads · width)."""
        return join_heads(_part(self.layout, self.blocks, layer=layer))

    def followed_by(self, live: Sequence[Tensor], *, tokens: int) -> PromptState:
        """Return the state with further tokens; `live` are their blocks. All blocks must grow."""
        blocks = [torch.cat([own, further], dim=2) for own, further in zip(self.blocks, live, strict=True)]
        return PromptState(self.layout, tuple(blocks), self.tokens + tokens)


@dataclass(frozen=True, repr=False)
class StateBatch:
    """The states of P prompts, padded on the left to T tokens.

    Attributes:
        blocks: (parts, P, heads, T, width) if a block grows, else (parts, P, *shape).
        lengths: (P,) real tokens of each prompt.
        width: T.
    """

    layout: Layout
    blocks: tuple[Tensor, ...]
    lengths: Tensor
    width: int

    @classmethod
    def stack(cls, states: Sequence[PromptState], *, device: torch.device) -> StateBatch:
        """Copy the states of prompts, which have one layout, into a batch."""
        layout, lengths = states[0].layout, [state.tokens for state in states]
        blocks = [
            _stack_growing([state.blocks[index] for state in states], width=max(lengths), device=device)
            if block.grows
            else torch.stack([state.blocks[index] for state in states], dim=1).to(device)
            for index, block in enumerate(layout.blocks)
        ]
        return cls(layout, tuple(blocks), torch.tensor(lengths, device=device), max(lengths))

    @classmethod
    def of_cache(cls, layers: Iterable[Any], *, lengths: Tensor, width: int) -> StateBatch:
        """Return what the layers of a transformers cache hold of P left-padded prompts."""
        tensors: dict[tuple[Any, ...], list[Tensor]] = {}
        places = list[tuple[int, str, tuple[Any, ...], int]]()
        for number, layer in enumerate(layers):
            for name, tensor, grows in layer_tensors(layer):
                shape = (tensor.shape[1], tensor.shape[3]) if grows else tuple(tensor.shape[1:])
                stacked = tensors.setdefault((shape, tensor.dtype, grows), [])
                places.append((number, name, (shape, tensor.dtype, grows), len(stacked)))
                stacked.append(tensor)
        blocks = tuple(Block(len(stacked), *key) for key, stacked in tensors.items())
        order = {key: index for index, key in enumerate(tensors)}
        parts = tuple(Part(layer, name, order[key], index) for layer, name, key, index in places)
        return cls(Layout(blocks, parts), tuple(map(torch.stack, tensors.values())), lengths, width)

    def part(self, part: Part) -> Tensor:
        """Return one part of all prompts, (P, …)."""
        return self.blocks[part.block][part.index]

    def values(self, layer: int) -> Tensor:
        """Return the attention values of a layer, (P, T, heads · width)."""
        return join_heads(_part(self.layout, self.blocks, layer=layer))

    def rows(self) -> list[PromptState]:
        """Return the state of each prompt without padding, as views."""
        blocks = list(zip(self.blocks, self.layout.blocks, strict=True))
        return [
            PromptState(
                self.layout,
                tuple(
                    tensor[:, row, :, self.width - length :] if block.grows else tensor[:, row]
                    for tensor, block in blocks
                ),
                length,
            )
            for row, length in enumerate(self.lengths.tolist())
        ]


def layer_tensors(layer: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the name of each tensor in a layer of a transformers cache, the tensor, and whether it grows."""
    for kind in ("conv", "recurrent"):
        for number, tensor in getattr(layer, f"{kind}_states", {}).items():
            if tensor is not None:
                yield f"{kind}.{number}", tensor, False
    if getattr(layer, "keys", None) is not None:
        yield "keys", layer.keys, True
        yield "values", layer.values, True


def join_heads(values: Tensor) -> Tensor:
    """Turn values of a layer, (…, heads, T, width), into one vector for each token, (…, T, heads · width)."""
    return values.transpose(-3, -2).flatten(-2)


def _part(layout: Layout, blocks: Sequence[Tensor], *, layer: int) -> Tensor:
    part = next(part for part in layout.values if part.layer == layer)
    return blocks[part.block][part.index]


def _stack_growing(tensors: Sequence[Tensor], *, width: int, device: torch.device) -> Tensor:
    """Stack B tensors (parts, heads, n, width) with left padding."""
    parts, heads, _, size = tensors[0].shape
    stacked = tensors[0].new_empty(parts, len(tensors), heads, width, size, device=device)
    for index, tensor in enumerate(tensors):
        start = width - tensor.shape[2]
        stacked[:, index, :, :start] = 0  # masked, but 0 times an uninitialized NaN would still be NaN
        stacked[:, index, :, start:] = tensor
    return stacked
