"""Evaluation end to end with toy models: rows, rates, pairs, files and caches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personaplug.config import PAPER, Config
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.task import Reader
from personaplug.data.task_registry import LAMP_TASKS
from personaplug.errors import ConfigError, MissingData
from personaplug.evaluation.evaluator import ORACLE, evaluate, predict, settings_of
from personaplug.infra.training_facts import write_facts
from personaplug.llm.base import PromptBatch
from personaplug.llm.copy_head import CopyHead
from personaplug.methods import default_rows, find_method, needed_parts, parse_methods
from personaplug.methods.context import EvalContext
from personaplug.plug.layers import ColdStart
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run, open_models
from personaplug.training import copy_head_part
from personaplug.training.batching import user_split
from personaplug.training.copy_head_fit import CopySample
from personaplug.training.copy_head_part import COPY_HEAD
from personaplug.training.parts import LABEL_COUNTS, train
from personaplug.training.trainings import Trainings

TINY = [
    "llm=toy",
    "encoder=hash:32",
    "batch_size=4",
    "epochs=1",
    "learning_rate=0.01",
    "dtype=float32",
    "resamples=200",
    "evaluation_batch_size=4",
    "num_beams=1",
    "max_new_tokens=3",
]


def _evaluate(run: Run, reader: Reader, **arguments: Any) -> dict[str, Any]:
    """The results as the JSON object of a results file."""
    return evaluate(run, reader, **arguments).to_json()


class Stage:
    """A trained run with its data, config and models."""

    def __init__(self, place: Path, *, kind: Any, settings: tuple[str, ...] = (), base: Config | None = None) -> None:
        self.data = place / "data"
        write_simulation(
            SimulationConfig(
                task=kind,
                users=8,
                queries_per_user=2,
                dev_users=5,
                dev_queries_per_user=2,
                min_items=0,
                max_items=6,
                cold_share=0.3,
            ),
            self.data,
        )
        self.config = load_config(overrides=[*TINY, "seeds=0,1", *settings], base=base)
        self.run = Run.create(place / "run", config=self.config, task=load_task(self.data))
        self.models: Models = open_models(self.config)
        train(self.run, open_dataset(self.data, "train", task=self.run.task), models=self.models)

    def train(self, names: str) -> None:
        parts = needed_parts(parse_methods(names))
        train(self.run, open_dataset(self.data, "train", task=self.run.task), models=self.models, parts=parts)

    def evaluate(self, names: str = "", *, settings: tuple[str, ...] = (), oracle: bool = False) -> Any:
        config = load_config(overrides=settings, base=self.config).evaluation
        return _evaluate(
            self.run,
            open_dataset(self.data, "dev", task=self.run.task),
            split="dev",
            config=config,
            methods=parse_methods(names) if names else default_rows(self.run.task),
            models=self.models,
            train=open_dataset(self.data, "train", task=self.run.task),
            oracle=self.data / "dev_oracle.json" if oracle else None,
        )


@pytest.fixture(scope="module")
def rating(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("rating"), kind="rating")


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """With the paper's plug (placement=prefix); `rating` has the default plug (placement=suffix)."""
    return Stage(tmp_path_factory.mktemp("style"), kind="style", base=Config(plug=PAPER))


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """With written answers and copy heads."""
    stage = Stage(tmp_path_factory.mktemp("copying"), kind="style")
    stage.train("plug+copy-head,instruction+copy-head")
    return stage


def test_results_have_the_documented_fields(rating: Stage) -> None:
    results = rating.evaluate(oracle=True)
    assert {"task", "split", "model", "encoder", "placement", "seeds", "versions", "rows", "pairs"} <= results.keys()
    names = [row.name for row in default_rows(rating.run.task)]
    assert [row["method"] for row in results["rows"]] == [*names, ORACLE.name]
    for row in results["rows"]:
        if row["family"] in ("no-lm", "oracle"):
            continue
        assert {
            "method",
            "n",
            "metrics",
            "intervals",
            "invalid_rate",
            "truncated_rate",
            "lost_history_rate",
            "prompt_tokens_mean",
            "seconds",
            "peak_memory_bytes",
        } <= row.keys()
        assert row["n"] == 10
        for name, (low, high) in row["intervals"].items():
            assert low <= row["metrics"][name] <= high
    pairs = {(pair["a"], pair["b"]) for pair in results["pairs"]}
    assert pairs >= {("plug", rival) for rival in names if rival != "plug"}
    assert {"a", "b", "metric", "difference", "low", "high", "p", "p_holm"} == results["pairs"][0].keys()
    assert all(len(pair["mcnemar_p"]) in (1, 2) for pair in results["pairs"] if pair["metric"] == "accuracy")
    json.dumps(results)


def test_rows_of_a_suffix_plug_share_the_prompt_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, kind="rating", settings=("placement=suffix", "seeds=0", "query_encoder=head"))
    read: list[tuple[int, ...]] = []
    states = stage.models.llm.prompt_states
    real = states.compute

    def recorded(rows: Sequence[tuple[int, ...]]) -> Any:
        read.extend(rows)
        return real(rows)

    monkeypatch.setattr(states, "compute", recorded)
    results = stage.evaluate("plain,instruction-only,wrong-user,shuffled,plug,mean-persona,random-vectors")
    assert results["placement"] == "suffix"
    assert len(read) == len(set(read)) == 10
    assert {row["method"] for row in results["rows"]} >= {"plug", "wrong-user", "mean-persona"}


def test_instruction_labels_row_adds_label_counts_to_the_instruction(tmp_path: Path) -> None:
    stage = Stage(tmp_path, kind="rating", settings=("seeds=0", "max_steps=3"))
    train(stage.run, open_dataset(stage.data, "train", task=stage.run.task), models=stage.models, parts=[LABEL_COUNTS])
    results = stage.evaluate("instruction+labels,instruction+labels@wrong-user")
    assert [row["costs"]["extra_prompt_tokens"] for row in results["rows"]] == [8, 8]  # as the plug has
    table = stage.run.open_vectors(stage.models.encoder)
    samples = stage.run.read_samples(open_dataset(stage.data, "dev", task=stage.run.task), table)
    plug = stage.run.load_plug(LABEL_COUNTS.name, seed=0, models=stage.models)
    with torch.no_grad():
        soft = Personalizer(plug, table=table).soft_prompt(samples)
    assert soft.label_bias is not None
    assert (soft.vectors == soft.vectors[:1]).all()
    has_labels = torch.tensor([bool((sample.label_ids >= 0).any()) for sample in samples])
    assert torch.equal(soft.label_bias.abs().sum(dim=1) > 0, has_labels)
    folder = stage.run.folder / "evaluations" / "dev"
    scored = np.array(json.loads((folder / "instruction+labels.seed-0.predictions.json").read_text())["probabilities"])
    bare = replace(soft, label_bias=None)
    prompts, labels = [sample.prompt for sample in samples], stage.run.task.labels
    expected = stage.models.llm.score(PromptBatch(prompts, bare), labels).double() + soft.label_bias
    np.testing.assert_allclose(scored, torch.softmax(expected, dim=1).numpy(), atol=1e-4)


def test_instruction_labels_row_refuses_generated_labels(tmp_path: Path) -> None:
    stage = Stage(tmp_path, kind="rating", settings=("train_eos=always", "seeds=0", "max_steps=1", "controls=false"))
    with pytest.raises(ConfigError, match="train_eos=auto"):
        train(
            stage.run, open_dataset(stage.data, "train", task=stage.run.task), models=stage.models, parts=[LABEL_COUNTS]
        )


def test_pair_differences_are_advantages_that_match_the_rows(rating: Stage) -> None:
    results = rating.evaluate(oracle=True)
    metrics = {row["method"]: row["metrics"] for row in results["rows"]}
    for pair in results["pairs"]:
        gap = metrics[pair["a"]][pair["metric"]] - metrics[pair["b"]][pair["metric"]]
        sign = 1 if pair["metric"] == "accuracy" else -1
        assert pair["difference"] == pytest.approx(sign * gap, abs=1e-9)


def _loss(label: str, line: list[float], *, power: int) -> float:
    """Return the expected loss of a label, given the probabilities of the labels 1 to 5."""
    return sum(share * abs(float(label) - star) ** power for star, share in enumerate(line, start=1))


def test_scored_ratings_have_error_matched_point_estimates(rating: Stage) -> None:
    results = rating.evaluate("plain,instruction-only,wrong-user,plug", oracle=True)
    columns = ["mae", "rmse", "accuracy", "mae@median", "rmse@mean"]  # also "nll" for rows with probabilities
    golds = [gold["output"] for gold in json.loads((rating.data / "dev_outputs.json").read_text())["golds"]]
    folder = rating.run.folder / "evaluations" / "dev"
    changed = 0
    for row in results["rows"]:
        for key in ("metrics", "intervals", "per_user"):
            assert list(row[key]) == columns + ["nll"] * (row["method"] != ORACLE.name)
        if row["method"] == ORACLE.name:  # without probabilities, the predictions are scored directly
            assert row["metrics"]["mae@median"] == row["metrics"]["mae"]
            assert row["metrics"]["rmse@mean"] == row["metrics"]["rmse"]
            continue
        absolute, squared = [], []
        for seed in row["seeds"]:
            cached = json.loads((folder / f"{row['method']}.seed-{seed}.predictions.json").read_text())
            for line, text, gold in zip(cached["probabilities"], cached["texts"], golds, strict=True):
                median, mean = (
                    min(rating.run.task.labels, key=lambda label: _loss(label, line, power=power)) for power in (1, 2)
                )
                absolute.append(abs(float(median) - float(gold)))
                squared.append((float(mean) - float(gold)) ** 2)
                changed += (median != text) + (mean != text)
        assert row["metrics"]["mae@median"] == pytest.approx(np.mean(absolute))
        assert row["metrics"]["rmse@mean"] == pytest.approx(np.sqrt(np.mean(squared)))
    assert changed > 10  # otherwise the checks above tested nothing
    gains = {pair["metric"] for pair in results["pairs"] if (pair["a"], pair["b"]) == ("plug", "wrong-user")}
    assert gains == {*columns, "nll"}
    scores = json.loads((folder / "plug.seed-1.scores.json").read_text())
    assert {"mae@median", "rmse@mean"} <= scores[0].keys()


def test_generated_ratings_and_other_tasks_have_no_point_estimates(rating: Stage, style: Stage) -> None:
    written = rating.evaluate("plain", settings=("decoding=generate",))["rows"][0]
    assert list(written["metrics"]) == ["mae", "rmse", "accuracy", "nll"]
    assert not any("@" in name for name in style.evaluate("plain")["rows"][0]["metrics"])
    # if the task requests such a column, it scores the generated text
    task = replace(rating.run.task, metrics=("mae", "mae@median", "accuracy@mean"))
    config = load_config(overrides=["decoding=generate"], base=rating.config).evaluation
    values = _evaluate(
        replace(rating.run, task=task),
        open_dataset(rating.data, "dev", task=task),
        split="dev",
        config=config,
        methods=[find_method("plain")],
        models=rating.models,
    )["rows"][0]["metrics"]
    assert list(values) == [*task.metrics, "nll"]
    assert values["mae@median"] == values["mae"]
    assert [metric.name for metric in settings_of(task, rating.config.evaluation).metrics] == [
        *task.metrics,
        "rmse@mean",
        "nll",
        "choice",
        "margin",
    ]


def test_every_row_with_a_language_model_has_reference_nll(rating: Stage, style: Stage) -> None:
    """For a closed set, NLL is over the labels; for texts, it is over the tokens."""
    golds = [gold["output"] for gold in json.loads((rating.data / "dev_outputs.json").read_text())["golds"]]
    rows = {row["method"]: row for row in rating.evaluate("plug,wrong-user,plain", oracle=True)["rows"]}
    assert "nll" not in rows[ORACLE.name]["metrics"]
    cached = json.loads((rating.run.folder / "evaluations" / "dev" / "plain.seed-0.predictions.json").read_text())
    places = [rating.run.task.labels.index(gold) for gold in golds]
    shares = [line[place] for line, place in zip(cached["probabilities"], places, strict=True)]
    assert rows["plain"]["metrics"]["nll"] == pytest.approx(-np.mean(np.log(shares)), rel=1e-4)
    assert rows["plain"]["metrics"]["nll"] != rows["plug"]["metrics"]["nll"]

    results = style.evaluate("plain,wrong-user,plug", oracle=True)
    rows = {row["method"]: row for row in results["rows"]}
    assert "nll" not in rows[ORACLE.name]["metrics"]
    samples = list(open_dataset(style.data, "dev", task=style.run.task))
    losses, tokens = style.models.llm.loss(
        PromptBatch([sample.prompt for sample in samples]), [sample.target or "" for sample in samples]
    )
    assert rows["plain"]["metrics"]["nll"] == pytest.approx(float(losses.sum() / tokens.sum()), rel=1e-4)
    gain = next(p for p in results["pairs"] if (p["a"], p["b"], p["metric"]) == ("plug", "wrong-user", "nll"))
    advantage = rows["wrong-user"]["metrics"]["nll"] - rows["plug"]["metrics"]["nll"]
    assert gain["difference"] == pytest.approx(advantage, abs=1e-9)
    assert advantage != 0


def _moved(stage: Stage, folder: Path, names: str, *, settings: tuple[str, ...] = ()) -> Any:
    """Evaluate the rows again, in a folder that contains only the trained plug."""
    moved = replace(stage.run, folder=folder)
    if not (folder / "plug").exists():
        for name in ("plug", "run.json"):
            (folder / name).symlink_to(stage.run.folder / name)
    return _evaluate(
        moved,
        open_dataset(stage.data, "dev", task=moved.task),
        split="dev",
        config=load_config(overrides=settings, base=stage.config).evaluation,
        methods=parse_methods(names),
        models=stage.models,
    )


def test_rows_that_share_a_model_count_their_soft_tokens(rating: Stage) -> None:
    tokens = {row["method"]: row["prompt_tokens_mean"] for row in rating.evaluate()["rows"]}
    assert tokens["plug"] == tokens["instruction-only"] == tokens["plain"] + 8


def test_results_report_mean_and_spread_of_seeds(rating: Stage) -> None:
    row = next(r for r in rating.evaluate()["rows"] if r["method"] == "plug")
    alone = [one["accuracy"] for one in row["per_seed"]]
    assert row["metrics"]["accuracy"] == pytest.approx(np.mean(alone))
    assert row["seed_spread"]["accuracy"] == pytest.approx(np.std(alone, ddof=1))


def test_predictions_have_lamps_format_and_scores_per_sample(rating: Stage) -> None:
    rating.evaluate()
    folder = rating.run.folder / "evaluations" / "dev"
    predictions = json.loads((folder / "plug.seed-1.json").read_text())
    questions = json.loads((rating.data / "dev_questions.json").read_text())
    assert predictions["task"] == rating.run.task.name
    assert [gold["id"] for gold in predictions["golds"]] == [question["id"] for question in questions]
    assert {gold["output"] for gold in predictions["golds"]} <= set(rating.run.task.labels)
    scores = json.loads((folder / "plug.seed-1.scores.json").read_text())
    assert [line["id"] for line in scores] == [question["id"] for question in questions]
    assert {"user_id", "accuracy", "mae", "history_items"} <= scores[0].keys()


def test_predictions_are_cached_until_something_changes(rating: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    rating.evaluate()
    calls: list[int] = []
    plain = rating.models.llm.score

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return plain(*given, **named)

    monkeypatch.setattr(rating.models.llm, "score", counted)
    rating.evaluate()
    assert not calls
    rating.evaluate("wrong-user", settings=("draw_seed=7",))
    assert calls


def test_batch_size_does_not_change_predictions(rating: Stage, tmp_path: Path) -> None:
    names = "plain,plug"
    first = rating.evaluate(names)
    alone = _moved(rating, tmp_path, names, settings=("evaluation_batch_size=1",))
    for row, other in zip(first["rows"], alone["rows"], strict=True):
        assert row["metrics"] == pytest.approx(other["metrics"], abs=1e-5)


def test_shuffled_histories_do_not_change_an_order_free_plug(rating: Stage) -> None:
    rows = {row["method"]: row["metrics"] for row in rating.evaluate("shuffled,plug")["rows"]}
    assert rows["shuffled"] == pytest.approx(rows["plug"], abs=1e-5)


def test_generated_labels_are_recorded_in_the_row(rating: Stage) -> None:
    row = rating.evaluate("plain", settings=("decoding=generate",))["rows"][0]
    assert row["decoding"] == "generated"
    assert row["invalid_rate"] > 0.5  # an untrained toy model generates no digits
    assert rating.evaluate("plain")["rows"][0]["decoding"] == "scored"


def test_text_tasks_are_generated(style: Stage) -> None:
    results = style.evaluate("plain,wrong-user,plug", oracle=True)
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["plug"]["decoding"] == "generated"
    assert rows[ORACLE.name]["metrics"]["rouge_1"] > 0.6 > rows["plug"]["metrics"]["rouge_1"]
    assert rows["plug"]["unfinished_rate"] > 0
    with pytest.raises(ConfigError, match="decoding=generate"):
        style.evaluate("plain", settings=("decoding=score",))


def test_a_limit_draws_the_same_samples_for_every_row(rating: Stage) -> None:
    results = rating.evaluate("plain,plug", settings=("limit=4",))
    assert [row["n"] for row in results["rows"]] == [4, 4]


def test_split_without_reference_answers_cannot_be_scored(rating: Stage, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text((rating.data / "task.json").read_text())
    (tmp_path / "test_questions.json").write_text((rating.data / "dev_questions.json").read_text())
    with pytest.raises(MissingData, match="10 of 10 samples have no reference answer"):
        _evaluate(
            rating.run,
            open_dataset(tmp_path, "test", task=rating.run.task),
            split="test",
            config=rating.config.evaluation,
            methods=[find_method("plain")],
            models=rating.models,
        )


def test_untrained_plug_error_names_the_row(rating: Stage, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="--methods instruction-only"):
        _evaluate(
            replace(rating.run, folder=tmp_path),
            open_dataset(rating.data, "dev", task=rating.run.task),
            split="dev",
            config=rating.config.evaluation,
            methods=[find_method("instruction-only")],
            models=rating.models,
        )


def test_results_note_that_the_data_names_no_users(rating: Stage, tmp_path: Path) -> None:
    questions = json.loads((rating.data / "dev_questions.json").read_text())
    for question in questions:
        del question["user_id"]
    (tmp_path / "dev_questions.json").write_text(json.dumps(questions))
    (tmp_path / "dev_outputs.json").write_text((rating.data / "dev_outputs.json").read_text())
    results = _evaluate(
        rating.run,
        open_dataset(tmp_path, "dev", task=rating.run.task),
        split="dev",
        config=rating.config.evaluation,
        methods=[find_method("plain")],
        models=rating.models,
    )
    assert any("names no users" in note for note in results["notes"])
    assert results["users"] == 10


def _check_personas(run: Run, models: Models, reader: Reader) -> None:
    """One user alone and samples from the table get the same persona."""
    table = run.open_vectors(models.encoder)
    plug = run.load_plug("plug", seed=0, models=models)
    together = Personalizer(plug, table=table).soft_prompt(run.read_samples(reader, table)).vectors
    for index, sample in enumerate(reader):
        history = Personalizer(plug).encode(sample.history, encoder=models.encoder)
        alone = Personalizer(plug).persona(sample.query, history, options=sample.options).vectors
        np.testing.assert_allclose(alone[0].numpy(), together[index].detach().numpy(), atol=1e-5)
        assert math.isfinite(float(alone.abs().sum()))


def test_one_user_alone_and_samples_from_the_table_get_the_same_persona(rating: Stage) -> None:
    _check_personas(rating.run, rating.models, open_dataset(rating.data, "dev", task=rating.run.task))


def test_settings_that_the_task_does_not_support_are_refused_before_training(rating: Stage, tmp_path: Path) -> None:
    for task, word, reason in (
        (rating.run.task, "options=compare", "declares none"),
        (LAMP_TASKS["LaMP_1"], "answer_channel=label", "has none"),
        (LAMP_TASKS["LaMP_1"], "label_prior=counts", "has no such items"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Run.create(tmp_path / "run", config=load_config(overrides=[*TINY, word]), task=task)
        assert not (tmp_path / "run").exists()


def test_options_are_compared_if_the_task_has_options(tmp_path: Path) -> None:
    template = (
        'For an author who has written the paper with the title "{}", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "{}" [2]: "{}"'
    )
    words = ["cats purr", "dogs bark", "birds sing", "fish swim"]
    for split in ("train", "dev"):
        questions, golds = [], []
        for place in range(8):
            title, other = words[place % 4], words[(place + 1) % 4]
            pair = (title, other) if place % 2 else (other, title)
            items = [{"id": str(k), "title": words[(place + k) % 4], "abstract": ""} for k in range(place % 3)]
            prompt = template.format(title, *pair)
            questions.append({"id": str(place), "user_id": f"u{place}", "input": prompt, "profile": items})
            golds.append({"id": str(place), "output": f"[{pair.index(title) + 1}]"})
        (tmp_path / f"{split}_questions.json").write_text(json.dumps(questions))
        (tmp_path / f"{split}_outputs.json").write_text(json.dumps({"task": "Pairs", "golds": golds}))
    (tmp_path / "task.json").write_text(json.dumps({"name": "Pairs", "like": "LaMP_1"}))
    config = load_config(
        overrides=[*TINY, "options=auto", "answer_channel=auto", "placement=suffix", "controls=false", "max_steps=2"]
    )
    run, models = Run.create(tmp_path / "run", config=config, task=load_task(tmp_path)), open_models(config)
    reader = open_dataset(tmp_path, "dev", task=run.task)
    first = next(iter(reader)).options
    assert first is not None
    assert first.texts == ("dogs bark", "cats purr")
    assert first.question.startswith('For an author who has written the paper with the title "cats purr"')
    train(run, open_dataset(tmp_path, "train", task=run.task), models=models)
    assert (run.config.plug.options, run.config.plug.answer_channel) == ("compare", "text")
    _check_personas(run, models, reader)
    rows = parse_methods("plug,wrong-user,bm25:1")
    results = _evaluate(run, reader, split="dev", methods=rows, config=config.evaluation, models=models)
    assert [row["costs"]["extra_prompt_tokens"] for row in results["rows"][:2]] == [9, 9]


def test_changed_histories_with_the_same_ids_are_predicted_again(rating: Stage, tmp_path: Path) -> None:
    before = rating.evaluate("plug")["rows"][0]["metrics"]
    questions = json.loads((rating.data / "dev_questions.json").read_text())
    for question in questions:
        for item in question["profile"]:
            item["text"], item["score"] = f"Something else, {item['text']}", "1"
    for name in ("task.json", "dev_outputs.json"):
        (tmp_path / name).write_text((rating.data / name).read_text())
    (tmp_path / "dev_questions.json").write_text(json.dumps(questions))
    folder = rating.run.folder / "evaluations" / "dev"
    first = json.loads((folder / "plug.seed-0.predictions.json").read_text())["key"]
    _evaluate(
        rating.run,
        open_dataset(tmp_path, "dev", task=rating.run.task),
        split="dev",
        config=rating.config.evaluation,
        methods=[find_method("plug")],
        models=rating.models,
    )
    assert json.loads((folder / "plug.seed-0.predictions.json").read_text())["key"] != first
    assert rating.evaluate("plug")["rows"][0]["metrics"] == before


@pytest.mark.parametrize(("kind", "soft"), [("rating", 8), ("style", 2)])
def test_persona_scale_0_equals_the_plain_model(kind: str, soft: int, request: pytest.FixtureRequest) -> None:
    stage: Stage = request.getfixturevalue(kind)
    folder = stage.run.folder / "evaluations" / "dev"

    def predictions(row: str, persona_scale: str) -> list[dict[str, str]]:
        results = stage.evaluate(row, settings=(f"persona_scale={persona_scale}",))
        tokens.append(results["rows"][0]["prompt_tokens_mean"])
        return json.loads((folder / f"{row}.seed-0.json").read_text())["golds"]  # type: ignore[no-any-return]

    tokens: list[float] = []
    assert predictions("plug", "0") == predictions("plain", "1")
    assert tokens[0] == tokens[1]
    predictions("plug", "1")
    assert tokens[2] == tokens[1] + soft


def test_the_task_determines_the_answer_channel(tmp_path: Path) -> None:
    settings = ("answer_channel=auto", "controls=false", "seeds=0", "max_steps=1", "shrinkage=true")
    for kind, channel in (("rating", "label"), ("style", "style")):
        stage = Stage(tmp_path / kind, kind=kind, settings=settings)
        stage.run.check_unchanged(stage.config)  # this config still has `auto`
        assert stage.evaluate("plug,wrong-user,random-vectors")["rows"][0]["n"] == 10
        assert stage.run.config.plug.answer_channel == Run.open(stage.run.folder).config.plug.answer_channel == channel
        _check_personas(stage.run, stage.models, open_dataset(stage.data, "dev", task=stage.run.task))


def test_paper_plug_is_a_row_in_the_same_run(tmp_path: Path) -> None:
    settings = (
        "answer_channel=label",
        "persona_tokens=3",
        "query_encoder=head",
        "placement=suffix",
        "seeds=0",
        "max_steps=2",
    )
    stage = Stage(tmp_path, kind="rating", settings=settings)
    rows = "plug,paper-plug,paper-plug@wrong-user"
    reader = open_dataset(stage.data, "train", task=stage.run.task)
    train(stage.run, reader, models=stage.models, parts=needed_parts(parse_methods(rows)))
    plug = stage.run.load_plug("paper-plug", seed=0, models=stage.models)
    assert plug.config == replace(PAPER, placement="suffix")
    results = stage.evaluate(rows)
    tokens = {row["method"]: row["prompt_tokens_mean"] for row in results["rows"]}
    assert tokens["plug"] - tokens["paper-plug"] == 7 - 2
    assert ("paper-plug", "paper-plug@wrong-user") in {(pair["a"], pair["b"]) for pair in results["pairs"]}
    # The paper's plug encodes items with answers, the run's own plug without, so each needs separate vectors.
    config = stage.config.evaluation
    reader = open_dataset(stage.data, "dev", task=stage.run.task)
    context = EvalContext(stage.run, reader, models=stage.models, config=config)
    own = context.assign("own", seed=0)
    ours, papers = (find_method(name).build_inputs(context, own, seed=0).samples for name in ("plug", "paper-plug"))
    assert [len(sample.rows) for sample in ours] == [len(sample.rows) for sample in papers]
    assert not {row for sample in ours for row in sample.rows} & {row for sample in papers for row in sample.rows}


def test_oracle_of_another_split_is_refused(rating: Stage, tmp_path: Path) -> None:
    (tmp_path / "oracle.json").write_text(json.dumps({"task": "x", "golds": []}))
    with pytest.raises(MissingData, match="lacks predictions for 10 of 10"):
        _evaluate(
            rating.run,
            open_dataset(rating.data, "dev", task=rating.run.task),
            split="dev",
            config=rating.config.evaluation,
            methods=[find_method("plain")],
            models=rating.models,
            oracle=tmp_path / "oracle.json",
        )


def test_cached_answers_of_a_killed_evaluation_are_written_as_predictions(rating: Stage) -> None:
    rating.evaluate("plug")
    path = rating.run.folder / "evaluations" / "dev" / "plug.seed-0.json"
    path.unlink()
    rating.evaluate("plug")
    assert path.exists()


def test_predict_works_without_reference_answers(rating: Stage, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text((rating.data / "task.json").read_text())
    (tmp_path / "test_questions.json").write_text((rating.data / "dev_questions.json").read_text())
    paths = predict(
        rating.run,
        open_dataset(tmp_path, "test", task=rating.run.task),
        split="test",
        methods=parse_methods("plain,plug"),
        config=rating.config.evaluation,
        models=rating.models,
    )
    assert [path.name for path in paths] == ["plain.seed-0.json", "plug.seed-0.json", "plug.seed-1.json"]
    predictions = json.loads(paths[1].read_text())
    questions = json.loads((rating.data / "dev_questions.json").read_text())
    assert [gold["id"] for gold in predictions["golds"]] == [question["id"] for question in questions]
    assert {gold["output"] for gold in predictions["golds"]} <= set(rating.run.task.labels)


def test_known_users_are_counted(rating: Stage, tmp_path: Path) -> None:
    assert not any("samples in the training split" in note for note in rating.evaluate("plain")["notes"])
    for name in ("questions", "outputs"):
        (tmp_path / f"dev_{name}.json").write_text((rating.data / f"train_{name}.json").read_text())
    results = _evaluate(
        rating.run,
        open_dataset(tmp_path, "dev", task=rating.run.task),
        split="dev",
        config=rating.config.evaluation,
        methods=[find_method("plain")],
        models=rating.models,
    )
    assert any(note.startswith("8 of the 8 users also have samples in the training split") for note in results["notes"])
    about = json.loads((rating.run.folder / "data.json").read_text())
    assert all(len(user) == 16 and set(user) <= set("0123456789abcdef") for user in about["users"])  # no ids
    (wording,) = rating.run.wordings
    assert wording.is_fixed
    assert all(
        sample.prompt.startswith(wording.opening) for sample in open_dataset(tmp_path, "dev", task=rating.run.task)
    )


def test_random_vectors_row_reads_no_answers(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, kind="rating", settings=("answer_channel=label", "controls=false", "seeds=0", "max_steps=1")
    )
    reader = open_dataset(stage.data, "dev", task=stage.run.task)
    context = EvalContext(stage.run, reader, models=stage.models, config=stage.config.evaluation)
    own = context.assign("own", seed=0)
    inputs = find_method("random-vectors").build_inputs(context, own, seed=0)
    assert all((sample.label_ids == -1).all() for sample in inputs.samples)
    assert any(
        (sample.label_ids >= 0).any() for sample in find_method("plug").build_inputs(context, own, seed=0).samples
    )


def test_failed_likelihood_drops_the_column_but_keeps_the_predictions(
    style: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_long(*_: Any, **__: Any) -> Any:
        raise IndexError("index out of range in self")

    with monkeypatch.context() as patched:
        patched.setattr(style.models.llm, "loss", too_long)
        first = _moved(style, tmp_path, "plain,plug")
    assert list(first["rows"][0]["metrics"])[:2] == ["rouge_1", "rouge_l"]
    assert "nll" not in first["rows"][0]["metrics"]
    assert "no likelihood of the reference answers (IndexError)" in caplog.text
    # The predictions are cached; only the missing likelihoods are computed.
    monkeypatch.setattr(style.models.llm, "generate", None)
    second = _moved(style, tmp_path, "plain,plug")
    for row, before in zip(second["rows"], first["rows"], strict=True):
        assert row["metrics"] == before["metrics"] | {"nll": row["metrics"]["nll"]}
    monkeypatch.setattr(style.models.llm, "loss", None)
    third = _moved(style, tmp_path, "plain,plug")
    assert [row["metrics"] for row in third["rows"]] == [row["metrics"] for row in second["rows"]]


def test_predictions_do_not_depend_on_reference_answers(
    style: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = replace(style.run, folder=tmp_path)
    for name in ("plug", "run.json"):
        (tmp_path / name).symlink_to(style.run.folder / name)
    monkeypatch.setattr(style.models.llm, "loss", None)
    reader = open_dataset(style.data, "dev", task=moved.task)
    config = style.config.evaluation
    files = predict(moved, reader, split="dev", config=config, methods=parse_methods("plug"), models=style.models)
    assert all(path.exists() for path in files)


def test_users_have_equal_weight_in_nll(style: Stage) -> None:
    row = style.evaluate("plain")["rows"][0]
    assert np.isfinite(row["per_user"]["nll"])


def test_copied_answers_come_from_the_history_of_the_row(copying: Stage) -> None:
    names = "plug,plug+copy-head,plug+copy-head@wrong-user,instruction-only,instruction+copy-head"
    rows = {row["method"]: row for row in copying.evaluate(names)["rows"]}
    likely = {name: row["metrics"]["nll"] for name, row in rows.items()}
    assert likely["plug+copy-head"] < likely["plug+copy-head@wrong-user"]
    assert likely["plug+copy-head"] < likely["plug"]
    assert likely["instruction+copy-head"] < likely["instruction-only"]
    assert rows["instruction+copy-head"]["costs"]["bytes_per_user"] > 0
    assert rows["plug+copy-head"]["prompt_tokens_mean"] == rows["plug"]["prompt_tokens_mean"]


def test_copied_answers_are_identified_by_likelihood_unless_the_scale_is_0(copying: Stage) -> None:
    names, samples = "instruction-only,instruction+copy-head", "identification_samples=4"
    rows = {row["method"]: row["metrics"] for row in copying.evaluate(names, settings=(samples,))["rows"]}
    assert 0 < rows["instruction+copy-head"]["identified_persona"] <= 1
    assert "identified_persona" not in rows["instruction-only"]
    results = copying.evaluate("instruction+copy-head", settings=(samples, "persona_scale=0"))
    assert "identified_persona" not in results["rows"][0]["metrics"]


def test_copy_head_needs_generated_answers(rating: Stage) -> None:
    with pytest.raises(ConfigError, match="closed set of labels"):
        rating.evaluate("plug+copy-head")


def test_copy_head_needs_soft_tokens_behind_the_prompt(style: Stage) -> None:
    with pytest.raises(ConfigError, match="placement=suffix"):
        style.train("plug+copy-head")


def test_copy_head_has_no_beams(copying: Stage) -> None:
    with pytest.raises(ConfigError, match=r"plug\+copy-head needs num_beams=1"):
        copying.evaluate("plain,plug+copy-head", settings=("num_beams=2",))


def test_copy_head_holds_out_the_users_that_its_plug_held_out(copying: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_head_part, "MAX_SAMPLES", 3)
    shown: list[set[str]] = []

    def fit(head: CopyHead, samples: Sequence[CopySample], *, held_out: Sequence[CopySample], **_: object) -> object:
        shown.extend({sample.owner for sample in part} for part in (samples, held_out))
        raise InterruptedError

    monkeypatch.setattr(copy_head_part, "fit_copy_head", fit)
    config, reader = copying.run.config.training, open_dataset(copying.data, "train", task=copying.run.task)
    trainings = Trainings(copying.run, reader, models=copying.models)
    split = user_split(trainings.samples, share=config.validation_share, limit=config.validation_limit, seed=0)
    with pytest.raises(InterruptedError):
        COPY_HEAD.fit(trainings, seed=0)
    train_users, held_out_users = ({sample.owner for sample in part} for part in split)
    assert shown[0] <= train_users
    assert shown[1] <= held_out_users


def test_copy_head_lowers_the_loss_of_held_out_users(copying: Stage) -> None:
    facts = copying.run.training_facts("plug+copy-head", seed=0)
    assert facts is not None
    assert facts["best_loss"] < facts["loss_without_copy_head"]
    assert facts["parameters"] < 300_000


def test_history_below_the_cold_start_threshold_counts_as_lost(tmp_path: Path) -> None:
    stage = Stage(tmp_path, kind="rating", settings=("controls=false", "seeds=0", "max_steps=1"))
    reader = open_dataset(stage.data, "dev", task=stage.run.task)
    lengths = [len(sample.history) for sample in reader if sample.history]
    few = int(np.median(lengths))
    plug = stage.run.load_plug("plug", seed=0, models=stage.models)
    plug.cold_start = ColdStart(torch.zeros_like(plug.population_prompt().vectors[0]), max_items=few)
    assert stage.evaluate("plug")["rows"][0]["lost_history_rate"] == 0
    folder, facts = stage.run.plug_folder("plug", seed=0), stage.run.training_facts("plug", seed=0)
    plug.save_pretrained(folder)
    write_facts(folder, facts or {}, owner=stage.run.owner("plug", seed=0))
    lost = stage.evaluate("plug")["rows"][0]["lost_history_rate"]
    assert lost == pytest.approx(np.mean([length <= few for length in lengths]))
    assert 0 < lost < 1
