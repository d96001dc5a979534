"""A plug of several tasks: one persona head, an instruction for each task, and ordinary runs."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_settings import TINY

from personaplug.config import Config
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.task import Reader
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.encoders.strangers import with_strangers_items
from personaplug.errors import ConfigError, MissingData, RunConflict
from personaplug.plug.layers import OptionHint
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run, open_models
from personaplug.shared_run import SharedRun, open_runs
from personaplug.training import shared as shared_training
from personaplug.training.batching import epoch_batches, user_split
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import LABEL_COUNTS, PLUG, train
from personaplug.training.shared import SharedObjective, train_shared
from personaplug.training.task_mixture import TaskMixture, of_task, task_of
from personaplug.training.trainer import fit, mean_loss
from personaplug.training.trainings import Trainings

KINDS = ("rating", "manners")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three tasks: ratings from 1 to 5, conversations, and a choice of two options."""
    folder = tmp_path_factory.mktemp("data")
    for kind in KINDS:
        simulation = SimulationConfig(task=kind, users=8, queries_per_user=2, dev_users=4, min_items=2, max_items=5)  # type: ignore[arg-type]
        write_simulation(simulation, folder / kind)
    _write_choices(folder / "choice")
    return folder


def _write_choices(folder: Path) -> None:
    folder.mkdir()
    pattern = 'Which one\\? \\[1\\]: "(.*?)" \\[2\\]: "(.*)"\\s*\\Z'
    declared = {
        "name": "Choice",
        "kind": "label",
        "labels": ["[1]", "[2]"],
        "item_fields": ["title"],
        "query_pattern": pattern,
    }
    (folder / "task.json").write_text(json.dumps(declared))
    questions = [
        {
            "id": str(number),
            "user_id": f"chooser {number % 8}",
            "input": f'Which one? [1]: "tea {number}" [2]: "coffee {number}"',
            "profile": [{"id": str(item), "title": f"tea of day {number + item}"} for item in range(3)],
        }
        for number in range(16)
    ]
    golds = [{"id": question["id"], "output": f"[{1 + number % 2}]"} for number, question in enumerate(questions)]
    (folder / "train_questions.json").write_text(json.dumps(questions))
    (folder / "train_outputs.json").write_text(json.dumps({"task": "Choice", "golds": golds}))


def _config(*settings: str) -> Config:
    return load_config(overrides=[*TINY, *settings])


def _plan(
    folder: Path, data: Path, *settings: str, kinds: Sequence[str] = KINDS, weights: Sequence[float] = ()
) -> tuple[SharedRun, list[Reader], Models]:
    tasks = [load_task(data / kind) for kind in kinds]
    shared = SharedRun.plan(folder, config=_config(*settings), tasks=tasks, weights=weights)
    readers = [open_dataset(data / kind, "train", task=task) for kind, task in zip(kinds, tasks, strict=True)]
    return shared, readers, open_models(shared.runs[0].config)


def _train(
    folder: Path, data: Path, *settings: str, kinds: Sequence[str] = KINDS, weights: Sequence[float] = ()
) -> SharedRun:
    shared, readers, models = _plan(folder, data, *settings, kinds=kinds, weights=weights)
    shared.start()
    train_shared(shared, readers, models=models)
    return shared


def _start(folder: Path, data: Path, *settings: str) -> list[tuple[PlugObjective, list[EncodedSample]]]:
    """Return the objective and the samples of each task before its training."""
    shared, readers, models = _plan(folder, data, *settings)
    shared.start()
    pairs = zip(shared.runs, readers, strict=True)
    return [PLUG.start(Trainings(run, reader, models=models), seed=0) for run, reader in pairs]


def _weights(run: Run, name: str = "plug") -> dict[str, Tensor]:
    return load_file(run.plug_folder(name, seed=0) / "plug.safetensors")


def _facts(run: Run) -> dict[str, object]:
    facts = run.training_facts("plug", seed=0)
    assert facts is not None
    return facts


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SharedRun:
    return _train(tmp_path_factory.mktemp("trained") / "run", data)


def test_plugs_of_a_shared_run_share_the_persona_head_but_not_the_instruction(trained: SharedRun) -> None:
    ratings, chats = (_weights(run) for run in trained.runs)
    head = [name for name in ratings if name.startswith("persona.")]
    assert head
    assert all(torch.equal(ratings[name], chats[name]) for name in head)
    assert not torch.equal(ratings["instruction"], chats["instruction"])
    assert "persona.projector.label.weight" in head
    assert "persona.projector.style.weight" in head


def test_each_task_of_a_shared_run_is_an_ordinary_run(trained: SharedRun, data: Path) -> None:
    opened = open_runs(trained.folder)
    assert opened == trained.runs
    assert [run.task.name for run in opened] == ["Simulated_rating", "Manners"]
    assert [run.item_labels for run in opened] == [("1", "2", "3", "4", "5")] * 2
    for run in opened:
        assert Run.open(run.folder) == run
        assert run.trained("plug", seed=0)
        assert run.trained("instruction-only", seed=0)
        facts = _facts(run)
        assert facts["task"] == run.task.name
        assert facts["shared_by"] == ["Simulated_rating", "Manners"]
        assert "loss_of_few_items" in facts
    assert not list(trained.training_folder(seed=0).glob("state-*"))
    assert (trained.training_folder(seed=0) / "log.jsonl").exists()
    assert _facts(opened[0])["best_loss"] != _facts(opened[1])["best_loss"]


def test_facts_count_the_train_samples_of_the_task(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    for ending in ("questions", "outputs"):  # other users are held out in conversations than in ratings
        file = folder / "manners" / f"train_{ending}.json"
        held = json.loads(file.read_text())
        held, rest = (held[6:], {}) if ending == "questions" else (held["golds"][6:], held)
        file.write_text(json.dumps({**rest, "golds": held} if rest else held))
    shared, readers, models = _plan(tmp_path / "run", folder, "controls=false", "max_steps=1")
    shared.start()
    train_shared(shared, readers, models=models)
    own = [[of_task(_sample(s.id, s.owner), task) for s in reader] for task, reader in enumerate(readers)]
    split = {"share": _config().training.validation_share, "limit": 100, "seed": 0}
    train, _ = TaskMixture((1.0, 1.0)).split([*own[0], *own[1]], **split)  # type: ignore[arg-type]
    counts = [_facts(run)["train_samples"] for run in shared.runs]
    assert counts == [len(each) for each in TaskMixture((1.0, 1.0)).by_task(train)]
    assert counts != [len(user_split(each, **split)[0]) for each in own]  # type: ignore[arg-type]


def test_saved_and_loaded_plug_gives_the_same_soft_prompts(data: Path, tmp_path: Path) -> None:
    started = _start(tmp_path / "run", data, "controls=false")
    SharedObjective([objective for objective, _ in started], mixture=TaskMixture((1.0, 1.0)))
    for objective, samples in started:
        plug = objective.personalizer.plug.eval()
        plug.save_pretrained(tmp_path / "saved")
        encoder, llm = open_models(_config()).encoder, plug.spec.llm
        loaded = Personalizer(
            type(plug).from_pretrained(tmp_path / "saved", encoder=encoder, llm=llm), table=objective.personalizer.table
        )
        vectors, expected = (p.soft_prompt(samples[:4]).vectors for p in (loaded, objective.personalizer))
        torch.testing.assert_close(vectors, expected)


def test_each_task_trains_the_persona_head_and_only_its_own_instruction(data: Path, tmp_path: Path) -> None:
    started = _start(tmp_path / "run", data)
    objective = SharedObjective([own for own, _ in started], mixture=TaskMixture((1.0, 1.0)))
    plugs = objective.plugs
    assert plugs[0].persona is not None
    assert plugs[1].persona is not None
    assert plugs[0].persona.projector.inner.weight is plugs[1].persona.projector.inner.weight
    for task, (_, samples) in enumerate(started):
        objective.module.zero_grad()
        loss, _ = objective.loss([of_task(sample, task) for sample in samples[:4]])
        torch.autograd.backward(loss)
        gradient = plugs[0].persona.projector.inner.weight.grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0
        gradients = [plug.instruction.grad for plug in plugs]
        assert gradients[1 - task] is None
        assert gradients[task] is not None


def test_state_and_optimizer_have_each_parameter_once(data: Path, tmp_path: Path) -> None:
    started = _start(tmp_path / "run", data)
    objective = SharedObjective([own for own, _ in started], mixture=TaskMixture((1.0, 1.0)))
    distinct = {id(parameter) for plug in objective.plugs for parameter in plug.parameters()}
    pointers = [tensor.data_ptr() for tensor in objective.module.state_dict().values()]
    groups = objective.parameter_groups(_config().training)
    optimized = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(pointers) == len(set(pointers)) == len(distinct)
    assert sorted(optimized) == sorted(distinct)
    assert {id(parameter) for parameter in objective.module.parameters()} == distinct


def test_train_sets_the_mode_of_all_plugs(data: Path, tmp_path: Path) -> None:
    objective = SharedObjective([own for own, _ in _start(tmp_path / "run", data)], mixture=TaskMixture((1.0, 1.0)))
    for is_training in (True, False):
        objective.module.train(is_training)
        assert [plug.training for plug in objective.plugs] == [is_training] * 2


def test_loss_of_a_sample_is_the_mean_over_its_tokens(data: Path, tmp_path: Path) -> None:
    started = _start(tmp_path / "run", data)
    objective = SharedObjective([own for own, _ in started], mixture=TaskMixture((3.0, 1.0)))
    objective.module.eval()
    samples = [of_task(sample, task) for task, (_, own) in enumerate(started) for sample in own[:3]]
    means, tokens = [], []
    with torch.no_grad():
        for own, own_samples in started:
            for sample in own_samples[:3]:
                loss, count = own.loss([sample])
                means.append(float(loss / count))
                tokens.append(int(count))
        validation = objective.loss(samples)
    trained = objective.loss(samples)
    assert max(tokens) > 5 * min(tokens)  # otherwise sum and mean would hardly differ
    assert float(trained[0].detach()) == pytest.approx(sum(means), rel=1e-4)
    assert float(trained[1]) == 6
    assert float(validation[1]) == 3 * 3 + 3
    assert float(validation[0]) == pytest.approx(3 * sum(means[:3]) + sum(means[3:]), rel=1e-4)


def test_personal_gain_of_several_tasks_has_strangers_of_the_same_task(data: Path, tmp_path: Path) -> None:
    started = _start(tmp_path / "run", data)
    mixture = TaskMixture((3.0, 1.0))
    objective = SharedObjective([own for own, _ in started], mixture=mixture)
    mixed = [of_task(sample, task) for task, (_, own) in enumerate(started) for sample in own]
    config = _config("validation_share=0.5", "max_steps=1").training
    fit(objective, samples=mixed, config=config, seed=0, folder=tmp_path / "fit", mixture=mixture)
    *_, line = map(json.loads, (tmp_path / "fit" / "log.jsonl").read_text().splitlines())
    _, held_out = mixture.split(mixed, share=0.5, limit=256, seed=0)
    wrong = [sample for own in mixture.by_task(held_out) for sample in with_strangers_items(own, seed=0)]
    own_loss, wrong_loss = (mean_loss(objective, samples, max_tokens=0) for samples in (held_out, wrong))
    assert abs(wrong_loss - own_loss) > 1e-5
    assert line["personal_gain"] == pytest.approx(wrong_loss - own_loss, abs=1e-5)


def _stop(folder: Path, data: Path, *settings: str, monkeypatch: pytest.MonkeyPatch, steps: int = 7) -> SharedRun:
    """Train for a number of steps, then stop with an exception."""

    class Stop(Exception):
        pass

    def stopping(*args: object, **options: object) -> object:
        left = iter(range(steps))

        def on_step() -> None:
            if next(left, None) is None:
                raise Stop

        return fit(*args, on_step=on_step, **options)  # type: ignore[arg-type]

    shared, readers, models = _plan(folder, data, *settings)
    shared.start()
    with monkeypatch.context() as patch:
        patch.setattr(shared_training, "fit", stopping)
        with pytest.raises(Stop):
            train_shared(shared, readers, models=models)
    assert list(shared.training_folder(seed=0).glob("state-*"))
    return shared


def test_resumed_training_gives_the_plugs_of_an_uninterrupted_one(
    data: Path, tmp_path: Path, trained: SharedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop(tmp_path / "run", data, monkeypatch=monkeypatch)
    resumed = _train(tmp_path / "run", data)
    for run, unbroken in zip(resumed.runs, trained.runs, strict=True):
        weights, expected = _weights(run), _weights(unbroken)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_stopped_training_rejects_other_settings_and_other_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop(tmp_path / "run", data, "controls=false", monkeypatch=monkeypatch)
    with pytest.raises(RunConflict, match=r"training\.epochs"):
        _plan(tmp_path / "run", data, "controls=false", "epochs=3")
    others = shutil.copytree(data, tmp_path / "data")
    questions = json.loads((others / "manners" / "train_questions.json").read_text())
    questions[0]["input"] += " Please."
    (others / "manners" / "train_questions.json").write_text(json.dumps(questions))
    with pytest.raises(RunConflict, match="other training data"):
        _train(tmp_path / "run", others, "controls=false")


def test_finished_training_is_not_repeated(data: Path, tmp_path: Path) -> None:
    shared = _train(tmp_path / "run", data, "controls=false", "max_steps=2")
    files = [run.plug_folder("plug", seed=0) / "plug.safetensors" for run in shared.runs]
    before = [file.stat().st_mtime_ns for file in files]
    _train(tmp_path / "run", data, "controls=false", "max_steps=2")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_only_the_task_with_options_has_an_option_hint(data: Path, tmp_path: Path) -> None:
    shared = _train(tmp_path / "run", data, "controls=false", "max_steps=2", kinds=("choice", "rating"))
    assert shared.runs[0].item_labels == ("[1]", "[2]", "1", "2", "3", "4", "5")
    models = open_models(shared.runs[0].config)
    choice, rating = (run.load_plug("plug", seed=0, models=models) for run in shared.runs)
    assert choice.persona is not None
    assert rating.persona is not None
    assert isinstance(choice.persona.hint, OptionHint)
    assert len(choice.persona.hint.option_vectors) == 2
    assert rating.persona.hint is None
    assert choice.config.soft_tokens == rating.config.soft_tokens + 1


def _sample(name: str, user: str) -> EncodedSample:
    empty = torch.empty(0, dtype=torch.int16).numpy()
    return EncodedSample(name, user, user, "p", "q", "1", empty.astype("int64"), empty, no_style(), all_answers())


def test_task_weight_is_the_number_of_appearances_per_epoch() -> None:
    mixture = TaskMixture((2.0, 0.5, 1.5))
    samples = [of_task(_sample(str(number), f"u{number}"), task) for task in range(3) for number in range(20)]
    shown, shares = mixture.repeated(samples)
    epochs = []
    for epoch in range(2):
        batches = epoch_batches([1] * len(shown), batch_size=8, views=0, seed=0, epoch=epoch, shares=shares)
        epochs.append([shown[view.index].id for batch in batches for view in batch])
    counts = Counter(name.partition(":")[0] for name in epochs[0])
    assert counts == {"0": 40, "1": 10, "2": 30}
    assert len(epochs[0]) == len(epochs[1])
    assert {c for name, c in Counter(epochs[0]).items() if name.startswith("0:")} == {2}
    halves = [{name for name in epoch if name.startswith("1:")} for epoch in epochs]
    assert halves[0] != halves[1]


def test_shares_of_one_do_not_change_batches() -> None:
    plain, shared = (
        epoch_batches([1, 5, 3], batch_size=4, views=1, seed=3, epoch=2, shares=shares) for shares in (None, [1.0] * 3)
    )
    assert plain == shared


def test_each_task_holds_out_its_usual_users_and_no_task_trains_on_them() -> None:
    samples = [of_task(_sample(f"{task} {n}", f"u{n % (20 + task)}"), task) for task in range(2) for n in range(60)]
    mixture = TaskMixture((1.0, 1.0))
    train, validation = mixture.split(samples, share=0.2, limit=1000, seed=0)
    assert {s.owner for s in train}.isdisjoint({s.owner for s in validation})
    for task, own in enumerate(mixture.by_task(samples)):
        alone = user_split(own, share=0.2, limit=1000, seed=0)[1]
        assert [s.id for s in validation if task_of(s) == task] == [s.id for s in alone]


def test_rejects_a_task_without_train_users() -> None:
    users = (("a", "b"), ("b", "c"))
    tasks = [[of_task(_sample(user, user), task) for user in own] for task, own in enumerate(users)]

    def held_out(seed: int) -> list[str]:
        return [user_split(own, share=0.5, limit=9, seed=seed)[1][0].owner for own in tasks]

    seed = next(seed for seed in range(100) if held_out(seed) == ["a", "b"])
    with pytest.raises(ConfigError, match="All users of task 1 are held out"):
        TaskMixture((1.0, 1.0)).split([*tasks[0], *tasks[1]], share=0.5, limit=9, seed=seed)


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        (("answer_channel=label",), (), "need answer_channel=all"),
        (("label_prior=counts",), (), "A label prior works for one task only"),
        ((), (1.0,), "a weight for each of the 2 tasks"),
        ((), (1.0, 0.0), "above 0, at most 1000; found 0"),
        ((), (1.0, math.nan), "above 0"),
    ],
)
def test_rejects_settings_that_several_tasks_cannot_share(
    data: Path, tmp_path: Path, settings: tuple[str, ...], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(tmp_path / "run", data, *settings, weights=weights)
    assert not (tmp_path / "run").exists()


def test_rejects_tasks_with_the_same_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"different names; found Manners and Manners.*task\.json"):
        _plan(tmp_path / "run", data, kinds=("manners", "manners"))


@pytest.mark.parametrize("name", ["shared", "Shared", "..", "n" * 300])
def test_rejects_a_task_name_that_cannot_be_a_folder(data: Path, tmp_path: Path, name: str) -> None:
    tasks = [load_task(data / "rating"), replace(load_task(data / "manners"), name=name)]
    with pytest.raises(ConfigError, match="cannot be used for a folder"):
        SharedRun.plan(tmp_path / "run", config=_config(), tasks=tasks)


def test_rejects_task_names_that_differ_only_in_case(data: Path, tmp_path: Path) -> None:
    tasks = [replace(load_task(data / kind), name=name) for kind, name in zip(KINDS, ("Chats", "chats"), strict=True)]
    with pytest.raises(ConfigError, match="need different names; found Chats and chats"):
        SharedRun.plan(tmp_path / "run", config=_config(), tasks=tasks)


@pytest.mark.parametrize(
    ("settings", "kinds", "weights"),
    [((), KINDS[::-1], ()), ((), KINDS, (1.0, 2.0)), (("epochs=3",), KINDS, ())],
    ids=["order", "weights", "settings"],
)
def test_started_run_rejects_other_tasks_weights_and_settings(
    data: Path, trained: SharedRun, settings: tuple[str, ...], kinds: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    with pytest.raises(RunConflict):
        _plan(trained.folder, data, *settings, kinds=kinds, weights=weights)


def test_rejects_a_folder_with_the_other_kind_of_run(data: Path, trained: SharedRun, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"runs of several tasks, in folders .*: .*/run/\w+, .*/run/\w+\.$"):
        Run.open(trained.folder)
    with pytest.raises(RunConflict, match="nor a run of personaplug"):
        Run.plan(trained.folder, config=_config(), task=load_task(data / "rating"))
    Run.create(tmp_path / "run", config=_config(), task=load_task(data / "rating"))
    with pytest.raises(RunConflict, match="nor a run of several tasks"):
        _plan(tmp_path / "run", data)


def test_answers_in_conversations_are_not_labels_of_other_tasks(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data / "manners", tmp_path / "numbers")
    questions = json.loads((folder / "train_questions.json").read_text())
    for item in (item for question in questions for item in question["profile"]):
        if "answer" in item:
            item["answer"] = "5"
    (folder / "train_questions.json").write_text(json.dumps(questions))
    task, config = load_task(folder), _config("answer_channel=all")
    run = Run.plan(tmp_path / "run", config=config, task=task, shared_labels=("1", "2", "3", "4", "5"))
    table = run.open_vectors(open_models(config).encoder)
    samples = run.read_samples(open_dataset(folder, "train", task=task), table)
    labels = {int(label) for sample in samples for label in sample.label_ids}
    assert labels == {-1}


def test_run_of_one_task_rejects_training_the_shared_plug_or_label_counts(data: Path, tmp_path: Path) -> None:
    shared, readers, models = _plan(tmp_path / "run", data)
    shared.start()
    for part, message in ((PLUG, "shared with other tasks"), (LABEL_COUNTS, "counts the labels of one task")):
        with pytest.raises(ConfigError, match=message):
            train(shared.runs[0], readers[0], models=models, parts=[part])
