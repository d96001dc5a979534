"""A retriever that learns from the frozen model which items help: ROPG-KD, knowledge distillation from likelihoods.

For some items of a history the model is asked how likely the right answer becomes with that item in the prompt; a
linear map behind the frozen query encoder then learns to rank items by that.

Source: Salemi et al., "Optimization Methods for Personalizing Large Language Models through Retrieval Augmentation",
arXiv 2404.05970 (ROPG-KD). Ours differs in what is trained: the map, not the whole encoder; and the teacher is the
likelihood of the answer, not a metric of a generated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personaplug.baselines.history_prompt import HistoryWriter
from personaplug.baselines.retrievers import Retriever
from personaplug.config import TrainingConfig
from personaplug.data.records import Sample
from personaplug.encoders import Encoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import MissingData
from personaplug.infra.atomic_io import JsonLines, atomic_write
from personaplug.infra.progress import Progress
from personaplug.llm.base import LanguageModel, PromptBatch

_WEIGHTS = "retriever.safetensors"
_PROMPTS = 8  # asked of the model at once


class RopgRetriever(nn.Module):
    """A linear map behind the frozen query encoder; starts as the identity, that is as dense retrieval."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """(B, E) unit vectors to (B, E) unit vectors."""
        return nn.functional.normalize(self.linear(queries), dim=-1)

    def save(self, folder: Path) -> None:
        """Write the map.

        Raises:
            StorageError: if it cannot be written.
        """
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        atomic_write(folder / _WEIGHTS, lambda path: save_file(state, path))

    @classmethod
    def load(cls, folder: Path, *, width: int) -> RopgRetriever:
        """Read a trained map.

        Raises:
            MissingData: if it has not been trained.
        """
        if not (folder / _WEIGHTS).exists():
            raise MissingData(
                f"{folder} holds no trained retriever. `personaplug train --conditions ropg:4` makes one."
            )
        retriever = cls(width)
        retriever.load_state_dict(load_file(folder / _WEIGHTS))
        return retriever.eval()


@dataclass(frozen=True)
class Lesson:
    """What the model said of some items of one sample's history.

    Attributes:
        id: the sample.
        places: (C,) which items.
        log_likelihoods: (C,) of the right answer with that item in the prompt.
    """

    id: str
    places: list[int]
    log_likelihoods: list[float]


class Teacher:
    """Asks the frozen model which items help, and keeps what it said.

    Args:
        path: JSON lines of lessons; a stopped command goes on after the last whole one.
        retriever: half of the items asked about are the best by it, the others are drawn.
        candidates: items asked about for each sample.
    """

    def __init__(
        self,
        path: Path,
        *,
        llm: LanguageModel,
        writer: HistoryWriter,
        retriever: Retriever,
        candidates: int,
        seed: int,
    ) -> None:
        self.lines, self.llm, self.writer, self.retriever = JsonLines(path), llm, writer, retriever
        self.candidates, self.seed = candidates, seed

    def lessons(self, samples: Sequence[Sample]) -> dict[str, Lesson]:
        """Lessons by sample id, of the samples with an answer and at least two items that fit into a prompt."""
        known = {lesson.id: lesson for lesson in (Lesson(**values) for values in self.lines.read())}
        asked = [sample for sample in samples if len(sample.history) > 1 and sample.target is not None]
        missing = [sample for sample in asked if sample.id not in known]
        with Progress("ropg: what helps", total=len(missing), unit="samples") as bar:
            for sample in missing:
                known[sample.id] = self._ask(sample)
                self.lines.append(asdict(known[sample.id]))
                bar.advance()
        return {sample.id: known[sample.id] for sample in asked if len(known[sample.id].places) > 1}

    def _ask(self, sample: Sample) -> Lesson:
        written = {
            place: self.writer.write(sample.prompt, [sample.history[place]]) for place in self._candidates(sample)
        }
        # An item that does not fit would be taught as worth what the bare prompt is.
        prompts = [one.prompt for one in written.values() if one.written]
        places = [place for place, one in written.items() if one.written]
        found: list[float] = []
        with torch.no_grad():
            for start in range(0, len(prompts), _PROMPTS):
                part = prompts[start : start + _PROMPTS]
                losses, _ = self.llm.loss(PromptBatch(part), [sample.target or ""] * len(part))
                found += (-losses).tolist()
        return Lesson(sample.id, places, found)

    def _candidates(self, sample: Sample) -> list[int]:
        ranked = self.retriever.rank(sample)
        best, rest = ranked[: self.candidates // 2], ranked[self.candidates // 2 :]
        rng = np.random.default_rng([self.seed, 8, *sample.id.encode()])
        drawn = rng.permutation(len(rest))[: self.candidates - len(best)]
        return best + [rest[place] for place in drawn]


class RetrieverObjective:
    """KL divergence of the retriever's ranking from the model's, over each sample's candidates.

    Σ_i t_i · (log t_i − log r_i), t = softmax of the log-likelihoods, r = softmax(cos(query, item) / temperature)

    Args:
        lessons: by sample id.
        samples: those of the lessons; where their items' vectors are is noted now, since a training's views leave
            items out.
    """

    unit = "query"
    reads_histories = False  # it ranks items, and there is nothing to learn from none

    def __init__(
        self,
        retriever: RopgRetriever,
        lessons: dict[str, Lesson],
        *,
        samples: Sequence[EncodedSample],
        encoder: Encoder,
        table: EmbeddingStore,
        temperature: float,
    ) -> None:
        self.module: nn.Module = retriever
        self.device = torch.device("cpu")
        self.lessons, self.table, self.temperature = lessons, table, temperature
        self.rows = {sample.id: sample.rows[lessons[sample.id].places] for sample in samples}
        vectors = encoder.query_encoder().encode([sample.query for sample in samples])
        self.queries = {sample.id: vector for sample, vector in zip(samples, vectors, strict=True)}

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        queries = torch.from_numpy(np.stack([self.queries[sample.id] for sample in samples]))
        each = [self._divergence(q, sample.id) for q, sample in zip(self.module(queries), samples, strict=True)]
        return torch.stack(each).sum(), torch.tensor(len(each))

    def prepare(self, samples: Sequence[EncodedSample]) -> None:
        """Nothing: lessons and queries are there."""

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return [1] * len(samples)

    def live_lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        return self.lengths(samples)

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "peak": config.learning_rate}]

    def _divergence(self, query: Tensor, sample_id: str) -> Tensor:
        items = torch.from_numpy(self.table.gather(self.rows[sample_id]).astype(np.float32))
        wanted = torch.tensor(self.lessons[sample_id].log_likelihoods).log_softmax(dim=0)
        found = (items @ query / self.temperature).log_softmax(dim=0)
        return (wanted.exp() * (wanted - found)).sum()
