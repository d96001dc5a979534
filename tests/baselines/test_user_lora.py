"""The rows lora and lora-per-user: who is trained on what, and whose matrices answer."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import MissingData
from personaplug.evaluation.lora_predictions import LoraPredictor
from personaplug.llm.base import PromptBatch
from personaplug.methods import LORA
from personaplug.run import Models, Run, open_models
from personaplug.training.recipes import train

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Models, list[Sample]]:
    folder = tmp_path_factory.mktemp("stage")
    data = folder / "data"
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=3, min_items=2, max_items=5), data)
    words = ["llm=toy", "encoder=hash:32", "dtype=float32", "epochs=1", "batch_size=4", "user_items=3"]
    run = Run.create(folder / "run", config=load_config(overrides=words), task=load_task(data))
    models = open_models(run.config)
    train(run, open_dataset(data, "train"), models=models, wanted=[LORA])
    return run, models, list(open_dataset(data, "dev"))


def _item(number: int, *, when: date | None = None, text: str | None = None) -> HistoryItem:
    return HistoryItem(str(number), (("text", text or f"thing {number}"), ("score", "4")), "score", when)


def test_a_user_is_trained_on_the_history_that_ends_earliest(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, texts = stage
    asked = texts[0]
    early = replace(asked, id="early", history=(_item(1, when=date(2020, 1, 1)), _item(2, when=date(2020, 1, 2))))
    late = replace(asked, id="late", history=(_item(2, when=date(2020, 1, 2)), _item(3, when=date(2021, 1, 1))))
    users = LoraPredictor(run, models, texts=[late, early], latest=-1, seed=0)
    assert [item.id for item in users._items(asked.owner)] == ["1", "2"]
    one = LoraPredictor(run, models, texts=[late, early], latest=1, seed=0)
    assert [item.id for item in one._items(asked.owner)] == ["2"]
    assert LoraPredictor(run, models, texts=[early], latest=0, seed=0)._items(asked.owner) == []


def test_what_is_asked_is_left_out_of_what_is_learned(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, texts = stage
    asked = texts[0]
    leaking = replace(asked, history=(_item(1), _item(2, text=asked.query.upper() + "!"), _item(3)))
    users = LoraPredictor(run, models, texts=[leaking], latest=-1, seed=0)
    assert [item.id for item in users._items(asked.owner)] == ["1", "3"]


def test_each_sample_is_answered_with_its_lenders_matrices(stage: tuple[Run, Models, list[Sample]]) -> None:
    import torch

    from personaplug.encoders.encoded_sample import EncodedSample
    from personaplug.evaluation.predictions import Answers

    run, models, texts = stage
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(iter_reader(texts, run), table)
    users = LoraPredictor(run, models, texts=texts, latest=-1, seed=0)

    def ask(part: list[EncodedSample], title: str) -> Answers:
        """The scores of the labels, written down, tell one state of the model from another."""
        with torch.no_grad():
            scores = models.llm.score(PromptBatch([s.prompt for s in part]), run.task.labels)
        lines = [[round(value, 5) for value in row] for row in scores.tolist()]
        return Answers([str(line) for line in lines], [False] * len(part), 0.0, 0, probabilities=lines)

    bare = ask(samples, "").texts
    own = list(range(len(samples)))
    task = users.answers(samples, own, ask=ask, per_user=False, title="")  # type: ignore[arg-type]
    mine = users.answers(samples, own, ask=ask, per_user=True, title="")  # type: ignore[arg-type]
    others = users.answers(samples, own[::-1], ask=ask, per_user=True, title="")  # type: ignore[arg-type]
    again = users.answers(samples[::-1], own[::-1], ask=ask, per_user=True, title="")  # type: ignore[arg-type]
    nobody = users.answers(samples, [None] * len(own), ask=ask, per_user=True, title="")  # type: ignore[arg-type]
    assert bare != task.texts
    assert all(a != b for a, b in zip(task.texts, mine.texts, strict=True))
    assert mine.texts[0] != others.texts[0]  # the first and the last sample are of different users
    assert again.texts[::-1] == mine.texts
    for made in (mine, others, again):  # what belongs to a sample stays with it
        assert made.probabilities is not None
        assert [str(line) for line in made.probabilities] == made.texts
    assert nobody.texts == task.texts
    assert ask(samples, "").texts == bare  # nothing stays in the model
    stored = len(list((run.folder / "users").glob("*.safetensors")))
    assert stored == len({text.owner for text in texts})
    cost = LoraPredictor(run, models, texts=texts, latest=-1, seed=0).cost()
    assert cost is not None
    assert cost.bytes > 0
    assert cost.seconds > 0


def test_untrained_matrices_are_asked_for(tmp_path: Path, stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, texts = stage
    with pytest.raises(MissingData, match="--conditions lora"):
        LoraPredictor(run, models, texts=texts, latest=-1, seed=7)


class iter_reader:
    """A reader of samples that are at hand."""

    def __init__(self, samples: list[Sample], run: Run) -> None:
        from personaplug.data.task import ReadReport

        self.samples, self.task, self.report = samples, run.task, ReadReport()

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.samples)
