"""`train`, then `generate --copy-head`: the answer equals that of one call, and errors name the missing training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from personaplug.cli.main import main
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.inference import generate
from personaplug.run import Run, open_models

TOY = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false")


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `data`, a trained `run`, and a `history` and a `prompt` of a user."""
    write_simulation(SimulationConfig(task="style", users=8, dev_users=2), tmp_path / "data")
    result = _call("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *TOY)
    assert result.exit_code == 0, result.output
    question: dict[str, Any] = json.loads((tmp_path / "data" / "dev_questions.json").read_text())[0]
    (tmp_path / "history").write_text("\n".join(map(json.dumps, question["profile"])))
    (tmp_path / "prompt").write_text(question["input"])
    return tmp_path


def test_generate_with_a_copy_head_needs_its_training(folder: Path) -> None:
    prompt, history = (folder / "prompt").read_text(), folder / "history"
    words = ("generate", "--run", folder / "run", "--prompt", prompt, "--history", history, "--copy-head")
    refused = _call(*words)
    assert (refused.exit_code, "--methods plug+copy-head" in refused.output) == (2, True)
    trained = _call("train", "--data", folder / "data", "--out", folder / "run", "--methods", "plug+copy-head", *TOY)
    assert trained.exit_code == 0, trained.output
    run = Run.open(folder / "run")
    models = open_models(run.config)
    head = run.load_copy_head(models.llm, seed=0)
    given: dict[str, Any] = {"history": history, "models": models, "config": run.config.evaluation}
    answer = generate(run, prompt, copy_head=head, **given)
    assert answer != generate(run, prompt, **given)
    assert _call(*words).stdout == f"{answer}\n"
