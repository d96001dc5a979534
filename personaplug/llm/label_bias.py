"""Bias of the labels of a closed set, distributed over their tokens.

A label gets its bias at the tokens at which labels branch. A branch gets the log of its labels' mean e^bias, relative
to the mean over all branches. Along a label, these values sum to the label's bias minus a constant that all labels
share. For labels with a common prefix, token-by-token decoding then approximates whole-label scoring.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import IGNORED


class LabelBias:
    """The (B, C) bias `values` of C labels, distributed over their token ids; no label is a prefix of another."""

    def __init__(self, labels: Sequence[Sequence[int]], values: Tensor) -> None:
        self.values = values.float()
        self._branches = _label_branches(tuple(map(tuple, labels)))

    def next_token_bias(self, prefix: Sequence[int]) -> tuple[list[int], Tensor]:
        """Return the n tokens that continue `prefix` to a label, and their bias (B, n). A single token gives n = 0."""
        branches = self._branches.get(tuple(prefix), {})
        if len(branches) < 2:
            return [], self.values[:, :0]
        means = torch.stack([_log_mean_exp(self.values[:, indices]) for indices in branches.values()], dim=1)
        all_indices = [index for indices in branches.values() for index in indices]
        return list(branches), means - _log_mean_exp(self.values[:, all_indices])[:, None]

    def first_branch_bias(self) -> tuple[list[int], Tensor]:
        """Return `next_token_bias` after the longest common prefix of all labels."""
        prefix: Ids = ()
        while len(branches := self._branches.get(prefix, {})) == 1:
            prefix += tuple(branches)
        return self.next_token_bias(prefix)

    def add_to(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Add the bias to the logits (B, L, V) of targets (B, L), in float32 so that no small bias is rounded away."""
        cached_bias = lru_cache(self.next_token_bias)
        positions: list[tuple[int, int, int]] = []
        values = [self.values[0, :0]]
        for row, ids in enumerate(targets.tolist()):
            columns = [column for column, token in enumerate(ids) if token != IGNORED]
            for count, column in enumerate(columns):
                tokens, bias = cached_bias(tuple(ids[earlier] for earlier in columns[:count]))
                positions += [(row, column, token) for token in tokens]
                values.append(bias[row, : len(tokens)])
        indices = torch.tensor(positions, dtype=torch.int64, device=logits.device).reshape(-1, 3).unbind(dim=1)
        return logits.float().index_put(indices, torch.cat(values).to(logits.device), accumulate=True)


@lru_cache(maxsize=8)  # every training step needs the same labels
def _label_branches(labels: tuple[Ids, ...]) -> dict[Ids, dict[int, list[int]]]:
    """Map each prefix to its next tokens, and each next token to the indices of its labels."""
    branches: dict[Ids, dict[int, list[int]]] = defaultdict(dict)
    for index, ids in enumerate(labels):
        for count, token in enumerate(ids):
            branches[ids[:count]].setdefault(token, []).append(index)
    return dict(branches)


def _log_mean_exp(values: Tensor) -> Tensor:
    return values.logsumexp(dim=1) - math.log(values.shape[1])
