"""Benchmarks: all rows of a table with tiny models, resumed trial by trial."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import personaplug.evaluation.evaluator
import personaplug.training.parts
from personaplug.config_parsing import with_values
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError
from personaplug.evaluation.benchmark import Folders, _made_with, run_benchmark
from personaplug.evaluation.experiment import EXPERIMENTS, Experiment, load_experiment
from personaplug.run import Models

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TINY = """
  model: {llm: toy, encoder: "hash:32", dtype: float32, max_prompt_tokens: 400}
  training: {seeds: [0, 1], epochs: 1, batch_size: 4, validation_limit: 4, learning_rate: 0.01}
  retrieval: {history_tokens: 150, profile_tokens: 8, retriever_candidates: 3}
  adapter: {user_items: 4}
  evaluation: {limit: 8, resamples: 100}
"""
EVERY_ROW = [
    "plain",
    "instruction-only",
    "plug",
    "wrong-user",
    "shuffled",
    "random-vectors",
    "mean-persona",
    "population-persona",
    "bm25:2",
    "bm25:2@wrong-user",
    "recency:2",
    "dense:2",
    "random:2",
    "instruction+bm25:2",
    "instruction+bm25:2@wrong-user",
    "plug+bm25:1",
    "plug+bm25:1@wrong-user",
    "plug+dense:1",
    "profile",
    "profile+bm25:2",
    "ropg:2",
    "lora",
    "lora-per-user",
    "lora-per-user@wrong-user",
    "classical",
    "classical@wrong-user",
    "classical:text",
    "classical:history",
    "user-median",
    "user-mean",
    "user-majority",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("One", 0), ("Two", 1)):
        shape = SimulationConfig(users=6, queries_per_user=2, dev_users=4, min_items=2, max_items=6, seed=seed)
        write_simulation(shape, folder / name)
    texts = SimulationConfig(task="style", users=6, queries_per_user=2, dev_users=4, min_items=2, max_items=6)
    write_simulation(texts, folder / "Texts")
    return folder


def _experiment(folder: Path, rows: list[str], more: str = "", *, sets: str = "[One, Two]") -> Experiment:
    path = folder / "mine.yaml"
    path.write_text(f"sets: {sets}\nmethods: {json.dumps(rows)}\nconfig:{TINY}\n{more}\n", encoding="utf-8")
    return load_experiment(path)


def _folders(folder: Path, data: Path) -> Folders:
    return Folders(data, folder / "out", folder / "results")


def _read(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def test_benchmark_runs_every_row(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("peft")
    experiment = _experiment(tmp_path, EVERY_ROW, sets="[One]")
    outcome = run_benchmark(experiment, _folders(tmp_path, data))
    written = outcome.written
    assert (outcome.absent, outcome.failed) == ([], [])
    assert written == [tmp_path / "results" / "mine" / "One.json"]
    results = _read(written[0])
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == EVERY_ROW
    assert all(math.isfinite(row["metrics"]["mae"]) and row["n"] == 8 for row in rows.values())
    assert (results["experiment"], results["set"]) == ("mine", "One")
    for name in ("plug", "random:2", "lora-per-user", "instruction+bm25:2"):
        assert len(rows[name]["per_seed"]) == 2
    assert "per_seed" not in rows["bm25:2"]
    gains = {pair["a"] for pair in results["pairs"] if "wrong-user" in pair["b"]}
    assert gains == {"plug", "bm25:2", "instruction+bm25:2", "plug+bm25:1", "lora-per-user", "classical"}
    assert {rows[name]["decoding"] for name in ("classical", "user-median")} == {"computed"}
    assert rows["classical"]["fit_seconds"] >= 0
    assert "fit_seconds" not in rows["plug"]
    assert {("plug", "user-median"), ("classical", "classical:text")} <= {(p["a"], p["b"]) for p in results["pairs"]}
    costs = {name: row["costs"] for name, row in rows.items()}
    assert costs["plain"] == {"extra_prompt_tokens": 0.0, "bytes_per_user": 0.0, "seconds_per_user": 0.0}
    assert costs["plug"]["extra_prompt_tokens"] == 8
    assert costs["bm25:2"]["extra_prompt_tokens"] > 20
    assert costs["lora-per-user"]["bytes_per_user"] > costs["plug"]["bytes_per_user"] > 0
    assert costs["lora-per-user"]["seconds_per_user"] > 0


def test_finished_trials_do_not_run_again(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["plain", "instruction-only", "plug", "wrong-user", "bm25:2"]
    folders = _folders(tmp_path, data)
    run_benchmark(_experiment(tmp_path, rows[:4]), folders, seeds=[0])
    first = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.jsonl")}
    assert len(first) == 2
    trials: list[str] = []
    real = personaplug.evaluation.evaluator.Evaluator.trial

    def trial(self: Any, method: Any, *, seed: int) -> Any:
        trials.append(f"{method.name} {seed}")
        return real(self, method, seed=seed)

    monkeypatch.setattr(personaplug.evaluation.evaluator.Evaluator, "trial", trial)
    run_benchmark(_experiment(tmp_path, rows[:4]), folders, seeds=[0])
    assert trials == []
    run_benchmark(_experiment(tmp_path, rows), folders, sets=["Two"], methods=["bm25:2", "plug"])
    assert trials == ["plug 1", "bm25:2 0"]
    written = run_benchmark(_experiment(tmp_path, rows), folders, sets=["Two"]).written
    assert trials[2:] == ["instruction-only 1", "wrong-user 1"]
    for path, before in first.items():
        assert path.read_bytes().startswith(before)
    assert [row["method"] for row in _read(written[0])["rows"]] == rows


def test_benchmark_resumes_from_published_trials_on_a_new_machine(tmp_path: Path, data: Path) -> None:
    rows = ["plain", "instruction-only", "plug", "wrong-user"]
    experiment = _experiment(tmp_path, rows, sets="[One]")
    unbroken = run_benchmark(experiment, Folders(data, tmp_path / "a", tmp_path / "ra")).written
    run_benchmark(experiment, Folders(data, tmp_path / "b", tmp_path / "rb"), seeds=[0])
    resumed = run_benchmark(experiment, Folders(data, tmp_path / "elsewhere", tmp_path / "rb")).written
    for key in ("metrics", "intervals", "per_user"):
        assert [row[key] for row in _read(resumed[0])["rows"]] == [row[key] for row in _read(unbroken[0])["rows"]]
    assert _read(resumed[0])["pairs"] == _read(unbroken[0])["pairs"]


def test_results_note_trials_from_different_machines(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = _folders(tmp_path, data)
    first = run_benchmark(_experiment(tmp_path, ["plain"], sets="[One]"), folders).written
    assert not any("set-ups" in note for note in _read(first[0])["notes"])
    monkeypatch.setattr("personaplug.evaluation.benchmark.machine_info", lambda: {"processor": "another one"})
    written = run_benchmark(_experiment(tmp_path, ["plain", "bm25:2"], sets="[One]"), folders).written
    (told,) = (note for note in _read(written[0])["notes"] if note.startswith("The rows come from 2 set-ups."))
    assert "processor another one: bm25:2" in told
    assert told.count("plain") == 1


def test_trial_records_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    on = SimpleNamespace(llm=SimpleNamespace(device=torch.device("cuda", 1)))
    assert _made_with(cast(Models, on)).endswith(", gpu card 1")
    on.llm.device = torch.device("cpu")
    assert "gpu" not in _made_with(cast(Models, on))


def test_changed_settings_change_the_trial_keys(tmp_path: Path, data: Path) -> None:
    folders = _folders(tmp_path, data)
    run_benchmark(_experiment(tmp_path, ["plain"], sets="[One]"), folders)
    changed = _experiment(tmp_path, ["plain"], "per_set: {One: {limit: 3}}", sets="[One]")
    written = run_benchmark(changed, folders).written
    assert [row["n"] for row in _read(written[0])["rows"]] == [3]
    trial_files = list((tmp_path / "results").rglob("One.trials*.jsonl"))
    assert len(trial_files) == 2  # the trials of the earlier samples are moved aside, not deleted
    first = next(path for path in trial_files if path.name != "One.trials.jsonl").read_bytes()
    run_benchmark(_experiment(tmp_path, ["plain"], sets="[One]"), folders)
    assert [row["n"] for row in _read(written[0])["rows"]] == [8]
    assert (tmp_path / "results" / "mine" / "One.trials.jsonl").read_bytes() == first  # and restored


def test_variants_have_separate_tables_and_missing_models_are_reported(tmp_path: Path, data: Path) -> None:
    more = "variants: {mean: {state_tokens: 4}, big: {encoder: ./nowhere-at-all}}"
    outcome = run_benchmark(_experiment(tmp_path, ["plug"], more, sets="[One]"), _folders(tmp_path, data))
    assert [path.parent.name for path in outcome.written] == ["mean"]
    assert _read(outcome.written[0])["variant"] == "mean"
    assert len(outcome.absent) == 1
    assert "mine big One" in outcome.absent[0]
    assert "nowhere-at-all" in outcome.absent[0]


def test_missing_set_does_not_stop_the_other_sets(tmp_path: Path, data: Path) -> None:
    outcome = run_benchmark(_experiment(tmp_path, ["plain"], sets="[Three, One]"), _folders(tmp_path, data))
    assert [path.name for path in outcome.written] == ["One.json"]
    assert "Three" in outcome.absent[0]
    folders = Folders(tmp_path / "nowhere", tmp_path / "out", tmp_path / "results")
    assert (
        run_benchmark(_experiment(tmp_path, ["plain"], sets="[One]"), folders).written == []
    )  # the existing file is from an earlier run


def test_failed_row_does_not_stop_the_other_rows(tmp_path: Path, data: Path) -> None:
    alone = tmp_path / "data" / "Alone"
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=1, min_items=2, max_items=4), alone)
    (tmp_path / "data" / "One").symlink_to(data / "One")
    rows = ["wrong-user", "plain", "plug"]
    folders = _folders(tmp_path, tmp_path / "data")
    outcome = run_benchmark(_experiment(tmp_path, rows, sets="[Alone, One]"), folders, seeds=[0])
    assert [len(_read(path)["rows"]) for path in outcome.written] == [2, 3]
    assert (outcome.absent, len(outcome.failed)) == ([], 1)
    assert outcome.failed[0].startswith("mine Alone, wrong-user, seed 0: ")
    assert "2 or more users; found 1" in outcome.failed[0]


def test_seeds_can_be_added_later(tmp_path: Path, data: Path) -> None:
    folders = _folders(tmp_path, data)
    rows = ["plain", "plug"]
    run_benchmark(_experiment(tmp_path, rows, "per_set: {One: {seeds: [0]}}", sets="[One]"), folders)
    written = run_benchmark(
        _experiment(tmp_path, rows, "per_set: {One: {seeds: [0, 1]}}", sets="[One]"), folders
    ).written
    assert _read(written[0])["config"]["training"]["seeds"] == [0, 1]
    assert [row["seeds"] for row in _read(written[0])["rows"]] == [[0], [0, 1]]


def test_unknown_set_or_row_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="mine has no set"):
        run_benchmark(_experiment(tmp_path, ["plain"]), _folders(tmp_path, data), sets=["Three"])
    with pytest.raises(ConfigError, match="mine has no row plug; expected rows from: plain"):
        run_benchmark(_experiment(tmp_path, ["plain"]), _folders(tmp_path, data), methods=["plug"])
    with pytest.raises(ConfigError, match=r"seeds \[0, 1\]; found \[9\]"):
        run_benchmark(_experiment(tmp_path, ["plain"]), _folders(tmp_path, data), seeds=[9])


def test_cold_start_curve_limits_the_items(tmp_path: Path, data: Path) -> None:
    more = "max_eval_history: [0, 2]"
    written = run_benchmark(
        _experiment(tmp_path, ["plug", "bm25:2"], more, sets="[One]"), _folders(tmp_path, data)
    ).written
    results = _read(written[0])
    assert [part["name"] for part in results["subgroups"]] == ["items=0", "items=2", "items=all"]
    assert results["subgroups"][-1]["rows"] == results["rows"]
    nothing = {row["method"]: row for row in results["subgroups"][0]["rows"]}
    assert nothing["bm25:2"]["costs"]["extra_prompt_tokens"] == 0
    assert nothing["bm25:2"]["lost_history_rate"] == 1
    assert results["rows"][1]["costs"]["extra_prompt_tokens"] > 0


def test_persona_scale_curve_includes_the_plain_model(tmp_path: Path, data: Path) -> None:
    rows = ["plain", "plug"]
    written = run_benchmark(
        _experiment(tmp_path, rows, "persona_scales: [0, 2]", sets="[One]"), _folders(tmp_path, data)
    ).written
    results = _read(written[0])
    assert [part["name"] for part in results["subgroups"]] == ["persona_scale=0", "persona_scale=1", "persona_scale=2"]
    none, whole, double = ({row["method"]: row["metrics"] for row in part["rows"]} for part in results["subgroups"])
    assert none["plug"] == none["plain"] == whole["plain"] == double["plain"]
    assert whole == {row["method"]: row["metrics"] for row in results["rows"]}


def test_trained_parts_of_another_experiment_are_reused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = _folders(tmp_path, data)
    run_benchmark(_experiment(tmp_path, ["plug"], sets="[One]"), folders)
    monkeypatch.setattr(personaplug.training.trainings, "fit", lambda *_, **__: pytest.fail("trained again"))
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    (tmp_path / "curve.yaml").write_text(f"{text}\nruns: mine\nmax_eval_history: [1]\n", encoding="utf-8")
    written = run_benchmark(load_experiment(tmp_path / "curve.yaml"), folders).written
    assert [part["name"] for part in _read(written[0])["subgroups"]] == ["items=1", "items=all"]


def test_results_have_subgroups_by_history_length(tmp_path: Path, data: Path) -> None:
    written = run_benchmark(
        _experiment(tmp_path, ["plain"], "subgroups: history-thirds", sets="[One]"), _folders(tmp_path, data)
    ).written
    parts = _read(written[0])["subgroups"]
    assert sum(part["samples"] for part in parts) == 8
    assert parts[0]["name"].startswith("short")


def test_packaged_experiment_runs_to_its_end(tmp_path: Path, data: Path) -> None:
    settings = ("seeds=0", "train_limit=8", "limit=6", "resamples=100", "eval_steps=2", "history_tokens=60")
    experiment = load_experiment(EXPERIMENTS / "personal-texts-curves.yaml", settings=settings)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / experiment.sets[0]).symlink_to(data / "Texts")
    tiny = {"llm": "toy", "encoder": "hash:32", "dtype": "float32"}
    configs = {key: with_values(config, tiny) for key, config in experiment.configs.items()}
    outcome = run_benchmark(replace(experiment, configs=configs), _folders(tmp_path, tmp_path / "data"))
    assert (len(outcome.written), outcome.failed) == (1, [])
    assert len(outcome.absent) == len(experiment.sets) - 1  # the sets without data here
    results = _read(outcome.written[0])
    assert [row["method"] for row in results["rows"]] == [method.name for method in experiment.methods]
    assert len(results["subgroups"]) == 5 + 1 + 4


def test_published_trials_match_the_packaged_experiment(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = PUBLISHED / "main-table"
    (tmp_path / "main-table").mkdir()
    for name in ("Movie_stars", "Citation"):
        file = f"{name}.trials.jsonl"
        (tmp_path / "main-table" / file).write_bytes((published / file).read_bytes())
    monkeypatch.setattr(
        personaplug.evaluation.benchmark._Table, "_opened", lambda *_: pytest.fail("a trial was not recognized")
    )
    experiment = load_experiment(EXPERIMENTS / "main-table.yaml")
    folders = Folders(data=shared_data, out=tmp_path / "runs", results=tmp_path)
    outcome = run_benchmark(experiment, folders, sets=["Movie_stars", "Citation"], seeds=[0])
    assert len(outcome.written) == 2
    assert not outcome.failed


def test_row_that_does_not_apply_to_a_set_is_left_out(tmp_path: Path, data: Path) -> None:
    rows = ["plain", "user-median", "user-words:4"]
    outcome = run_benchmark(_experiment(tmp_path, rows, sets="[One, Texts]"), _folders(tmp_path, data))
    assert (outcome.absent, outcome.failed) == ([], [])
    assert [reason.split(": ")[0] for reason in outcome.left_out] == [
        "mine One, user-words:4",
        "mine Texts, user-median",
    ]
    ratings, texts = (_read(path) for path in outcome.written)
    assert [row["method"] for row in ratings["rows"]] == ["plain", "user-median"]
    assert [row["method"] for row in texts["rows"]] == ["plain", "user-words:4"]


def test_variant_that_does_not_apply_to_a_set_is_left_out(tmp_path: Path, data: Path) -> None:
    variants = "variants: {default: {}, counted: {label_prior: counts}}"
    outcome = run_benchmark(_experiment(tmp_path, ["plain"], variants, sets="[One, Texts]"), _folders(tmp_path, data))
    assert (outcome.absent, outcome.failed) == ([], [])
    (reason,) = outcome.left_out
    assert reason.startswith("mine counted Texts: label_prior=counts needs history items")
    assert [f"{path.parent.name}/{path.stem}" for path in outcome.written] == [
        "default/One",
        "default/Texts",
        "counted/One",
    ]


def test_invalid_setting_is_refused_without_variants(tmp_path: Path, data: Path) -> None:
    experiment = _experiment(tmp_path, ["plain"], sets="[Texts]")
    configs = {key: with_values(config, {"label_prior": "counts"}) for key, config in experiment.configs.items()}
    with pytest.raises(ConfigError, match="label_prior=counts"):
        run_benchmark(replace(experiment, configs=configs), _folders(tmp_path, data))


def test_set_can_be_evaluated_with_the_run_of_another_set(tmp_path: Path) -> None:
    shape = SimulationConfig(task="manners", users=4, queries_per_user=1, dev_users=3, min_items=2, max_items=4)
    write_simulation(shape, tmp_path / "data" / "Manners")
    short = "{num_beams: 1, max_new_tokens: 4}"
    more = f"per_set: {{Manners: {short}, Manners-closed: {short}}}\ntrained_on: {{Manners-closed: Manners}}"
    experiment = _experiment(tmp_path, ["plain", "plug", "wrong-user"], more, sets="[Manners, Manners-closed]")
    outcome = run_benchmark(experiment, _folders(tmp_path, tmp_path / "data"), seeds=[0])
    assert outcome.failed == []
    assert [path.name for path in outcome.written] == ["Manners.json", "Manners-closed.json"]
    assert [path.name for path in (tmp_path / "out" / "mine").iterdir()] == ["Manners"]
    closed = _read(outcome.written[1])
    assert closed["task"] == "Closed_questions"
    assert {"answered", "divergence", "nll", "choice", "margin"} <= set(closed["rows"][0]["metrics"])
    assert [row["metrics"]["divergence"] > 0 for row in closed["rows"]] == [False, True, True]


def test_trial_keys_of_conversations_include_resolved_learning_rates(tmp_path: Path) -> None:
    shape = SimulationConfig(task="manners", users=4, queries_per_user=1, dev_users=3, min_items=2, max_items=4)
    write_simulation(shape, tmp_path / "data" / "Manners")
    trials: list[int] = []
    for rate in ("", ", learning_rate: 0.1", ", learning_rate: 0.001"):
        config = TINY.replace(", learning_rate: 0.01", rate).replace("limit: 8", "limit: 1, max_new_tokens: 2")
        text = f"sets: [Manners]\nmethods: [plain]\nconfig:{config}\n"
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        folders = Folders(tmp_path / "data", tmp_path / f"out{len(trials)}", tmp_path / "results")
        run_benchmark(load_experiment(tmp_path / "mine.yaml"), folders, seeds=[0])
        trials.append((tmp_path / "results" / "mine" / "Manners.trials.jsonl").read_text().count("\n"))
    assert trials[0] == trials[1] < trials[2]


def test_label_prior_changes_only_the_keys_of_rows_that_have_one(tmp_path: Path, data: Path) -> None:
    keys = []
    for prior in ("none", "counts"):
        folders = Folders(data, tmp_path / prior, tmp_path / "results")
        (table,) = run_benchmark(
            _experiment(tmp_path, ["plain", "plug"], f"per_set: {{One: {{label_prior: {prior}}}}}", sets="[One]"),
            folders,
            seeds=[0],
        ).written
        trials = [json.loads(line) for line in table.with_suffix(".trials.jsonl").read_text().splitlines()[1:]]
        keys.append([(trial["method"]["name"], trial["key"]) for trial in trials])
    assert [name for name, _ in keys[1]] == ["plain", "plug", "plug"]
    assert keys[1][:2] == keys[0]


def test_run_of_labels_refuses_another_set(tmp_path: Path, data: Path) -> None:
    experiment = _experiment(tmp_path, ["plug"], "trained_on: {Texts: One}", sets="[Texts]")
    with pytest.raises(ConfigError, match="trained on Simulated_rating, but"):
        run_benchmark(experiment, _folders(tmp_path, data))
