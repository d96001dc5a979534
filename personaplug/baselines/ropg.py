"""ROPG-KD: a retriever that is distilled from the frozen model's likelihoods.

The model scores the right answer with one history item in the prompt, for some items of each history. A linear map
after the frozen query encoder then learns to rank items by these scores.

Source: Salemi et al., "Optimization Methods for Personalizing Large Language Models through Retrieval Augmentation",
arXiv 2404.05970 (ROPG-KD). Two differences: we train the map and not the whole encoder, and the teacher is the
likelihood of the answer and not a metric of a generated one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personaplug.baselines.history_prompt import HistoryFormatter
from personaplug.baselines.retrievers import Retriever, rank_answers
from personaplug.config import TrainingConfig
from personaplug.data.records import Sample
from personaplug.encoders import Encoder
from personaplug.encoders.base import Vectors, frozen_queries
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import MissingData
from personaplug.infra.atomic_io import JsonLines
from personaplug.infra.progress import Progress
from personaplug.infra.tensor_files import load_tensors, save_tensors, shapes_of
from personaplug.llm.base import LanguageModel, PromptBatch

_WEIGHTS = "retriever.safetensors"
_BATCH_SIZE = 8  # prompts that the model scores at once
_TEMPERATURE = 0.1  # of the softmax over the retriever's scores
_CANDIDATES = 8  # makes the draws of candidates differ from others with the same seed


class RopgRetriever(nn.Module):
    """A linear map after the frozen query encoder; it starts as the identity, which is dense retrieval."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """Map (B, E) unit vectors to (B, E) unit vectors."""
        return nn.functional.normalize(self.linear(queries), dim=-1)

    @torch.no_grad()
    def map_queries(self, queries: Vectors) -> Vectors:
        mapped: Vectors = self(torch.from_numpy(queries)).numpy()
        return mapped

    def save(self, folder: Path) -> None:
        save_tensors(folder / _WEIGHTS, self.state_dict())

    @classmethod
    def load(cls, folder: Path, *, width: int) -> RopgRetriever:
        """Load trained weights."""
        if not (folder / _WEIGHTS).exists():
            raise MissingData(
                f"{folder} has no trained retriever. Train one with `personaplug train --methods ropg:4`."
            )
        retriever = cls(width)
        remedy = f"Restore it, or delete {folder} and train the retriever again."
        weights = load_tensors(folder / _WEIGHTS, remedy=remedy, shapes=shapes_of(retriever))
        retriever.load_state_dict(weights)
        return retriever.eval()


@dataclass(frozen=True)
class RankingTarget:
    """The teacher's scores for some items of one sample's history.

    Attributes:
        id: id of the sample.
        candidates: (C,) indices of the items.
        log_likelihoods: (C,) of the target with that item in the prompt.
    """

    id: str
    candidates: list[int]
    log_likelihoods: list[float]


@dataclass(frozen=True)
class RopgTeacher:
    """Scores history items by the frozen model's likelihood of the answer, and caches the scores.

    Attributes:
        path: JSON lines of ranking targets; a stopped command continues after the last whole line.
        retriever: its best items are half of the candidates; the others are drawn.
        candidates: number of scored items per sample.
        owner: name of the training; cached scores of other trainings are ignored.
    """

    path: Path
    _: KW_ONLY
    llm: LanguageModel
    formatter: HistoryFormatter
    retriever: Retriever
    candidates: int
    seed: int
    owner: str = ""

    def targets(self, samples: Sequence[Sample]) -> dict[str, RankingTarget]:
        """Return targets by sample id, for samples with an answer and at least two items that fit into a prompt."""
        lines = JsonLines(self.path)
        cached = (values for values in lines if values.pop("owner", "") == self.owner)
        targets = {values["id"]: RankingTarget(**values) for values in cached}
        eligible = [sample for sample in samples if len(sample.history) > 1 and sample.target is not None]
        missing = [sample for sample in eligible if sample.id not in targets]
        with Progress("ropg: scoring items", total=len(missing), unit="samples") as bar:
            for sample, ranking in zip(missing, rank_answers(self.retriever, missing), strict=True):
                targets[sample.id] = self._score(sample, self._candidates(sample, ranking))
                lines.append({**asdict(targets[sample.id]), "owner": self.owner})
                bar.advance()
        return {sample.id: targets[sample.id] for sample in eligible if len(targets[sample.id].candidates) > 1}

    def _score(self, sample: Sample, candidates: Sequence[int]) -> RankingTarget:
        prompts = ((index, self.formatter.format(sample.full_prompt, [sample.history[index]])) for index in candidates)
        # Skip items that do not fit into the prompt, because the score would not depend on the item.
        texts = {index: prompt.prompt for index, prompt in prompts if prompt.included}
        log_likelihoods: list[float] = []
        with torch.no_grad():
            for start in range(0, len(texts), _BATCH_SIZE):
                batch = list(texts.values())[start : start + _BATCH_SIZE]
                losses, _ = self.llm.loss(PromptBatch(batch), [sample.target or ""] * len(batch))
                log_likelihoods += (-losses).tolist()
        return RankingTarget(sample.id, list(texts), log_likelihoods)

    def _candidates(self, sample: Sample, ranking: list[int]) -> list[int]:
        best, rest = ranking[: self.candidates // 2], ranking[self.candidates // 2 :]
        rng = np.random.default_rng([self.seed, _CANDIDATES, *sample.id.encode()])
        return best + [rest[index] for index in rng.permutation(len(rest))[: self.candidates - len(best)]]


class RopgObjective:
    """KL divergence of the retriever's ranking from the model's, over each sample's candidates.

    Σ_i t_i · (log t_i − log r_i), t = softmax of the log-likelihoods, r = softmax(cos(query, item) / 0.1)

    Each sample needs a target and all its items; augmentation drops items later.
    """

    unit = "query"
    reads_histories = False  # it ranks items, so hiding the history leaves nothing to learn

    def __init__(
        self,
        retriever: RopgRetriever,
        targets: Mapping[str, RankingTarget],
        *,
        samples: Sequence[EncodedSample],
        encoder: Encoder,
        table: EmbeddingStore,
    ) -> None:
        self.module: nn.Module = retriever
        self.device = torch.device("cpu")
        self.targets, self.table = targets, table
        self.rows = {sample.id: sample.rows[targets[sample.id].candidates] for sample in samples}
        vectors = frozen_queries(encoder).encode([sample.query for sample in samples])
        self.queries = {sample.id: vector for sample, vector in zip(samples, vectors, strict=True)}

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        losses, counts = self.sample_losses(samples)
        return losses.sum(), counts.sum()

    def sample_losses(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        queries = self.module(torch.from_numpy(np.stack([self.queries[sample.id] for sample in samples])))
        losses = [self._divergence(query, sample.id) for query, sample in zip(queries, samples, strict=True)]
        return torch.stack(losses), torch.ones(len(losses), dtype=torch.int64)

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Do nothing: the constructor has encoded the queries."""

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return [1] * len(samples)

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return self.lengths(samples)

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "peak": config.learning_rate}]

    def _divergence(self, query: Tensor, sample_id: str) -> Tensor:
        items = torch.from_numpy(self.table.gather(self.rows[sample_id]).astype(np.float32))
        log_targets = torch.tensor(self.targets[sample_id].log_likelihoods).log_softmax(dim=0)
        log_ranking = (items @ query / _TEMPERATURE).log_softmax(dim=0)
        return (log_targets.exp() * (log_targets - log_ranking)).sum()
