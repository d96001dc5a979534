"""LabelPrior: shift the score of each label by the labels of the user's past answers, above all of similar items."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from personaplug.plug.history_batch import HistoryBatch

_INITIAL_DOUBT = 4.0  # number of answers at which the user's label frequencies and the overall ones weigh the same
_INITIAL_NEAR_DOUBT = 1.0
_INITIAL_TEMPERATURE = 0.2  # an item with a cosine of 0.8 counts e times less than an equal text


class LabelPrior(nn.Module):
    """Shift the log-probability of each label by its frequency in the user's answers.

        b_c = trust · log(s_c / π_c) + near_trust · log(r_c / s_c)

        s_c = (n_c + doubt · π_c) / (n + doubt)              frequencies in all of the user's n answers
        r_c = (m_c + near_doubt · s_c) / (m + near_doubt)    frequencies in the answers to similar questions

    π_c is the frequency of label c in all training answers. n_c of the user's answers have label c. m_c is the sum of
    exp((cos(A·x, A·h_i) − 1) / temperature) over the items i with label c. x is the vector of the query, h_i that of
    an item. A starts as the identity. A, the doubts, the trusts and the temperature are trained, see
    `training/label_prior_fit.py`. A user without labels has b = 0.

    Nearest neighbours of a vector with a trained metric are those of https://arxiv.org/abs/1703.05175; a distribution
    of labels from neighbours beside a language model is that of https://arxiv.org/abs/1911.00172.

    Args:
        labels: number of labels (C).
        width: width of the encoder (E), to count similar items; 0 = count all items alike, which means r = s.
    """

    def __init__(self, labels: int, *, width: int = 0) -> None:
        super().__init__()
        self.log_doubt = nn.Parameter(torch.tensor(math.log(_INITIAL_DOUBT)))
        self.trust = nn.Parameter(torch.tensor(1.0))
        self.metric = nn.Linear(width, width, bias=False) if width else None
        if self.metric is not None:
            nn.init.eye_(self.metric.weight)
            self.log_near_doubt = nn.Parameter(torch.tensor(math.log(_INITIAL_NEAR_DOUBT)))
            self.near_trust = nn.Parameter(torch.tensor(1.0))
            self.log_temperature = nn.Parameter(torch.tensor(math.log(_INITIAL_TEMPERATURE)))
        self.usual: Tensor
        self.register_buffer("usual", torch.full((labels,), 1 / labels))

    def set_usual(self, label_ids: Tensor) -> None:
        """Set π from training answers: (n,) label indices, -1 for an answer that is not a label."""
        counts = torch.bincount(label_ids[label_ids >= 0], minlength=len(self.usual)) + 1  # add-one smoothing
        self.usual.copy_(counts / counts.sum())

    def numbers(self) -> Tensor:
        """Return all parameters but A: log doubt, trust and, with A, log near doubt, near trust, log temperature."""
        near = () if self.metric is None else (self.log_near_doubt, self.near_trust, self.log_temperature)
        return torch.stack([self.log_doubt, self.trust, *near])

    @torch.no_grad()
    def switch_off(self) -> None:
        """Make the bias 0 by trusts of 0, and exclude all parameters from training."""
        self.requires_grad_(False)
        self.trust.zero_()
        if self.metric is not None:
            self.near_trust.zero_()

    def forward(
        self,
        history: HistoryBatch,
        queries: Tensor | None = None,
        *,
        cosines: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> Tensor:
        """Return b of each user, (B, C).

        Args:
            queries: (B, E) unit vectors of the queries; needed to count similar items.
            cosines: the result of `cosines` in place of the queries.
            numbers: other values of `numbers`; None = the prior's own.
        """
        log_doubt, trust, *near_numbers = (self.numbers() if numbers is None else numbers).unbind()
        owners = self._owners(history)
        is_label = history.label_ids >= 0
        cells = (owners * len(self.usual) + history.label_ids)[is_label]
        own = self._frequencies(self._sums(cells, torch.ones_like(cells), history), self.usual, log_doubt)
        bias = trust * (own / self.usual).log()
        if self.metric is None:
            return bias
        if cosines is None:
            assert queries is not None, "similar items depend on the query"
            cosines = self.cosines(history, queries)
        log_near_doubt, near_trust, log_temperature = near_numbers
        weights = self._similarities(cosines[is_label], log_temperature)
        near = self._frequencies(self._sums(cells, weights, history), own, log_near_doubt)
        return bias + near_trust * (near / own).log()

    def item_weights(self, history: HistoryBatch, queries: Tensor | None, *, numbers: Tensor | None = None) -> Tensor:
        """Return the share of each item of one user in r or, without A, in s, (M,); 0 for an item without a label.

        The rest of the weight is that of π.

        Args:
            queries, numbers: as for `forward`.
        """
        log_doubt, _, *near_numbers = (self.numbers() if numbers is None else numbers).unbind()
        is_label = (history.label_ids >= 0).to(self.usual)
        own = is_label / (is_label.sum() + log_doubt.exp())
        if self.metric is None:
            return own
        assert queries is not None, "similar items depend on the query"
        near = is_label * self._similarities(self.cosines(history, queries), near_numbers[2])
        near_doubt = near_numbers[0].exp()
        return (near + near_doubt * own) / (near.sum() + near_doubt)

    def cosines(self, history: HistoryBatch, queries: Tensor) -> Tensor:
        """Return cos(A·x, A·h_i) of each item and the query of its user, (M,)."""
        assert self.metric is not None
        x = nn.functional.normalize(self.metric(queries.to(self.usual)), dim=-1)
        h = nn.functional.normalize(self.metric(history.vectors.to(self.usual)), dim=-1)
        return (h * x[self._owners(history)]).sum(dim=1)

    def _owners(self, history: HistoryBatch) -> Tensor:
        """Return the row of each item's user, (M,)."""
        lengths = torch.tensor(history.lengths, dtype=torch.int64, device=history.label_ids.device)
        return torch.repeat_interleave(lengths)

    def _sums(self, cells: Tensor, weights: Tensor, history: HistoryBatch) -> Tensor:
        """Sum the weights of items by user and label, (B, C); `cells` are indices into the flat result."""
        sums = self.usual.new_zeros(len(history.lengths) * len(self.usual))
        return sums.index_add(0, cells, weights.to(sums)).view(-1, len(self.usual))

    @staticmethod
    def _similarities(cosines: Tensor, log_temperature: Tensor) -> Tensor:
        return ((cosines - 1) / log_temperature.exp()).exp()

    @staticmethod
    def _frequencies(counts: Tensor, prior: Tensor, log_doubt: Tensor) -> Tensor:
        doubt = log_doubt.exp()
        return (counts + doubt * prior) / (counts.sum(dim=1, keepdim=True) + doubt)
