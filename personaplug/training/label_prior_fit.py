"""Fit a label prior: its map and numbers on past answers alone, or its numbers beside a model's scores.

Neither fit runs the language model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from personaplug.config import TrainingConfig
from personaplug.data.label_set import LabelSet
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.label_prior import LabelPrior
from personaplug.plug.personalizer import Personalizer
from personaplug.training.batching import augment_history, epoch_batches, user_split

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

_EPOCHS, _PATIENCE = 25, 5
_MAX_STEPS = 2000
_BATCH_SIZE = 32
_METRIC_RATE, _NUMBER_RATE = 1e-3, 0.03
_PULL = 1.0  # strength of the pull of fitted numbers towards their start: as much as about one sample


@dataclass(frozen=True)
class _Batch:
    """Samples whose answers are labels: histories, cosines of items if they are constant, label ids, base scores."""

    history: HistoryBatch
    queries: Tensor | None
    cosines: Tensor | None
    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class LabelPriorFit:
    """Fits the label prior of a plug to samples whose item vectors are in the personalizer's table."""

    personalizer: Personalizer
    prior: LabelPrior
    labels: Sequence[str]

    def fit_alone(self, samples: Sequence[EncodedSample], *, config: TrainingConfig, seed: int) -> float:
        """Fit all parameters to predict training answers from past answers alone.

        The parameters with the lowest loss of held-out users are restored at the end.

        Returns:
            The mean loss of held-out users, in nats.
        """
        train, held_out = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)
        self.prior.requires_grad_(True)
        self.prior.set_usual(self._label_ids(samples))
        best_loss, best, best_epoch = self.loss(held_out), self.state(), 0
        optimizer = torch.optim.AdamW(self._groups(), weight_decay=0.0)
        steps = 0
        for epoch in range(_EPOCHS):
            for batch in self._augmented(train, config=config, seed=seed, epoch=epoch):
                optimizer.zero_grad()
                torch.autograd.backward(self._losses(batch).mean())
                optimizer.step()
                steps += 1
            loss = self.loss(held_out)
            if loss < best_loss:
                best_loss, best, best_epoch = loss, self.state(), epoch + 1
            if steps >= _MAX_STEPS or epoch + 1 - best_epoch >= _PATIENCE:
                break
        self.prior.load_state_dict(best)
        self._freeze()
        logger.info("label prior: loss %.3f of held-out users after %d passes", best_loss, best_epoch)
        return best_loss

    def fit_beside(self, scores: Tensor, samples: Sequence[EncodedSample]) -> float:
        """Fit the numbers to a model's label scores, (n, C) log-probabilities, of held-out samples.

        Returns:
            The mean loss of the same samples, in nats.
        """
        batches = [self._with_cosines(batch) for batch in self._batches(samples, scores=scores)]
        numbers = [number.requires_grad_(True) for number in self._numbers()]
        starts = [number.detach().clone() for number in numbers]
        optimizer = torch.optim.LBFGS(numbers, max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            pull = torch.stack([(n - start) ** 2 for n, start in zip(numbers, starts, strict=True)]).sum()
            loss = torch.stack([self._losses(batch).sum() for batch in batches]).sum() + _PULL * pull
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self._freeze()
        return self.loss(samples, scores=scores)

    @torch.no_grad()
    def loss(self, samples: Sequence[EncodedSample], *, scores: Tensor | None = None) -> float:
        """Return the mean −log p of the samples' labels, in nats; see `fit_alone` and `fit_beside`."""
        losses = torch.cat([self._losses(batch) for batch in self._batches(samples, scores=scores)])
        return float(losses.mean())

    def state(self) -> State:
        """Return a copy of the prior's parameters, on the CPU."""
        return {name: copy.deepcopy(value.detach().cpu()) for name, value in self.prior.state_dict().items()}

    def _freeze(self) -> None:
        """Exclude the prior from further training. Drop its gradients, which would count in a training's norm."""
        self.prior.requires_grad_(False)
        self.prior.zero_grad()

    def _losses(self, batch: _Batch) -> Tensor:
        bias = self.prior(batch.history, batch.queries, cosines=batch.cosines)
        return nn.functional.cross_entropy(batch.scores + bias, batch.ids, reduction="none")

    def _batches(self, samples: Sequence[EncodedSample], *, scores: Tensor | None = None) -> Iterator[_Batch]:
        """Yield batches of the samples whose answers are labels.

        Args:
            scores: (n, C) log-probabilities of the labels without the prior; None = those in all training answers.
        """
        ids = self._label_ids(samples)
        labelled = torch.nonzero(ids >= 0)[:, 0]
        for start in range(0, len(labelled), _BATCH_SIZE):
            rows = labelled[start : start + _BATCH_SIZE]
            batch = [samples[row] for row in rows.tolist()]
            yield self._batch(batch, ids[rows], scores=None if scores is None else scores[rows.to(scores.device)])

    def _batch(self, samples: Sequence[EncodedSample], ids: Tensor, *, scores: Tensor | None = None) -> _Batch:
        plug, usual = self.personalizer.plug, self.prior.usual
        queries = None
        if self.prior.metric is not None:
            queries = plug.query_vectors([sample.query for sample in samples])
        base = usual.log().expand(len(samples), -1) if scores is None else scores.to(usual)
        return _Batch(self.personalizer.gather(samples), queries, None, ids.to(usual.device), base)

    @torch.no_grad()
    def _with_cosines(self, batch: _Batch) -> _Batch:
        if batch.queries is None:
            return batch
        return replace(batch, cosines=self.prior.cosines(batch.history, batch.queries))

    def _label_ids(self, samples: Sequence[EncodedSample]) -> Tensor:
        label_set = LabelSet(self.labels)
        return torch.tensor([label_set.index(sample.target) for sample in samples])

    def _numbers(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.prior.named_parameters() if not name.startswith("metric")]

    def _groups(self) -> list[dict[str, object]]:
        metric = [] if self.prior.metric is None else [self.prior.metric.weight]
        groups = [{"params": self._numbers(), "lr": _NUMBER_RATE}, {"params": metric, "lr": _METRIC_RATE}]
        return [group for group in groups if group["params"]]

    def _augmented(
        self, samples: Sequence[EncodedSample], *, config: TrainingConfig, seed: int, epoch: int
    ) -> Iterator[_Batch]:
        """Yield an epoch's batches, with random parts of the histories."""
        lengths, share = [len(sample.rows) for sample in samples], config.subsample_history_prob
        for rows in epoch_batches(lengths, batch_size=_BATCH_SIZE, views=0, seed=seed, epoch=epoch):
            parts = [
                augment_history(samples[row.index], row, seed=seed, epoch=epoch, subsample_history_prob=share)
                for row in rows
            ]
            yield from self._batches(parts)
