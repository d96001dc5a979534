"""The persona of a plug is dropped if the row that only counts labels has the lower held-out loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from training_settings import new_run, write_small_data

from personaplug.cli.shared_training import tell_trained
from personaplug.config_parsing import load_config
from personaplug.data import open_dataset
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.evaluation.evaluator import evaluate
from personaplug.methods import parse_methods
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run
from personaplug.training.batching import user_split
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import PLUG, closed_labels, train
from personaplug.training.persona_choice import keep_better
from personaplug.training.trainer import mean_loss
from personaplug.training.trainings import Trainings

NAME = "instruction+neighbors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


def _train(folder: Path, data: Path, *settings: str) -> tuple[Run, Models]:
    run, models = new_run(folder, data, *settings)
    train(run, open_dataset(data, "train", task=run.task), models=models, parts=[PLUG])
    return run, models


def _trainings(run: Run, models: Models, data: Path) -> tuple[Trainings, list[EncodedSample]]:
    trainings = Trainings(run, open_dataset(data, "train", task=run.task), models=models)
    config = run.config.training
    _, held_out = user_split(trainings.samples, share=config.validation_share, limit=config.validation_limit, seed=0)
    return trainings, held_out


def _facts(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run.plug_folder("plug", seed=0) / "fit.json").read_text())
    return facts


@torch.no_grad()
def _harm_persona(plug: PersonaPlug, counting: PersonaPlug) -> None:
    assert plug.persona is not None
    plug.persona.projector.outer.weight.normal_(std=50, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _harm_counting(plug: PersonaPlug, counting: PersonaPlug) -> None:
    assert counting.label_prior is not None
    counting.label_prior.trust.fill_(-20)


@pytest.mark.parametrize(("harm", "served_as"), [(_harm_persona, NAME), (_harm_counting, "plug")])
def test_harmful_persona_is_dropped_and_a_better_one_kept(
    tmp_path: Path, data: Path, harm: Callable[[PersonaPlug, PersonaPlug], None], served_as: str
) -> None:
    run, models = _train(tmp_path / "run", data)
    trainings, held_out = _trainings(run, models, data)
    plug, counting = (run.load_plug(name, seed=0, models=models) for name in ("plug", NAME))
    harm(plug, counting)
    objective = PlugObjective(plug, models.llm, table=trainings.embeddings, labels=closed_labels(run))
    plug.cold_start = before = ColdStart()  # undo the choice of the training
    facts = keep_better(plug, counting, held_out, name=NAME, mean_loss=partial(mean_loss, objective, max_tokens=4096))
    losses = cast(dict[str, float], facts["loss_by_choice"])
    assert facts["served_as"] == served_as == min(losses, key=losses.__getitem__)
    assert (plug.cold_start is before) == (served_as == "plug")
    assert mean_loss(objective, held_out, max_tokens=4096) == pytest.approx(min(losses.values()))


def _scripted(better: str, calls: list[list[EncodedSample]]) -> Callable[..., float]:
    """Return a loss that is low if the plug serves users as `better`."""

    def loss(objective: PlugObjective, samples: Sequence[EncodedSample], *, max_tokens: int) -> float:
        calls.append(list(samples))
        is_counting = cast(PersonaPlug, objective.module).cold_start.prior_numbers is not None
        return float(is_counting != (better == NAME))

    return loss


def test_saved_plug_without_persona_makes_the_prompts_of_the_counting_row(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[EncodedSample]] = []
    monkeypatch.setattr("personaplug.training.parts.mean_loss", _scripted(NAME, calls))
    run, models = _train(tmp_path / "run", data)
    trainings, held_out = _trainings(run, models, data)
    whole = [[len(sample.rows) for sample in samples] for samples in calls[-2:]]
    assert whole == [[len(sample.rows) for sample in held_out]] * 2
    plug, counting = (run.load_plug(name, seed=0, models=models) for name in ("plug", NAME))
    with torch.no_grad():
        soft, expected = (
            Personalizer(one, table=trainings.embeddings).soft_prompt(trainings.samples) for one in (plug, counting)
        )
    assert torch.equal(soft.vectors, expected.vectors)
    assert soft.label_bias is not None
    assert soft.label_bias.any()
    torch.testing.assert_close(soft.label_bias, expected.label_bias)
    assert _facts(run)["served_as"] == plug.training_facts["served_as"] == NAME
    tell_trained([run.plug_folder("plug", seed=0)])
    assert f"1.0000 as plug, 0.0000 as {NAME}; the plug serves users as {NAME}" in capsys.readouterr().out
    assert "**not used**" in (run.plug_folder("plug", seed=0) / "README.md").read_text()


def test_plug_without_persona_is_evaluated_as_the_counting_row(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personaplug.training.parts.mean_loss", _scripted(NAME, []))
    run, models = _train(tmp_path / "run", data)
    results: Any = evaluate(
        run,
        open_dataset(data, "dev", task=run.task),
        split="dev",
        config=load_config(overrides=["resamples=200"]).evaluation,
        methods=parse_methods(f"plug,wrong-user,mean-persona,{NAME}"),
        models=models,
        train=open_dataset(data, "train", task=run.task),
    ).to_json()
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["plug"]["metrics"] == rows[NAME]["metrics"]
    assert rows["plug"]["lost_history_rate"] == 0
    assert rows["wrong-user"]["metrics"]["nll"] != rows["plug"]["metrics"]["nll"]


def test_saved_plug_with_a_better_persona_keeps_it(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.training.parts.mean_loss", _scripted("plug", []))
    run, models = _train(tmp_path / "run", data)
    assert run.load_plug("plug", seed=0, models=models).cold_start.prior_numbers is None
    assert _facts(run)["served_as"] == "plug"
    assert "**not used**" not in (run.plug_folder("plug", seed=0) / "README.md").read_text()


@pytest.mark.parametrize("setting", ["label_prior=none", "controls=false"])
def test_nothing_is_chosen_without_control_or_label_prior(tmp_path: Path, data: Path, setting: str) -> None:
    run, _ = _train(tmp_path / "run", data, setting, "max_steps=1")
    assert "served_as" not in _facts(run)
    assert not run.trained(NAME, seed=0)


def test_counts_are_compared_with_the_row_of_counts(tmp_path: Path, data: Path) -> None:
    run, _ = _train(tmp_path / "run", data, "label_prior=counts", "max_steps=1")
    assert list(_facts(run)["loss_by_choice"]) == ["plug", "instruction+labels"]
