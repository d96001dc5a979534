"""Soft prompts. They are inserted into embedded text by position, not by a marker, so that no text can move them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personaplug.errors import ConfigError, ShapeMismatch

IGNORED = -100  # the label that cross-entropy skips
PLACEMENTS = ("prefix", "suffix")


@dataclass(frozen=True)
class SoftPrompt:
    """Soft tokens for a batch of queries: S = instruction + persona tokens, D = embedding width of the model."""

    vectors: Tensor  # (B, S, D)
    placement: str = "prefix"  # before the user's text (the paper); "suffix" = right before the answer
    label_bias: Tensor | None = None  # (B, C), added to the log-probability of each label of a closed set

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"A placement must be one of {', '.join(PLACEMENTS)}; found {self.placement!r}.")
        if self.vectors.dim() != 3:
            shape = tuple(self.vectors.shape)
            raise ShapeMismatch(f"A soft prompt must have the shape (batch, tokens, width); found {shape}.")

    def __len__(self) -> int:
        return self.vectors.shape[0]

    @property
    def tokens(self) -> int:
        """Soft tokens per row (S)."""
        return self.vectors.shape[1]

    def row(self, index: int) -> SoftPrompt:
        """Return one row as a batch."""
        return self.rows([index])

    def rows(self, indices: Sequence[int]) -> SoftPrompt:
        """Return these rows as a batch."""
        selected = list(indices)
        bias = None if self.label_bias is None else self.label_bias[selected]
        return SoftPrompt(self.vectors[selected], self.placement, label_bias=bias)

    def is_finite(self) -> bool:
        parts = [self.vectors] if self.label_bias is None else [self.vectors, self.label_bias]
        return all(bool(torch.isfinite(part).all()) for part in parts)

    @classmethod
    def cat(cls, prompts: Sequence[SoftPrompt]) -> SoftPrompt:
        """Concatenate batches of equal S, D and placement; keep label biases only if all have one."""
        biases = [prompt.label_bias for prompt in prompts if prompt.label_bias is not None]
        bias = torch.cat(biases) if len(biases) == len(prompts) else None
        return cls(torch.cat([prompt.vectors for prompt in prompts]), prompts[0].placement, label_bias=bias)


@dataclass(frozen=True)
class Spliced:
    """A batch with inserted soft tokens."""

    embeds: Tensor  # (B, S + T, D)
    mask: Tensor  # (B, S + T) int64, 1 at real positions
    positions: Tensor  # (B, S + T) int64, counts the real positions of a row from 0


def splice(embeds: Tensor, mask: Tensor, *, soft: SoftPrompt | None, at: Tensor) -> Spliced:
    """Insert each row's soft tokens before its `at`-th real position. The padding may be on either side.

    Args:
        embeds, mask: (B, T, D) and (B, T), 1 at real positions, which are contiguous in a row.
        soft: (B, S, D) to insert; None = only compute the positions.
        at: (B,) real positions before the soft tokens.
    """
    if soft is not None:
        _check(embeds, mask, soft=soft, at=at)
        embeds, mask = _insert(embeds, mask, soft=soft, at=at)
    return Spliced(embeds, mask, positions=(mask.cumsum(dim=1) - 1).clamp(min=0))


def _insert(embeds: Tensor, mask: Tensor, *, soft: SoftPrompt, at: Tensor) -> tuple[Tensor, Tensor]:
    vectors = soft.vectors.to(device=embeds.device, dtype=embeds.dtype)
    length, count = embeds.shape[1], soft.tokens
    # Row b becomes embeds[b, :cut], soft[b], embeds[b, cut:]. One gather lets each row have its own cut.
    left_padding = (mask.cumsum(dim=1) == 0).sum(dim=1)
    cut = (left_padding + at.to(mask.device)).unsqueeze(1)  # (B, 1)
    column = torch.arange(length + count, device=embeds.device).unsqueeze(0)  # (1, S + T)
    is_soft = (column >= cut) & (column < cut + count)
    source = torch.where(column < cut, column, torch.where(is_soft, length + column - cut, column - count))
    new_embeds = torch.cat([embeds, vectors], dim=1).gather(1, source.unsqueeze(-1).expand(-1, -1, embeds.shape[2]))
    new_mask = torch.cat([mask, mask.new_ones(len(mask), count)], dim=1).gather(1, source)
    return new_embeds, new_mask


def _check(embeds: Tensor, mask: Tensor, *, soft: SoftPrompt, at: Tensor) -> None:
    batch, _, width = soft.vectors.shape
    if (batch, width) != (embeds.shape[0], embeds.shape[2]):
        raise ShapeMismatch(
            f"The soft prompt has {batch} rows of width {width}; the text has {embeds.shape[0]} rows of "
            f"width {embeds.shape[2]}. Use the language model that the plug was trained for."
        )
    if bool((at.to(mask.device) > mask.sum(dim=1)).any()) or bool((at < 0).any()):
        raise ShapeMismatch("The position of a soft prompt is outside its row: it must be from 0 to the row's length.")
