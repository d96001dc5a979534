"""LabelBias: what is known of the labels of a closed set beforehand, at the tokens where they part.

A label of several tokens gets its bias where its tokens part from those of others: each branch the mean of its labels'
e^bias, against that of all the branches. Along a label this adds up to its own bias, less what is the same for all.
Where labels begin alike, choosing token by token then comes near to choosing among whole labels (`score`), no more.
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
    """The bias of each label, spread over its tokens.

    Args:
        choices: the C labels' tokens; none begins another.
        values: (B, C), in each row what is added to the log-probability of each label.
    """

    def __init__(self, choices: Sequence[Sequence[int]], values: Tensor) -> None:
        self.values = values.float()
        self._branches = _branches(tuple(map(tuple, choices)))

    def behind(self, said: Sequence[int]) -> tuple[list[int], Tensor]:
        """The n tokens that go on with what is said of a label, and what is added to the logit of each, (B, n).

        No tokens where there is but one way to go on.
        """
        branches = self._branches.get(tuple(said), {})
        if len(branches) < 2:
            return [], self.values[:, :0]
        means = torch.stack([_log_mean(self.values[:, places]) for places in branches.values()], dim=1)
        every = [place for places in branches.values() for place in places]
        return list(branches), means - _log_mean(self.values[:, every])[:, None]

    def where_labels_part(self) -> tuple[list[int], Tensor]:
        """The same behind all that the labels begin with together."""
        said: Ids = ()
        while len(branches := self._branches.get(said, {})) == 1:
            said += tuple(branches)
        return self.behind(said)

    def added_to(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """(B, L, V) logits with the bias where the labels part, in float32: a model's own would round it away.

        Args:
            wanted: (B, L) tokens that the logits are to predict, IGNORED where there is nothing to.
        """
        behind = lru_cache(self.behind)
        places: list[tuple[int, int, int]] = []
        values = [self.values[0, :0]]
        for row, ids in enumerate(wanted.tolist()):
            real = [column for column, token in enumerate(ids) if token != IGNORED]
            for count, column in enumerate(real):
                tokens, bias = behind(tuple(ids[earlier] for earlier in real[:count]))
                places += [(row, column, token) for token in tokens]
                values.append(bias[row, : len(tokens)])
        where = torch.tensor(places, dtype=torch.int64, device=logits.device).reshape(-1, 3).unbind(dim=1)
        return logits.float().index_put(where, torch.cat(values).to(logits.device), accumulate=True)


@lru_cache(maxsize=8)  # asked for in each step of a training
def _branches(choices: tuple[Ids, ...]) -> dict[Ids, dict[int, list[int]]]:
    """By what is said so far: the tokens that may follow, each with the places of the labels that it leads to."""
    found: dict[Ids, dict[int, list[int]]] = defaultdict(dict)
    for place, ids in enumerate(choices):
        for count, token in enumerate(ids):
            found[ids[:count]].setdefault(token, []).append(place)
    return dict(found)


def _log_mean(values: Tensor) -> Tensor:
    return values.logsumexp(dim=1) - math.log(values.shape[1])
