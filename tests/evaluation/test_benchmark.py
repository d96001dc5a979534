"""The bench: every row of a table on toy parts, resumed cell by cell, never twice."""

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
import personaplug.training.recipes
from personaplug.config_parsing import with_values
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError
from personaplug.evaluation.benchmark import Places, _made_with, bench
from personaplug.evaluation.experiment import Experiment, load_experiment
from personaplug.run import Models

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "experiments").glob("*.yaml"))
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
    "plug+lora",
    "plug+lora@wrong-user",
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
    path.write_text(f"sets: {sets}\nconditions: {json.dumps(rows)}\nconfig:{TINY}\n{more}\n", encoding="utf-8")
    return load_experiment(path)


def _places(folder: Path, data: Path) -> Places:
    return Places(data, folder / "out", folder / "results")


def _read(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def test_every_row_fills_its_cell(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("peft")
    experiment = _experiment(tmp_path, EVERY_ROW, sets="[One]")
    outcome = bench(experiment, _places(tmp_path, data))
    written = outcome.written
    assert (outcome.absent, outcome.failed) == ([], [])
    assert written == [tmp_path / "results" / "mine" / "One.json"]
    results = _read(written[0])
    rows = {row["condition"]: row for row in results["rows"]}
    assert list(rows) == EVERY_ROW
    assert all(math.isfinite(row["metrics"]["mae"]) and row["n"] == 8 for row in rows.values())
    assert (results["experiment"], results["set"]) == ("mine", "One")
    for name in ("plug", "random:2", "plug+lora", "lora-per-user", "instruction+bm25:2"):
        assert len(rows[name]["per_seed"]) == 2
    assert "per_seed" not in rows["bm25:2"]
    gains = {pair["a"] for pair in results["pairs"] if "wrong-user" in pair["b"]}
    assert gains == {"plug", "bm25:2", "instruction+bm25:2", "plug+bm25:1", "plug+lora", "lora-per-user", "classical"}
    assert {rows[name]["decoding"] for name in ("classical", "user-median")} == {"computed"}
    assert rows["classical"]["fit_seconds"] >= 0
    assert "fit_seconds" not in rows["plug"]
    assert {("plug", "user-median"), ("classical", "classical:text")} <= {(p["a"], p["b"]) for p in results["pairs"]}
    costs = {name: row["costs"] for name, row in rows.items()}
    assert costs["plain"] == {"extra_prompt_tokens": 0.0, "bytes_per_user": 0.0, "seconds_per_user": 0.0}
    assert costs["plug"]["extra_prompt_tokens"] == costs["plug+lora"]["extra_prompt_tokens"] == 8
    assert costs["bm25:2"]["extra_prompt_tokens"] > 20
    assert costs["lora-per-user"]["bytes_per_user"] > costs["plug"]["bytes_per_user"] > 0
    assert costs["lora-per-user"]["seconds_per_user"] > 0


def test_finished_cells_are_never_made_again(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["plain", "instruction-only", "plug", "wrong-user", "bm25:2"]
    places = _places(tmp_path, data)
    bench(_experiment(tmp_path, rows[:4]), places, seeds=[0])
    first = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.jsonl")}
    assert len(first) == 2
    asked: list[str] = []
    real = personaplug.evaluation.evaluator.Evaluation.cell

    def told(self: Any, condition: Any, *, seed: int) -> Any:
        asked.append(f"{condition.name} {seed}")
        return real(self, condition, seed=seed)

    monkeypatch.setattr(personaplug.evaluation.evaluator.Evaluation, "cell", told)
    bench(_experiment(tmp_path, rows[:4]), places, seeds=[0])
    assert asked == []
    bench(_experiment(tmp_path, rows), places, sets=["Two"], conditions=["bm25:2", "plug"])
    assert asked == ["plug 1", "bm25:2 0"]
    written = bench(_experiment(tmp_path, rows), places, sets=["Two"]).written
    assert asked[2:] == ["instruction-only 1", "wrong-user 1"]
    for path, before in first.items():
        assert path.read_bytes().startswith(before)
    assert [row["condition"] for row in _read(written[0])["rows"]] == rows


def test_cells_from_before_there_was_a_column_still_make_a_table(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, places = _experiment(tmp_path, ["plain", "recency:2"], sets="[One]"), _places(tmp_path, data)
    (written,) = bench(experiment, places).written
    first = _read(written)
    assert "mae@median" in first["rows"][0]["metrics"]
    path = written.with_name("One.trials.jsonl")
    about, plain, recency = path.read_text(encoding="utf-8").splitlines()
    old = json.loads(plain)
    old["statistics"] = {name: old["statistics"][name] for name in ("mae", "rmse", "accuracy")}
    path.write_text("\n".join([about, json.dumps(old), recency, ""]), encoding="utf-8")
    monkeypatch.setattr(personaplug.evaluation.evaluator.Evaluation, "cell", None)  # no cell is made again
    bench(experiment, places)
    second = _read(written)
    for row, before in zip(second["rows"], first["rows"], strict=True):
        lost = ("mae@median", "rmse@mean", "nll") if row["condition"] == "plain" else ()
        assert row["metrics"] == {name: value for name, value in before["metrics"].items() if name not in lost}
    assert {"mae@median: not known of plain.", "nll: not known of plain."} <= set(second["notes"])


def test_a_stopped_bench_on_a_new_machine_goes_on_from_the_published_cells(tmp_path: Path, data: Path) -> None:
    rows = ["plain", "instruction-only", "plug", "wrong-user"]
    experiment = _experiment(tmp_path, rows, sets="[One]")
    unbroken = bench(experiment, Places(data, tmp_path / "a", tmp_path / "ra")).written
    bench(experiment, Places(data, tmp_path / "b", tmp_path / "rb"), seeds=[0])
    resumed = bench(experiment, Places(data, tmp_path / "elsewhere", tmp_path / "rb")).written
    for key in ("metrics", "intervals", "per_user"):
        assert [row[key] for row in _read(resumed[0])["rows"]] == [row[key] for row in _read(unbroken[0])["rows"]]
    assert _read(resumed[0])["pairs"] == _read(unbroken[0])["pairs"]


def test_rows_of_another_machine_are_told_apart(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = _places(tmp_path, data)
    first = bench(_experiment(tmp_path, ["plain"], sets="[One]"), places).written
    assert not any("set-ups" in note for note in _read(first[0])["notes"])
    monkeypatch.setattr("personaplug.evaluation.benchmark.machine", lambda: {"processor": "another one"})
    written = bench(_experiment(tmp_path, ["plain", "bm25:2"], sets="[One]"), places).written
    (told,) = (note for note in _read(written[0])["notes"] if note.startswith("Made with 2 set-ups"))
    assert "processor another one: bm25:2" in told
    assert told.count("plain") == 1


def test_a_cell_names_the_gpu_it_was_made_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    on = SimpleNamespace(llm=SimpleNamespace(device=torch.device("cuda", 1)))
    assert _made_with(cast(Models, on)).endswith(", gpu card 1")
    on.llm.device = torch.device("cpu")
    assert "gpu" not in _made_with(cast(Models, on))


def test_other_settings_make_other_cells(tmp_path: Path, data: Path) -> None:
    places = _places(tmp_path, data)
    bench(_experiment(tmp_path, ["plain"], sets="[One]"), places)
    changed = _experiment(tmp_path, ["plain"], "per_set: {One: {limit: 3}}", sets="[One]")
    written = bench(changed, places).written
    assert [row["n"] for row in _read(written[0])["rows"]] == [3]
    kept = list((tmp_path / "results").rglob("One.trials*.jsonl"))
    assert len(kept) == 2  # the earlier samples' cells are put aside, not lost
    first = next(path for path in kept if path.name != "One.trials.jsonl").read_bytes()
    bench(_experiment(tmp_path, ["plain"], sets="[One]"), places)
    assert [row["n"] for row in _read(written[0])["rows"]] == [8]
    assert (tmp_path / "results" / "mine" / "One.trials.jsonl").read_bytes() == first  # and taken back


def test_variants_are_tables_of_their_own_and_a_model_that_is_not_here_is_said(tmp_path: Path, data: Path) -> None:
    more = "variants: {mean: {aggregator: mean}, big: {encoder: ./nowhere-at-all}}"
    outcome = bench(_experiment(tmp_path, ["plug"], more, sets="[One]"), _places(tmp_path, data))
    assert [path.parent.name for path in outcome.written] == ["mean"]
    assert _read(outcome.written[0])["variant"] == "mean"
    assert len(outcome.absent) == 1
    assert "mine big One" in outcome.absent[0]
    assert "nowhere-at-all" in outcome.absent[0]


def test_a_set_that_is_not_there_does_not_stop_the_others(tmp_path: Path, data: Path) -> None:
    outcome = bench(_experiment(tmp_path, ["plain"], sets="[Three, One]"), _places(tmp_path, data))
    assert [path.name for path in outcome.written] == ["One.json"]
    assert "Three" in outcome.absent[0]
    places = Places(tmp_path / "nowhere", tmp_path / "out", tmp_path / "results")
    assert bench(_experiment(tmp_path, ["plain"], sets="[One]"), places).written == []  # what lies there is of before


def test_a_row_that_cannot_be_filled_does_not_stop_the_others(tmp_path: Path, data: Path) -> None:
    alone = tmp_path / "data" / "Alone"
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=1, min_items=2, max_items=4), alone)
    (tmp_path / "data" / "One").symlink_to(data / "One")
    rows = ["wrong-user", "plain", "plug"]
    places = _places(tmp_path, tmp_path / "data")
    outcome = bench(_experiment(tmp_path, rows, sets="[Alone, One]"), places, seeds=[0])
    assert [len(_read(path)["rows"]) for path in outcome.written] == [2, 3]
    assert (outcome.absent, len(outcome.failed)) == ([], 1)
    assert outcome.failed[0].startswith("mine Alone, wrong-user, seed 0: ")
    assert "2 or more users; found 1" in outcome.failed[0]


def test_seeds_can_be_added_later(tmp_path: Path, data: Path) -> None:
    places = _places(tmp_path, data)
    rows = ["plain", "plug"]
    bench(_experiment(tmp_path, rows, "per_set: {One: {seeds: [0]}}", sets="[One]"), places)
    written = bench(_experiment(tmp_path, rows, "per_set: {One: {seeds: [0, 1]}}", sets="[One]"), places).written
    assert _read(written[0])["config"]["training"]["seeds"] == [0, 1]
    assert [row["seeds"] for row in _read(written[0])["rows"]] == [[0], [0, 1]]


def test_thirds_and_a_curve_stand_together(tmp_path: Path, data: Path) -> None:
    more = "slices: history-thirds\nshown_items: [1]"
    written = bench(_experiment(tmp_path, ["plain"], more, sets="[One]"), _places(tmp_path, data)).written
    names = [part["name"].split()[0] for part in _read(written[0])["slices"]]
    assert names[0] == "short"
    assert names[-2:] == ["items=1", "items=all"]


def test_a_set_of_another_experiment_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="no set of mine"):
        bench(_experiment(tmp_path, ["plain"]), _places(tmp_path, data), sets=["Three"])
    with pytest.raises(ConfigError, match="plug: no row of mine, whose rows are plain"):
        bench(_experiment(tmp_path, ["plain"]), _places(tmp_path, data), conditions=["plug"])
    with pytest.raises(ConfigError, match=r"seeds \[0, 1\]; found \[9\]"):
        bench(_experiment(tmp_path, ["plain"]), _places(tmp_path, data), seeds=[9])


def test_a_cold_start_curve_shows_so_many_items(tmp_path: Path, data: Path) -> None:
    more = "max_eval_history: [0, 2]"
    written = bench(_experiment(tmp_path, ["plug", "bm25:2"], more, sets="[One]"), _places(tmp_path, data)).written
    results = _read(written[0])
    assert [part["name"] for part in results["slices"]] == ["items=0", "items=2", "items=all"]
    assert results["slices"][-1]["rows"] == results["rows"]
    nothing = {row["condition"]: row for row in results["slices"][0]["rows"]}
    assert nothing["bm25:2"]["costs"]["extra_prompt_tokens"] == 0
    assert nothing["bm25:2"]["lost_history_rate"] == 1
    assert results["rows"][1]["costs"]["extra_prompt_tokens"] > 0


def test_a_curve_of_strengths_ends_at_the_plain_model(tmp_path: Path, data: Path) -> None:
    rows = ["plain", "plug"]
    written = bench(_experiment(tmp_path, rows, "strengths: [0, 2]", sets="[One]"), _places(tmp_path, data)).written
    results = _read(written[0])
    assert [part["name"] for part in results["slices"]] == ["persona_scale=0", "persona_scale=1", "persona_scale=2"]
    none, whole, double = ({row["condition"]: row["metrics"] for row in part["rows"]} for part in results["slices"])
    assert none["plug"] == none["plain"] == whole["plain"] == double["plain"]
    assert whole == {row["condition"]: row["metrics"] for row in results["rows"]}


def test_trained_parts_of_another_experiment_serve(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = _places(tmp_path, data)
    bench(_experiment(tmp_path, ["plug"], sets="[One]"), places)
    monkeypatch.setattr(personaplug.training.recipes, "fit", lambda *_, **__: pytest.fail("trained again"))
    told = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    (tmp_path / "curve.yaml").write_text(f"{told}\nruns: mine\nshown_items: [1]\n", encoding="utf-8")
    written = bench(load_experiment(tmp_path / "curve.yaml"), places).written
    assert [part["name"] for part in _read(written[0])["slices"]] == ["items=1", "items=all"]


def test_slices_by_length_of_history(tmp_path: Path, data: Path) -> None:
    written = bench(
        _experiment(tmp_path, ["plain"], "slices: history-thirds", sets="[One]"), _places(tmp_path, data)
    ).written
    parts = _read(written[0])["slices"]
    assert sum(part["samples"] for part in parts) == 8
    assert parts[0]["name"].startswith("short")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_experiment_runs_to_its_end(path: Path, tmp_path: Path, data: Path) -> None:
    pytest.importorskip("peft")
    settings = ("seeds=0", "train_limit=8", "limit=6", "resamples=100", "eval_steps=2", "history_tokens=60")
    experiment = load_experiment(path, settings=settings)
    (tmp_path / "data").mkdir()
    labelled = "Movie_stars" in experiment.sets
    here = "Movie_stars" if labelled else experiment.sets[0]
    (tmp_path / "data" / here).symlink_to(data / ("One" if labelled else "Texts"))
    toy = {"llm": "toy", "encoder": "hash:32", "dtype": "float32"}
    configs = {key: with_values(config, toy) for key, config in experiment.configs.items()}
    experiment = replace(experiment, configs=configs)
    outcome = bench(experiment, _places(tmp_path, tmp_path / "data"))
    written = outcome.written
    assert (len(written), outcome.failed) == (len(experiment.variants), [])
    assert len(outcome.absent) == len(experiment.configs) - len(written)  # the sets that are not here
    for file in written:
        assert [row["condition"] for row in _read(file)["rows"]] == [row.name for row in experiment.conditions]


def test_published_cells_are_known_again(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that came later do not make old cells strangers, as long as they say what was done then."""
    published = SHIPPED[0].parents[2] / "results" / "main-table"
    (tmp_path / "main-table").mkdir()
    for name in ("Movie_stars", "Citation"):
        (tmp_path / "main-table" / f"{name}.trials.jsonl").write_bytes(
            (published / f"{name}.trials.jsonl").read_bytes()
        )
    monkeypatch.setattr(
        personaplug.evaluation.benchmark._Table, "_opened", lambda *_: pytest.fail("a cell was not found again")
    )
    experiment = load_experiment(published.parents[2] / "experiments" / "main-table.yaml")
    places = Places(data=shared_data, out=tmp_path / "runs", results=tmp_path)
    outcome = bench(experiment, places, sets=["Movie_stars", "Citation"], seeds=[0])
    assert len(outcome.written) == 2
    assert not outcome.failed


def test_a_rule_that_has_no_meaning_on_a_set_is_left_out_there(tmp_path: Path, data: Path) -> None:
    rows = ["plain", "user-median", "user-words:4"]
    outcome = bench(_experiment(tmp_path, rows, sets="[One, Texts]"), _places(tmp_path, data))
    assert (outcome.absent, outcome.failed) == ([], [])
    assert [reason.split(": ")[0] for reason in outcome.left_out] == [
        "mine One, user-words:4",
        "mine Texts, user-median",
    ]
    ratings, texts = (_read(path) for path in outcome.written)
    assert [row["condition"] for row in ratings["rows"]] == ["plain", "user-median"]
    assert [row["condition"] for row in texts["rows"]] == ["plain", "user-words:4"]


def test_a_variant_that_has_no_meaning_on_a_set_is_left_out_there(tmp_path: Path, data: Path) -> None:
    variants = "variants: {default: {}, counted: {label_prior: own}}"
    outcome = bench(_experiment(tmp_path, ["plain"], variants, sets="[One, Texts]"), _places(tmp_path, data))
    assert (outcome.absent, outcome.failed) == ([], [])
    (reason,) = outcome.left_out
    assert reason.startswith("mine counted Texts: label_prior=own counts the answers")
    assert [f"{path.parent.name}/{path.stem}" for path in outcome.written] == [
        "default/One",
        "default/Texts",
        "counted/One",
    ]


def test_a_setting_that_an_experiment_without_variants_cannot_have_is_refused(tmp_path: Path, data: Path) -> None:
    experiment = _experiment(tmp_path, ["plain"], sets="[Texts]")
    configs = {key: with_values(config, {"label_prior": "own"}) for key, config in experiment.configs.items()}
    with pytest.raises(ConfigError, match="label_prior=own"):
        bench(replace(experiment, configs=configs), _places(tmp_path, data))
