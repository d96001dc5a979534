"""Preference losses: make the kept answer likelier than a rejected one, given the plug's soft tokens.

DPO (Rafailov et al. 2023, arXiv 2305.18290): −log σ(β · (Δ − Δ_plain)) with Δ = log p(kept) − log p(rejected).
Δ_plain is the same difference under the plain model, the reference.
SimPO (Meng et al. 2024, arXiv 2405.14734): −log σ(β · (Δ per token) − γ), without a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.base import LanguageModel, PromptBatch

PreferenceKind = Literal["dpo", "simpo"]

_BATCH_SIZE = 8
_DPO_BETA = 0.1
_SIMPO_BETA, _SIMPO_MARGIN = 2.0, 1.0


@dataclass
class PreferenceLoss:
    """The preference term of a training.

    Attributes:
        weight: factor of the mean preference term, which is added to the mean loss of a token.
    """

    kind: PreferenceKind
    llm: LanguageModel
    weight: float
    _plain: dict[tuple[str, str], float] = field(default_factory=dict)  # log p of answers by sample id and text

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """For DPO, compute log p of all answers under the plain model."""
        if self.kind == "dpo":
            pairs = [(s, text) for s in samples if s.rejected for text in (s.target or "", *s.rejected)]
            for start in range(0, len(pairs), _BATCH_SIZE):
                part = pairs[start : start + _BATCH_SIZE]
                with torch.no_grad():
                    batch = PromptBatch([sample.prompt for sample, _ in part])
                    losses, _ = self.llm.loss(batch, [text for _, text in part])
                keys = [(sample.id, text) for sample, text in part]
                self._plain.update(zip(keys, (-losses).tolist(), strict=True))

    def draw(self, sample: EncodedSample) -> str:
        """Draw one of a sample's rejected answers, from torch's generator."""
        return sample.rejected[int(torch.randint(len(sample.rejected), ()))]

    def __call__(
        self,
        samples: Sequence[EncodedSample],
        rejected: Sequence[str],
        *,
        losses: tuple[Tensor, Tensor],
        tokens: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the preference terms of B samples, (B,), each times the number of tokens of its kept answer.

        Args:
            rejected: (B,) one drawn answer for each sample.
            losses, tokens: −log p and numbers of tokens, as (kept, rejected), each (B,).
        """
        kept_nll, rejected_nll = losses
        if self.kind == "dpo":
            plain = [self._plain_margin(s, text) for s, text in zip(samples, rejected, strict=True)]
            logits = _DPO_BETA * (rejected_nll - kept_nll - kept_nll.new_tensor(plain))
        else:
            logits = _SIMPO_BETA * (rejected_nll / tokens[1] - kept_nll / tokens[0]) - _SIMPO_MARGIN
        return self.weight * tokens[0] * -torch.nn.functional.logsigmoid(logits)

    def _plain_margin(self, sample: EncodedSample, rejected: str) -> float:
        return self._plain[sample.id, sample.target or ""] - self._plain[sample.id, rejected]
