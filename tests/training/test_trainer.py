"""The training loop: what it learns, what it leaves unchanged, resumption and failures."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from training_settings import new_run, write_small_data

from personaplug.config import PAPER, Config
from personaplug.data import open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError, RunConflict, StorageError, TrainingDiverged
from personaplug.infra import tensor_files
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.prompt_state import PromptState
from personaplug.plug.model import PersonaPlug
from personaplug.run import Run, open_models
from personaplug.training.batching import user_split
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import INSTRUCTION, PLUG, _start_from_words, build_plug, train
from personaplug.training.trainer import FitReport, fit
from personaplug.training.trainings import Trainings

PAPER_SETTINGS = tuple(f"{name}={value}" for name, value in asdict(PAPER).items())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


def _train(folder: Path, data: Path, *settings: str) -> Run:
    run, models = new_run(folder, data, *settings)
    train(run, open_dataset(data, "train", task=run.task), models=models)
    return run


def _fitted(folder: Path, data: Path, *settings: str) -> tuple[FitReport, PlugObjective, list[EncodedSample]]:
    run, models = new_run(folder / "run", data, *settings)
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(open_dataset(data, "train", task=run.task), table)
    objective = PlugObjective(build_plug(run, models, seed=0), models.llm, table=table)
    report = fit(objective, samples=samples, config=run.config.training, seed=0, folder=folder / "fit")
    return report, objective, samples


def _weights(run: Run, name: str = "plug", *, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(run.plug_folder(name, seed=seed) / "plug.safetensors")


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_saves_plug_and_control_for_each_seed(tmp_path: Path, data: Path) -> None:
    run = _train(tmp_path / "run", data, "seeds=0,1", "max_steps=2")
    for name in ("plug", "instruction-only"):
        assert run.trained(name, seed=0)
        assert not _same(_weights(run, name, seed=0), _weights(run, name, seed=1))
    facts = {n: json.loads((run.plug_folder(n, seed=0) / "fit.json").read_text()) for n in ("plug", "instruction-only")}
    assert facts["plug"]["steps"] == facts["instruction-only"]["steps"]
    assert facts["plug"]["samples"] == facts["instruction-only"]["samples"]
    assert not list(run.plug_folder("plug", seed=0).glob("state-*"))


def test_fit_lowers_the_loss_and_logs_it(tmp_path: Path, data: Path) -> None:
    run = _train(tmp_path / "run", data, "controls=false", "epochs=8")
    lines = [json.loads(line) for line in (run.plug_folder("plug", seed=0) / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert min(validations) < validations[0]
    assert {"samples_per_second", "seconds_left", "learning_rate", "gradient_norm"} <= lines[0].keys()
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[0] < max(rates)
    assert rates[-1] < 0.1 * max(rates)


def test_fit_ends_with_the_best_checkpoint(tmp_path: Path, data: Path) -> None:
    report, objective, _ = _fitted(tmp_path, data, "learning_rate=0.3", "epochs=6")
    lines = [json.loads(line) for line in (tmp_path / "fit" / "log.jsonl").read_text().splitlines()]
    validations = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert report.best_loss == min(validations.values()) == validations[report.best_step]
    best = load_file(tmp_path / "fit" / f"best-{report.best_step:08d}" / "weights.safetensors")
    assert _same(best, dict(objective.module.state_dict()))


def test_validation_loss_weighs_samples_with_and_without_histories(tmp_path: Path, data: Path) -> None:
    report, objective, samples = _fitted(tmp_path, data, "drop_history_prob=0.25", "max_steps=1")
    _, held = user_split(samples, share=0.1, limit=256, seed=0)
    with torch.no_grad():
        whole, none = (
            float(loss) / int(tokens)
            for loss, tokens in map(objective.loss, (held, [one.without_items() for one in held]))
        )
    assert abs(whole - none) > 1e-4
    assert report.best_loss == pytest.approx(0.75 * whole + 0.25 * none, rel=1e-5)


@pytest.mark.parametrize("name", ["plug", "instruction-only"])
def test_instruction_tokens_start_as_tokens_of_answers(tmp_path: Path, data: Path, name: str) -> None:
    part = next(part for part in (PLUG, INSTRUCTION) if part.name == name)
    run, models = new_run(tmp_path / "run", data, "instruction_start=words")
    trainings = Trainings(run, open_dataset(data, "train", task=run.task), models=models)
    plug, again, other = (build_plug(run, models, part=part, seed=0) for _ in range(3))
    for one, seed in ((plug, 0), (again, 0), (other, 1)):
        _start_from_words(one, trainings.samples, models, seed=seed)
    digits = models.llm.embed_texts(["1", "2", "3", "4", "5"])
    assert len(digits) == 5
    starts = plug.instruction.detach() * plug.spec.embedding_scale
    assert torch.cdist(starts, digits).amin(dim=1).max() < 1e-4
    assert torch.equal(plug.instruction, again.instruction)
    assert not torch.equal(plug.instruction, other.instruction)


@pytest.mark.parametrize("plug", [PAPER_SETTINGS, ()], ids=["paper", "default"])
def test_train_changes_nothing_but_the_plug(tmp_path: Path, data: Path, plug: tuple[str, ...]) -> None:
    run, models = new_run(tmp_path / "run", data, *plug, "controls=false", "epochs=1")
    assert isinstance(models.llm, CausalLM)
    before = {name: value.clone() for name, value in models.llm.model.state_dict().items()}
    vectors = models.encoder.encode(["some text"])
    start = build_plug(run, models, seed=0).state_dict()
    train(run, open_dataset(data, "train", task=run.task), models=models)
    assert _same(before, models.llm.model.state_dict())
    assert all(not p.requires_grad and p.grad is None for p in models.llm.model.parameters())
    assert (models.encoder.encode(["some text"]) == vectors).all()
    moved = [name for name, value in _weights(run).items() if not torch.equal(value, start[name])]
    of_kinds = {name for name in start if name.endswith((".kind", ".preference_share"))}
    assert (
        set(moved) == set(start) - of_kinds
    )  # the data only has answers; all other parameters learn, the population persona too


def _forked_training(folder: Path, data: Path, *settings: str) -> ForkProcess:
    """Start a training in a process that can be killed; a fork has already loaded torch."""

    def work() -> None:
        torch.set_num_threads(1)  # a fork does not inherit OpenMP's threads and would wait for them
        _train(folder, data, "controls=false", *settings)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(PAPER_SETTINGS, marks=pytest.mark.slow, id="paper"),
        pytest.param(
            (*PAPER_SETTINGS, "views=2", "query_encoder=head", "answer_channel=label", "persona_tokens=2"),
            marks=pytest.mark.slow,
            id="head",
        ),
        pytest.param(("views=1",), id="default"),
    ],
)
def test_training_killed_repeatedly_gives_the_same_plug(tmp_path: Path, data: Path, settings: tuple[str, ...]) -> None:
    unbroken = _forked_training(tmp_path / "unbroken", data, *settings)
    unbroken.join()
    broken = tmp_path / "broken"
    folder = broken / "plug" / "seed-0"
    kills = 0
    for _ in range(3):
        done = {path.name for path in folder.glob("state-*")}
        process = _forked_training(broken, data, *settings)
        while process.is_alive():
            if {path.name for path in folder.glob("state-*")} - done:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.join()
    assert kills >= 2, "the kills came too late to break anything"
    finished = _forked_training(broken, data, *settings)
    finished.join()
    assert (unbroken.exitcode, finished.exitcode) == (0, 0)
    assert _same(_weights(Run.open(tmp_path / "unbroken")), load_file(folder / "plug.safetensors"))
    steps = [
        json.loads(line)["step"]
        for line in (folder / "log.jsonl").read_text().splitlines()
        if "validation_loss" not in line
    ]
    assert steps == list(range(1, len(steps) + 1))


def test_prompt_cache_does_not_change_the_trained_plug(tmp_path: Path, data: Path) -> None:
    settings = ("placement=suffix", "query_encoder=head", "views=1")
    with_cache = _train(tmp_path / "cache", data, *settings, "prompt_cache=memory")
    without = _train(tmp_path / "no-cache", data, *settings, "prompt_cache=nowhere")
    for name in ("plug", "instruction-only"):
        one, other = (load_file(run.plug_folder(name, seed=0) / "plug.safetensors") for run in (with_cache, without))
        assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)
    # The prompt cache only affects speed, so a finished run accepts another setting.
    _train(tmp_path / "cache", data, *settings, "prompt_cache=disk", "prompt_cache_gigabytes=0.5")


def test_prompts_are_computed_once_for_plug_control_and_seeds(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, ...]] = []
    real = CausalLM.compute_prompt_states

    def recording(llm: CausalLM, rows: Sequence[tuple[int, ...]]) -> list[PromptState]:
        computed.extend(rows)
        return real(llm, rows)

    monkeypatch.setattr(CausalLM, "compute_prompt_states", recording)
    _train(tmp_path / "run", data, "placement=suffix", "seeds=0,1", "epochs=3", "views=1")
    probe, prompts = computed[:2], computed[2:]
    assert len(probe) == 2
    assert len(prompts) == len(set(prompts))


def test_finished_run_is_unchanged_and_rejects_another_config(tmp_path: Path, data: Path) -> None:
    run = _train(tmp_path / "run", data, "controls=false", "max_steps=1")
    stamp = (run.plug_folder("plug", seed=0) / "plug.safetensors").stat().st_mtime_ns
    _train(tmp_path / "run", data, "controls=false", "max_steps=1")
    assert (run.plug_folder("plug", seed=0) / "plug.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(RunConflict, match=r"training\.epochs"):
        _train(tmp_path / "run", data, "controls=false", "max_steps=1", "epochs=3")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunConflict, match="neither empty nor a run"):
        _train(tmp_path / "other", data)


def _broken_loss(llm: Any, *, after: int) -> Any:
    plain, calls = llm.loss, iter(range(10**6))

    def loss(*args: Any, **named: Any) -> Any:
        losses, tokens = plain(*args, **named)
        return (losses * float("nan") if next(calls) >= after else losses), tokens

    return loss


def test_nan_loss_raises_training_diverged_and_keeps_the_last_state(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, models = new_run(tmp_path / "run", data, "controls=false")
    monkeypatch.setattr(models.llm, "loss", _broken_loss(models.llm, after=4))
    with pytest.raises(TrainingDiverged, match=r"loss became nan in step 5.*learning_rate"):
        train(run, open_dataset(data, "train", task=run.task), models=models)
    folder = run.plug_folder("plug", seed=0)
    assert [path.name for path in folder.glob("state-*")] == ["state-00000003"]
    monkeypatch.undo()
    train(run, open_dataset(data, "train", task=run.task), models=models)
    assert run.trained("plug", seed=0)


def test_full_disk_raises_storage_error_and_keeps_the_last_state(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, models = new_run(tmp_path / "run", data, "controls=false")
    plain = vars(tensor_files)["save_file"]

    def save(tensors: Any, path: Path, **metadata: Any) -> None:
        if "state-00000006" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        plain(tensors, path, **metadata)

    monkeypatch.setattr(tensor_files, "save_file", save)
    with pytest.raises(StorageError, match="No space left"):
        train(run, open_dataset(data, "train", task=run.task), models=models)
    folder = run.plug_folder("plug", seed=0)
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if name.startswith("state-")] == ["state-00000003", "state-00000005"]
    assert not [name for name in names if name.endswith(".tmp")]


def test_fit_rejects_samples_without_answers(tmp_path: Path, data: Path) -> None:
    run, models = new_run(tmp_path / "run", data)
    table = run.open_vectors(models.encoder)
    samples = run.read_samples(open_dataset(data, "train", task=run.task), table)
    hidden = [replace(samples[0], target=None), *samples[1:]]
    with pytest.raises(ConfigError, match=f"1 of {len(samples)} have none"):
        fit(
            PlugObjective(build_plug(run, models, seed=0), models.llm, table=table),
            samples=hidden,
            config=Config().training,
            seed=0,
            folder=tmp_path / "fit",
        )


def test_step_of_several_micro_batches_equals_one_pass(tmp_path: Path, data: Path) -> None:
    # The paper's placement, because then a batch does not fit into one pass.
    whole = _train(
        tmp_path / "whole", data, *PAPER_SETTINGS, "controls=false", "max_tokens_per_microbatch=0", "max_steps=3"
    )
    parts = _train(
        tmp_path / "parts", data, *PAPER_SETTINGS, "controls=false", "max_tokens_per_microbatch=300", "max_steps=3"
    )
    for name, value in _weights(whole).items():
        torch.testing.assert_close(_weights(parts)[name], value, rtol=1e-3, atol=1e-5)


def test_drop_history_prob_trains_the_population_persona(tmp_path: Path) -> None:
    write_simulation(
        SimulationConfig(users=12, queries_per_user=3, dev_users=2, min_items=4, max_items=6), tmp_path / "d"
    )
    # Without shrinkage, as in the paper; with it, every user would train the population persona.
    with_drops = _train(tmp_path / "drops", tmp_path / "d", *PAPER_SETTINGS, "controls=false", "drop_history_prob=0.3")
    without = _train(tmp_path / "no-drops", tmp_path / "d", *PAPER_SETTINGS, "controls=false", "drop_history_prob=0")
    assert _weights(with_drops)["persona.population"].abs().mean() > 0.1
    assert not _weights(without)["persona.population"].any()


@pytest.mark.parametrize(
    ("losses", "few", "controls"),
    [
        ([1.0, 2.0, 1.0, 2.0], 0, False),
        ([float("nan"), 1.0, 1.0, 1.0], 0, False),
        ([1.0, 2.0, 2.0, 1.0, 2.0, 1.9, 1.0, 2.0], 2, False),
        ([1.0, 2.0, *[2.0, 1.0] * 5], 5, False),
        ([2.0, 1.0, 1.0, 1.0], 0, True),
        ([2.0, 1.0, 2.0, 1.0, 2.0, 1.9, 1.0, 2.0], 2, True),
        ([2.0, 1.0] * 6, 5, True),
    ],
)
def test_cold_start_has_the_lowest_held_out_loss(
    tmp_path: Path, data: Path, losses: list[float], few: int, controls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[set[str], set[int], torch.Tensor | None, int]] = []

    def scripted_loss(objective: PlugObjective, samples: Sequence[EncodedSample], *, max_tokens: int) -> float:
        plug = cast(PersonaPlug, objective.module)
        calls.append(
            (
                {sample.owner for sample in samples},
                {len(sample.rows) for sample in samples},
                plug.cold_start.tokens,
                plug.cold_start.max_items,
            )
        )
        return losses[len(calls) - 1]

    monkeypatch.setattr("personaplug.training.parts.mean_loss", scripted_loss)
    run = _train(tmp_path / "run", data, "max_steps=1", "label_prior=none")
    control, config = _weights(run, "instruction-only")["instruction"], run.config.training
    samples = Trainings(run, open_dataset(data, "train", task=run.task), models=open_models(run.config)).samples
    _, held = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=0)
    assert len(calls) == len(losses)
    for index, (owners, sizes, tokens, max_items) in enumerate(calls):
        items = index // 2
        assert owners == {sample.owner for sample in held if len(sample.rows) >= items}
        assert sizes == {items}
        assert max_items == items * (index % 2)
        if index % 2 and (controls or not items):
            assert torch.equal(cast(torch.Tensor, tokens), control)
        else:
            assert tokens is None
    plug = run.load_plug("plug", seed=0, models=open_models(run.config))
    assert (plug.cold_start.tokens is not None, plug.cold_start.max_items) == (controls, few)


def test_facts_have_both_losses_of_each_cold_start_decision(tmp_path: Path, data: Path) -> None:
    run = _train(tmp_path / "run", data, "label_prior=none")
    table = json.loads((run.plug_folder("plug", seed=0) / "fit.json").read_text())["loss_of_few_items"]
    plug = run.load_plug("plug", seed=0, models=open_models(run.config))
    controls = table["0"]["instruction-only"] < table["0"]["plug"]
    others = ["instruction-only"] + ["instruction-only" if controls else "plug without items"] * (len(table) - 1)
    assert [[*losses] for losses in table.values()] == [["plug", other] for other in others]
    covered = [items for items, losses in table.items() if items == "0" or [*losses.values()][1] < losses["plug"]]
    assert [*table][: len(covered)] == covered
    assert (plug.cold_start.tokens is not None, plug.cold_start.max_items) == (controls, len(covered) - 1)
    assert all(len({*losses.values()}) == 2 for losses in table.values())


def test_plug_is_trained_without_a_control_that_diverges(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def diverging(objective: PlugObjective, **how: Any) -> FitReport:
        if how["title"].startswith("instruction-only"):
            raise TrainingDiverged("the loss became nan")
        return fit(objective, **how)

    monkeypatch.setattr("personaplug.training.trainings.fit", diverging)
    run, models = new_run(tmp_path / "run", data, "max_steps=1")
    train(run, open_dataset(data, "train", task=run.task), models=models, parts=[PLUG])
    assert run.trained("plug", seed=0)
    assert "cold_start" not in _weights(run)
    assert "the plug is trained without it" in caplog.text


def test_plug_without_control_differs_only_in_its_cold_start(tmp_path: Path, data: Path) -> None:
    both = _train(tmp_path / "both", data, "max_steps=4")
    alone = _train(tmp_path / "alone", data, "max_steps=4", "controls=false")
    assert "cold_start" not in _weights(alone)
    for name, value in _weights(alone).items():
        torch.testing.assert_close(_weights(both)[name], value)


def test_plug_of_a_run_with_control_trains_the_control_first(tmp_path: Path, data: Path) -> None:
    run, models = new_run(tmp_path / "run", data, "max_steps=1")
    train(run, open_dataset(data, "train", task=run.task), models=models, parts=[PLUG])
    assert run.trained("instruction-only", seed=0)


def test_run_rejects_other_training_data(tmp_path: Path, data: Path) -> None:
    _train(tmp_path / "run", data, "controls=false", "max_steps=1")
    write_simulation(
        SimulationConfig(users=12, queries_per_user=3, dev_users=6, min_items=0, max_items=6, cold_share=0.3, seed=9),
        tmp_path / "other",
    )
    with pytest.raises(RunConflict, match="other training data"):
        _train(tmp_path / "run", tmp_path / "other", "controls=false", "max_steps=1")


def test_moved_run_finds_its_vectors_and_external_ones(tmp_path: Path, data: Path) -> None:
    run, models = new_run(tmp_path / "run", data, "controls=false", "max_steps=1")
    train(run, open_dataset(data, "train", task=run.task), models=models)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert Run.open(tmp_path / "moved").vectors == tmp_path / "moved" / "vectors"
    config, task = run.config, run.task
    Run.create(tmp_path / "shared", config=config, task=task, vectors=tmp_path / "elsewhere")
    assert Run.create(tmp_path / "shared", config=config, task=task).vectors == tmp_path / "elsewhere"


def test_run_accepts_vectors_encoded_beforehand(tmp_path: Path, data: Path) -> None:
    (tmp_path / "run" / "vectors").mkdir(parents=True)
    run, _ = new_run(tmp_path / "run", data)
    assert run.vectors == tmp_path / "run" / "vectors"


def test_full_disk_at_the_end_raises_storage_error(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, models = new_run(tmp_path / "run", data, "controls=false", "max_steps=1")

    def full(tensors: Any, path: Path, **metadata: Any) -> None:
        if "plug.safetensors" in path.name:
            raise OSError(28, "No space left on device")
        plain(tensors, path, **metadata)

    plain = vars(tensor_files)["save_file"]
    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        train(run, open_dataset(data, "train", task=run.task), models=models)
    assert not run.trained("plug", seed=0)
    monkeypatch.undo()
    train(run, open_dataset(data, "train", task=run.task), models=models)
    assert run.trained("plug", seed=0)


@pytest.mark.parametrize("setting", ["max_history=2"])
def test_cold_start_never_covers_a_full_history(
    tmp_path: Path, data: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[set[int]] = []

    def scripted_loss(objective: PlugObjective, samples: Sequence[EncodedSample], *, max_tokens: int) -> float:
        sizes.append({len(sample.rows) for sample in samples})
        return float(cast(PersonaPlug, objective.module).cold_start.tokens is None)  # the control always wins

    monkeypatch.setattr("personaplug.training.parts.mean_loss", scripted_loss)
    run = _train(tmp_path / "run", data, setting, "max_steps=1", "label_prior=none")
    assert sizes == [{0}, {0}, {1}, {1}]
    assert run.load_plug("plug", seed=0, models=open_models(run.config)).cold_start.max_items == 1
