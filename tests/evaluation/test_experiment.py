"""Experiment files: the packaged experiments are valid, and invalid files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from personaplug.errors import ConfigError, MissingData
from personaplug.evaluation.experiment import EXPERIMENTS, find_experiment, load_experiment

SHIPPED = sorted(EXPERIMENTS.glob("*.yaml"))


def _written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_packaged_experiment_is_valid_and_includes_controls(path: Path) -> None:
    experiment = load_experiment(path)
    names = {method.name for method in experiment.methods}
    assert {"instruction-only", "plug", "wrong-user"} <= names
    assert all(len(config.training.seeds) >= 3 for config in experiment.configs.values())
    assert experiment.title


def test_variants_and_sets_change_the_config_in_that_order(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 3\nlimit: 7\n")
    path = _written(
        tmp_path,
        "sets: [A, B]\nmethods: [plain, 'bm25:4']\nbase: base.yaml\nconfig: {training: {seeds: [1, 2]}}\n"
        "per_set: {B: {max_new_tokens: 9, temperature: 0.5}}\nvariants: {cold: {temperature: 0.1}, warm: {}}\n"
        "max_eval_history: [0, 2]\n",
    )
    experiment = load_experiment(path, settings=("batch_size=2", "temperature=7"))
    assert experiment.variants == ["cold", "warm"]
    config = experiment.configs["cold", "B"]
    assert (config.training.epochs, config.evaluation.limit, config.training.seeds) == (3, 7, (1, 2))
    assert (config.evaluation.max_new_tokens, config.plug.temperature, config.training.batch_size) == (9, 0.1, 2)
    assert experiment.configs["warm", "B"].plug.temperature == 7
    assert experiment.configs["warm", "A"].evaluation.max_new_tokens == 0
    assert experiment.max_eval_history == (0, 2)
    assert [method.name for method in experiment.methods] == ["plain", "bm25:4"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: [plain]", "'sets'"),
        ("- a", "'sets'"),
        ("sets: [A]\nmethods: [plain]\nconfigs: {}", "did you mean 'config'"),
        ("sets: [A]\nmethods: [plian]", "plain"),
        ("sets: A\nmethods: [plain]", "sets: .*list; found"),
        ("sets: [A]\nmethods: [plain]\nper_set: {B: {limit: 1}}", "not in `sets`"),
        ("sets: [A]\nmethods: [plain]\nconfig: {epoch: 1}", "did you mean 'epochs'"),
        ("sets: [A]\nmethods: [plain]\nsubgroups: quarters", "history-thirds"),
        ("sets: [A]\nmethods: [plain]\nmax_eval_history: [-1]", "max_eval_history.0: .*greater than or equal to 0"),
        ("sets: [A]\nmethods: [plain]\nitem_kinds: [all]", "item_kinds.0: .*'answers' or 'preferences'"),
        ("sets: [A]\nmethods: [plain]\nitem_kinds: [answers, answers]", "item_kinds contains a value twice"),
        ("sets: [A]\nmethods: [plain]\npersona_scales: [11]", "persona_scales.0: .*less than or equal to 10"),
        ("sets: [../A]\nmethods: [plain]", "set '../A' is used as a folder name"),
        ("sets: [A]\nmethods: [plain]\nvariants: {../a: {}}", "variant '../a' is used as a folder name"),
        ("sets: [A]\nmethods: [plain]\nruns: ..", "'..' is used as a folder name"),
        ("sets: [A, A]\nmethods: [plain]", "sets contains a value twice"),
        ("sets: [A]\nmethods: [plain]\nmax_eval_history: [2, 2]", "max_eval_history contains a value twice"),
        ("sets: [A]\nmethods: [plain]\npersona_scales: [0.3333333, 0.3333334]", "persona_scales contains a"),
        ("sets: [A]\nmethods: [plain]\nbase: nowhere.yaml", "does not exist"),
    ],
)
def test_invalid_experiment_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises((ConfigError, MissingData), match=said):
        load_experiment(_written(tmp_path, text))


def test_curves_include_the_table_itself(tmp_path: Path) -> None:
    text = "sets: [A]\nmethods: [plain]\nmax_eval_history: [0, 2]\npersona_scales: [1.5, 0, 0.5]\n"
    items, persona_scales = load_experiment(_written(tmp_path, text)).curves
    assert [probe.name for probe in items] == ["items=0", "items=2", "items=all"]
    assert [probe.name for probe in persona_scales] == [
        "persona_scale=0",
        "persona_scale=0.5",
        "persona_scale=1",
        "persona_scale=1.5",
    ]
    assert [probe.changes for probe in persona_scales] == [
        {"persona_scale": 0},
        {"persona_scale": 0.5},
        {},
        {"persona_scale": 1.5},
    ]
    assert load_experiment(_written(tmp_path, "sets: [A]\nmethods: [plain]")).curves == []


def test_item_kinds_are_points_of_a_curve(tmp_path: Path) -> None:
    text = "sets: [A]\nmethods: [plain]\nitem_kinds: [answers, preferences]\n"
    (kinds,) = load_experiment(_written(tmp_path, text)).curves
    assert [(point.name, point.changes) for point in kinds] == [
        ("item_kinds=answers", {"item_kinds": "answers"}),
        ("item_kinds=preferences", {"item_kinds": "preferences"}),
        ("item_kinds=all", {}),
    ]


def test_find_experiment_accepts_a_name_or_a_path(tmp_path: Path) -> None:
    path = _written(tmp_path, "sets: [A]\nmethods: [plain]")
    assert find_experiment("mine", tmp_path) == path
    assert find_experiment(str(path), Path("nowhere")) == path
    with pytest.raises(MissingData, match="did you mean 'mine'"):
        find_experiment("mime", tmp_path)
    with pytest.raises(MissingData, match="contains none"):
        find_experiment("mine", tmp_path / "empty")
