"""Fit a label prior: its metric and numbers on past answers alone, or its numbers beside a model's scores.

Neither passes through the language model, so a fit takes seconds.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personaplug.config import TrainingConfig
from personaplug.data.label_set import LabelSet
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.plug.label_prior import LabelPrior
from personaplug.plug.personalizer import Personalizer
from personaplug.training.batching import augment_history, epoch_batches, user_split

logger = logging.getLogger(__name__)

_EPOCHS, _PATIENCE = 25, 5
_MAX_STEPS = 2000
_BATCH_SIZE = 32
_METRIC_RATE, _NUMBER_RATE = 1e-3, 0.03
_PULL = 1.0  # strength of the pull of fitted numbers towards their start: as much as about one sample


@dataclass(frozen=True)
class LabelPriorFit:
    """Fits the label prior of a plug to samples whose item vectors are in the personalizer's table."""

    personalizer: Personalizer
    prior: LabelPrior
    labels: Sequence[str]

    def fit_alone(self, samples: Sequence[EncodedSample], *, config: TrainingConfig, seed: int) -> float:
        """Fit all parameters to predict training answers from past answers alone, and freeze the metric.

        The parameters with the lowest loss of held-out users are restored at the end.

        Returns:
            The mean loss of held-out users, in nats.
        """
        train, held_out = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)
        self.prior.set_usual(self._label_ids(samples))
        best_loss, best, best_epoch = self.loss(held_out), copy.deepcopy(self.prior.state_dict()), 0
        optimizer = torch.optim.AdamW(self._groups(), weight_decay=0.0)
        steps = 0
        for epoch in range(_EPOCHS):
            for batch in self._batches(train, config=config, seed=seed, epoch=epoch):
                optimizer.zero_grad()
                torch.autograd.backward(self._losses(batch).mean())
                optimizer.step()
                steps += 1
            loss = self.loss(held_out)
            if loss < best_loss:
                best_loss, best, best_epoch = loss, copy.deepcopy(self.prior.state_dict()), epoch + 1
            if steps >= _MAX_STEPS or epoch + 1 - best_epoch >= _PATIENCE:
                break
        self.prior.load_state_dict(best)
        self.prior.freeze_metric()
        self.prior.zero_grad()
        logger.info("label prior: loss %.3f of held-out users after %d passes", best_loss, best_epoch)
        return best_loss

    def fit_beside(self, scores: Tensor, samples: Sequence[EncodedSample]) -> float:
        """Fit the numbers to a model's label scores, (n, C) log-probabilities, of held-out samples.

        Returns:
            The mean loss of the samples, in nats.
        """
        numbers = [parameter for name, parameter in self.prior.named_parameters() if not name.startswith("metric")]
        starts = [number.detach().clone() for number in numbers]
        optimizer = torch.optim.LBFGS(numbers, max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            pull = sum((number - start) ** 2 for number, start in zip(numbers, starts, strict=True))
            loss = self._losses(samples, scores=scores).sum() + _PULL * pull
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.prior.zero_grad()
        return self.loss(samples, scores=scores)

    @torch.no_grad()
    def loss(self, samples: Sequence[EncodedSample], *, scores: Tensor | None = None) -> float:
        """Return the mean −log p of the samples' labels, in nats; see `fit_alone` and `fit_beside`."""
        return float(self._losses(samples, scores=scores).mean())

    def _losses(self, samples: Sequence[EncodedSample], *, scores: Tensor | None = None) -> Tensor:
        """Return −log p of each sample whose answer is a label."""
        base = self.prior.usual.log() if scores is None else scores.to(self.prior.usual)
        logits = base + self.personalizer.label_bias(samples)
        ids = self._label_ids(samples).to(logits.device)
        return nn.functional.cross_entropy(logits[ids >= 0], ids[ids >= 0], reduction="none")

    def _label_ids(self, samples: Sequence[EncodedSample]) -> Tensor:
        label_set = LabelSet(self.labels)
        return torch.tensor([label_set.index(sample.target) for sample in samples])

    def _groups(self) -> list[dict[str, object]]:
        metric = [] if self.prior.metric is None else list(self.prior.metric.parameters())
        numbers = [parameter for name, parameter in self.prior.named_parameters() if not name.startswith("metric")]
        return [{"params": numbers, "lr": _NUMBER_RATE}, *([{"params": metric, "lr": _METRIC_RATE}] if metric else [])]

    def _batches(
        self, samples: Sequence[EncodedSample], *, config: TrainingConfig, seed: int, epoch: int
    ) -> list[list[EncodedSample]]:
        lengths = [len(sample.rows) for sample in samples]
        batches = epoch_batches(lengths, batch_size=_BATCH_SIZE, views=0, seed=seed, epoch=epoch)
        share = config.subsample_history_prob
        return [
            [
                augment_history(samples[one.index], one, seed=seed, epoch=epoch, subsample_history_prob=share)
                for one in batch
            ]
            for batch in batches
        ]
