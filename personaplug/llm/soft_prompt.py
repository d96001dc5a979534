"""SoftPrompt, and `splice`: putting soft tokens into a batch of embedded text. Pure tensor code.

Soft tokens are placed by position, never by a marker in the text: whatever a user writes is only ever text.
"""

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
    """Soft tokens for a batch of queries.

    Attributes:
        vectors: (B, S, D), S = instruction tokens + persona tokens, D = the language model's embedding width.
        placement: `prefix` = before the user's text (the paper), `suffix` = right before the answer.
        label_bias: (B, C) what is added to the log-probability of each label where one of a closed set is the answer;
            None = nothing is. See `LabelPrior`.
    """

    vectors: Tensor
    placement: str = "prefix"
    label_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"A soft prompt's placement is one of {', '.join(PLACEMENTS)}; found {self.placement!r}.")
        if self.vectors.dim() != 3:
            raise ShapeMismatch(
                f"A soft prompt is (batch, tokens, width); found the shape {tuple(self.vectors.shape)}."
            )

    def __len__(self) -> int:
        return self.vectors.shape[0]

    def is_finite(self) -> bool:
        """Whether all that it holds is numbers."""
        parts = [self.vectors] if self.label_bias is None else [self.vectors, self.label_bias]
        return all(bool(torch.isfinite(part).all()) for part in parts)

    @classmethod
    def joined(cls, several: Sequence[SoftPrompt]) -> SoftPrompt:
        """Batches of one shape as one; with what they say of the labels, if all of them do."""
        biases = [one.label_bias for one in several if one.label_bias is not None]
        bias = torch.cat(biases) if len(biases) == len(several) else None
        return cls(torch.cat([one.vectors for one in several]), several[0].placement, label_bias=bias)


@dataclass(frozen=True)
class Spliced:
    """A batch with soft tokens in place.

    Attributes:
        embeds: (B, S + T, D).
        mask: (B, S + T) int64, 1 where a position is real.
        positions: (B, S + T) int64, counting the real positions of a row from 0.
        labels: (B, S + T) int64 or None; soft tokens and padding are never predicted.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor | None


def is_behind(soft: SoftPrompt | None) -> bool:
    """Whether there are soft tokens, and they stand behind the prompt."""
    return soft is not None and soft.placement == "suffix" and soft.vectors.shape[1] > 0


def splice(
    embeds: Tensor,
    mask: Tensor,
    *,
    soft: SoftPrompt | None,
    at: Tensor,
    labels: Tensor | None = None,
) -> Spliced:
    """Insert a row's soft tokens before its `at`-th real position, whichever side the padding is on.

    With at = 0 a left-padded row becomes [padding, soft, text] and a right-padded one [soft, text, padding]:
    the soft tokens stand between padding and text. A chat template gives the `at` of the user's own words.
    The soft tokens take the device and dtype of `embeds`, which are the embedding layer's.

    Args:
        embeds: (B, T, D) embedded text, padded on either side.
        mask: (B, T), 1 where a position is real; a row's real positions are contiguous.
        soft: (B, S, D) to insert, or None for plain text.
        at: (B,) how many real positions stand before the soft tokens.
        labels: (B, T) or None.
    Raises:
        ShapeMismatch: if the soft prompt is of another batch size or width, or `at` lies outside a row.
    """
    if soft is not None:
        _check(embeds, mask, soft=soft, at=at)
        embeds, mask, labels = _insert(embeds, mask, soft=soft, at=at, labels=labels)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Spliced(embeds, mask, positions, labels)


def _insert(
    embeds: Tensor, mask: Tensor, *, soft: SoftPrompt, at: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    vectors = soft.vectors.to(device=embeds.device, dtype=embeds.dtype)
    length, count = embeds.shape[1], vectors.shape[1]
    # Row b becomes embeds[b, :cut], soft[b], embeds[b, cut:]; expressed as one gather, so that rows may differ.
    cut = (_first_real(mask) + at.to(mask.device)).unsqueeze(1)  # (B, 1)
    column = torch.arange(length + count, device=embeds.device).unsqueeze(0)  # (1, S + T)
    is_soft = (column >= cut) & (column < cut + count)
    source = torch.where(column < cut, column, torch.where(is_soft, length + column - cut, column - count))
    together = torch.cat([embeds, vectors], dim=1)
    new_embeds = together.gather(1, source.unsqueeze(-1).expand(-1, -1, embeds.shape[2]))
    new_mask = _extended(mask, count=count, fill=1).gather(1, source)
    new_labels = None if labels is None else _extended(labels, count=count, fill=IGNORED).gather(1, source)
    return new_embeds, new_mask, new_labels


def _extended(values: Tensor, *, count: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((values.shape[0], count), fill)], dim=1)


def _first_real(mask: Tensor) -> Tensor:
    """(B,) index of each row's first real position; the row's length where there is none."""
    if mask.shape[1] == 0:
        return mask.new_zeros(mask.shape[0])
    first = mask.to(torch.int64).argmax(dim=1)
    return torch.where(mask.sum(dim=1) > 0, first, torch.full_like(first, mask.shape[1]))


def _check(embeds: Tensor, mask: Tensor, *, soft: SoftPrompt, at: Tensor) -> None:
    batch, _, width = soft.vectors.shape
    if (batch, width) != (embeds.shape[0], embeds.shape[2]):
        raise ShapeMismatch(
            f"The soft prompt is for {batch} rows of width {width}; the text has {embeds.shape[0]} rows of "
            f"width {embeds.shape[2]}. A plug fits only the language model that it was trained for."
        )
    if bool((at.to(mask.device) > mask.sum(dim=1)).any()) or bool((at < 0).any()):
        raise ShapeMismatch("The place of a soft prompt lies outside its row of text.")
