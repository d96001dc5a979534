"""The rows lora and lora-per-user: the items that users are trained on, and the adapter of each prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import DamagedFile, MissingData
from personaplug.evaluation.evaluator import Evaluator
from personaplug.methods import ModelInputs, find_method
from personaplug.methods.context import Assignment
from personaplug.methods.lora import UserLoras
from personaplug.run import Models, Run, open_models
from personaplug.training.baseline_parts import ADAPTER, LORA, task_lora
from personaplug.training.parts import train

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Models, list[Sample]]:
    folder = tmp_path_factory.mktemp("stage")
    data = folder / "data"
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=3, min_items=2, max_items=5), data)
    words = ["llm=toy", "encoder=hash:32", "dtype=float32", "epochs=1", "batch_size=4", "user_items=3"]
    run = Run.create(folder / "run", config=load_config(overrides=words), task=load_task(data))
    models = open_models(run.config)
    train(run, open_dataset(data, "train"), models=models, parts=[LORA])
    return run, models, list(open_dataset(data, "dev"))


def _item(number: int, *, when: date | None = None, text: str | None = None) -> HistoryItem:
    return HistoryItem(str(number), (("text", text or f"thing {number}"), ("score", "4")), "score", when)


def test_a_user_is_trained_on_the_history_that_ends_earliest(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, texts = stage
    evaluated = texts[0]
    early = replace(evaluated, id="early", history=(_item(1, when=date(2020, 1, 1)), _item(2, when=date(2020, 1, 2))))
    late = replace(evaluated, id="late", history=(_item(2, when=date(2020, 1, 2)), _item(3, when=date(2021, 1, 1))))
    users = UserLoras(run, models, [late, early], seed=0)
    assert [item.id for item in users._items(evaluated.owner)] == ["1", "2"]
    assert UserLoras(run, models, [replace(early, history=())], seed=0)._items(evaluated.owner) == []
    rejected = replace(_item(3, when=date(2020, 1, 3)), kind="rejection")
    stated = HistoryItem("4", (("preference", "Short, please."),), kind="preference")
    mixed = UserLoras(run, models, [replace(early, history=(*early.history, rejected, stated))], seed=0)
    assert [item.id for item in mixed._items(evaluated.owner)] == ["1", "2"]


def test_user_lora_is_not_trained_on_evaluated_queries(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, texts = stage
    evaluated = texts[0]
    leaking = replace(evaluated, history=(_item(1), _item(2, text=evaluated.query.upper() + "!"), _item(3)))
    users = UserLoras(run, models, [leaking], seed=0)
    assert [item.id for item in users._items(evaluated.owner)] == ["1", "3"]


def test_rejects_a_damaged_task_lora(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, _ = stage
    path = run.plug_folder("lora", seed=0) / ADAPTER
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-7] ^= 1
    path.write_bytes(damaged)
    try:
        with pytest.raises(DamagedFile, match="train the LoRA again"), task_lora(run, models, seed=0):
            pass
    finally:
        path.write_bytes(whole)
    with task_lora(run, models, seed=0):
        pass


def test_each_sample_is_predicted_with_the_lora_of_its_source(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, texts = stage
    reader = open_dataset(run.folder.parent / "data", "dev", task=run.task)
    context = Evaluator(run, reader, split="dev", config=run.config.evaluation, models=models).context
    count = len(texts)

    def probabilities(row: str, sources: Sequence[int | None]) -> list[list[float]]:
        """Return label probabilities, which differ between adapters."""
        assignments = [Assignment(source, np.empty(0, np.int64)) for source in sources]
        lengths = [len(text.history) for text in texts]
        inputs = ModelInputs(context.samples, assignments, context.prompt_lengths, lengths)
        predictions = find_method(row).predict(context, inputs, seed=0)
        assert predictions.probabilities is not None
        return predictions.probabilities

    bare = probabilities("plain", range(count))
    task = probabilities("lora", range(count))
    own = probabilities("lora-per-user", range(count))
    reversed_sources = probabilities("lora-per-user", range(count)[::-1])
    nobody = probabilities("lora-per-user", [None] * count)
    assert bare != task
    assert all(a != b for a, b in zip(task, own, strict=True))
    assert own[0] != reversed_sources[0]  # the first and the last sample are of different users
    assert nobody == task
    assert probabilities("lora-per-user", range(count)) == own
    assert probabilities("plain", range(count)) == bare  # nothing stays in the model
    stored = len(list((run.folder / "users").glob("*.safetensors")))
    assert stored == len({text.owner for text in texts})
    cost = UserLoras(run, models, texts, seed=0).cost()
    assert cost is not None
    assert cost.bytes > 0
    assert cost.seconds > 0


def test_error_for_an_untrained_lora_names_the_command(stage: tuple[Run, Models, list[Sample]]) -> None:
    run, models, _ = stage
    reader = open_dataset(run.folder.parent / "data", "dev", task=run.task)
    evaluator = Evaluator(run, reader, split="dev", config=run.config.evaluation, models=models)
    with pytest.raises(MissingData, match="--methods lora"):
        evaluator.trial(find_method("lora-per-user"), seed=7)
