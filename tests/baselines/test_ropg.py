"""ROPG-KD: the teacher's targets, their cache, and the training of the retriever."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personaplug.baselines.history_prompt import HistoryPromptFormatter
from personaplug.baselines.retrievers import RecencyRetriever
from personaplug.baselines.ropg import RankingTarget, RopgObjective, RopgRetriever, RopgTeacher
from personaplug.config import TrainingConfig
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task_registry import lamp_task
from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, encode_samples
from personaplug.errors import DamagedFile, MissingData
from personaplug.llm.base import PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.training.trainer import fit

TASK = lamp_task("LaMP_3")
WORDS = ("sun", "rain", "snow", "wind", "fog", "hail")


def _sample(number: int, *, items: int = 6) -> Sample:
    history = tuple(
        HistoryItem(f"{number}-{k}", (("text", f"{WORDS[k % 6]} {number}"), ("score", str(k % 5 + 1))), "score")
        for k in range(items)
    )
    query = f"{WORDS[number % 6]} again"
    return Sample(str(number), f"user {number}", f"Score it. review: {query}", query, "3", history)


def _teacher(path: Path, toy: CausalLM, **changes: Any) -> RopgTeacher:
    settings = {"candidates": 4, "seed": 0, **changes}
    return RopgTeacher(
        path, llm=toy, formatter=HistoryPromptFormatter(TASK, toy), retriever=RecencyRetriever(), **settings
    )


def test_ropg_target_is_the_answers_likelihood_with_each_item(tmp_path: Path, toy: CausalLM) -> None:
    sample = _sample(0)
    teacher = _teacher(tmp_path / "targets.jsonl", toy)
    target = teacher.targets([sample])["0"]
    assert target.candidates[:2] == [5, 4]  # half of the candidates are the retriever's best items
    assert len(set(target.candidates)) == 4
    formatter = HistoryPromptFormatter(TASK, toy)
    for index, log_likelihood in zip(target.candidates, target.log_likelihoods, strict=True):
        prompt = formatter.format(sample.prompt, [sample.history[index]]).prompt
        loss, _ = toy.loss(PromptBatch([prompt]), ["3"])
        assert log_likelihood == pytest.approx(-float(loss), rel=1e-4)


def test_ropg_targets_skip_samples_with_fewer_than_two_items(tmp_path: Path, toy: CausalLM) -> None:
    samples = [_sample(0, items=1), _sample(1, items=0), _sample(2)]
    assert list(_teacher(tmp_path / "targets.jsonl", toy).targets(samples)) == ["2"]


def test_ropg_targets_resume_after_a_cut_line(tmp_path: Path, toy: CausalLM) -> None:
    path = tmp_path / "targets.jsonl"
    samples = [_sample(k) for k in range(3)]
    whole = _teacher(path, toy).targets(samples)
    first, *_ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'{"id": "1", "pla')
    scored_ids: list[str] = []

    class RecordingTeacher(RopgTeacher):
        def _score(self, sample: Sample, candidates: Sequence[int]) -> RankingTarget:
            scored_ids.append(sample.id)
            return super()._score(sample, candidates)

    again = RecordingTeacher(
        path, llm=toy, formatter=HistoryPromptFormatter(TASK, toy), retriever=RecencyRetriever(), candidates=4, seed=0
    )
    assert again.targets(samples) == whole
    assert scored_ids == ["1", "2"]
    assert _teacher(path, toy).targets(samples) == whole


def _objective(
    folder: Path, samples: Sequence[Sample], targets: dict[str, RankingTarget], *, encoder: HashEncoder
) -> tuple[RopgObjective, list[EncodedSample]]:
    table = EmbeddingStore.open(folder / "vectors", encoder)
    encoded = encode_samples(samples, table)
    retriever = RopgRetriever(encoder.width)
    return (
        RopgObjective(retriever, targets, samples=encoded, encoder=encoder, table=table),
        encoded,
    )


def test_ropg_loss_is_the_kl_divergence_of_the_rankings(tmp_path: Path, hashing: HashEncoder) -> None:
    samples = [_sample(k) for k in range(3)]
    targets = {s.id: RankingTarget(s.id, [0, 3, 5], [-1.0, -2.0, -0.5]) for s in samples}
    objective, encoded = _objective(tmp_path, samples, targets, encoder=hashing)
    summed, count = objective.loss(encoded)
    expected = 0.0
    target = np.exp([-1.0, -2.0, -0.5])
    target /= target.sum()
    for sample in samples:
        query = hashing.query_encoder().encode([sample.query])[0].astype(np.float64)
        texts = [sample.history[index].text for index in (0, 3, 5)]
        scores = hashing.encode(texts).astype(np.float16).astype(np.float64) @ query / 0.1
        ranking = np.exp(scores - scores.max())
        ranking /= ranking.sum()
        expected += float((target * np.log(target / ranking)).sum())
    assert float(summed.detach()) == pytest.approx(expected, rel=1e-4)
    assert int(count) == 3


def test_ropg_training_learns_the_models_ranking(tmp_path: Path, hashing: HashEncoder) -> None:
    samples = [_sample(k) for k in range(24)]
    # The model prefers the item about the next kind of weather in `WORDS`.
    preferred = {s.id: (int(s.id) + 1) % 6 for s in samples}
    targets = {
        s.id: RankingTarget(s.id, list(range(6)), [0.0 if k == preferred[s.id] else -8.0 for k in range(6)])
        for s in samples
    }
    objective, encoded = _objective(tmp_path, samples, targets, encoder=hashing)
    config = TrainingConfig(epochs=60, batch_size=8, learning_rate=0.03, validation_share=0.2)

    def hits() -> float:
        held = [s for s in samples if int(s.id) >= 18]
        queries = torch.from_numpy(hashing.query_encoder().encode([s.query for s in held]))
        with torch.no_grad():
            mapped = objective.module(queries).numpy()
        best = [
            int((hashing.encode([i.text for i in s.history]) @ q).argmax()) for s, q in zip(held, mapped, strict=True)
        ]
        return float(np.mean([index == preferred[s.id] for s, index in zip(held, best, strict=True)]))

    before = hits()
    fit(objective, samples=encoded[:18], config=config, seed=0, folder=tmp_path / "fit")
    assert before < 0.5
    assert hits() > 0.8


def test_ropg_retriever_is_equal_after_saving_and_loading(tmp_path: Path) -> None:
    retriever = RopgRetriever(4)
    with torch.no_grad():
        retriever.linear.weight.normal_()
    retriever.save(tmp_path)
    queries = torch.randn(3, 4)
    torch.testing.assert_close(RopgRetriever.load(tmp_path, width=4)(queries), retriever(queries))
    with pytest.raises(MissingData, match="no trained retriever"):
        RopgRetriever.load(tmp_path / "elsewhere", width=4)


def test_rejects_a_damaged_ropg_retriever_or_one_of_another_width(tmp_path: Path) -> None:
    RopgRetriever(4).save(tmp_path)
    with pytest.raises(DamagedFile, match=r"should have shape \[8, 8\]; found \[4, 4\].*train the retriever again"):
        RopgRetriever.load(tmp_path, width=8)
    path = tmp_path / "retriever.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 64
    path.write_bytes(damaged)
    with pytest.raises(DamagedFile, match="checksum"):
        RopgRetriever.load(tmp_path, width=4)


def test_untrained_ropg_retriever_is_the_identity() -> None:
    queries = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    torch.testing.assert_close(RopgRetriever(8)(queries), queries)
