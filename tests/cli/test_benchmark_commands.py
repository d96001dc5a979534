"""The commands of the evaluation protocol, end to end with toy models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from personaplug.cli.main import main
from personaplug.data import open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation

TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "Mine"
    write_simulation(SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=1, max_items=5), folder)
    return folder


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_train_with_methods_trains_only_their_parts(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = _call("train", "--data", data, "--out", out, "--methods", "plug+bm25:1,instruction-only", *TOY)
    assert done.exit_code == 0, done.output
    assert (out / "plug+bm25-1" / "seed-0" / "plug.json").exists()
    assert not (out / "plug").exists()
    rows = "bm25:2,plug+bm25:1,plug+bm25:1@wrong-user"
    done = _call("evaluate", "--run", out, "--data", data, "--methods", rows, "limit=3")
    assert done.exit_code == 0, done.output
    assert "plug+bm25:1@wrong-user" in done.output
    done = _call("predict", "--run", out, "--data", data, "--split", "dev", "--methods", "bm25:2", "limit=3")
    assert done.exit_code == 0, done.output
    assert len(json.loads(Path(done.output.split()[-1]).read_text())["golds"]) == 3
    done = _call("evaluate", "--run", out, "--data", data, "--methods", "plug")
    assert done.exit_code == 2
    assert "--methods plug" in done.output


def test_bench_writes_results_that_report_reads(data: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(
        "title: A first look\nsets: [Mine, Absent]\nmethods: [plain, plug, wrong-user, 'bm25:2']\n"
        "config: {resamples: 100}\n"
    )
    places = ["--data", data.parent, "--out", tmp_path / "runs", "--results", tmp_path / "results"]
    done = _call("bench", experiment, *places, *TOY)
    assert done.exit_code == 0, done.output
    results = tmp_path / "results" / "mine" / "Mine.json"
    assert str(results) in done.output
    assert "not run: mine Absent" in done.output
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin mine -->\nstale words\n<!-- end mine -->\nafter\n")
    pytest.importorskip("matplotlib")
    done = _call("report", results, "--out", tmp_path / "report", "--into", page, "--mark", "mine")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "report.html").exists()
    assert list((tmp_path / "report" / "figures").glob("*.png"))
    assert "bm25:2" in page.read_text()
    assert "stale words" not in page.read_text()


def test_bench_without_any_data_set_fails(data: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    experiment.write_text("sets: [Absent]\nmethods: [plain]\n")
    done = _call("bench", experiment, "--data", data.parent, "--out", tmp_path / "runs", "--results", tmp_path, *TOY)
    assert done.exit_code == 2
    assert "No part of this experiment could run" in done.output


def test_score_scores_a_file_of_predictions(data: Path, tmp_path: Path) -> None:
    golds = json.loads((data / "dev_outputs.json").read_text())
    predicted = tmp_path / "predicted.json"
    predicted.write_text(json.dumps(golds))
    target = tmp_path / "scores.json"
    done = _call(
        *("score", "--gold", data / "dev_outputs.json", "--predictions", predicted, "--json", target),
        "resamples=100",
    )
    assert done.exit_code == 0, done.output
    assert json.loads(target.read_text())["rows"][0]["metrics"]["accuracy"] == 1.0
    golds["golds"] = golds["golds"][1:]
    predicted.write_text(json.dumps(golds))
    done = _call("score", "--gold", data / "dev_outputs.json", "--predictions", predicted)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "--run"),
        (["score", "--gold", "x.json"], "--predictions"),
        (["score", "--gold", "EMPTY/x.json", "--predictions", "EMPTY/y.json"], "no file"),
        (["bench", "nothing", "--data", "DATA", "--experiments", "EMPTY"], "no experiment 'nothing'"),
        (["bench", "main-table", "--data", "DATA", "--seeds", "one"], "--seeds takes whole numbers"),
        (["bench", "main-table", "--data", "DATA", "--sets", "Nope"], "main-table has no set"),
        (["report", "EMPTY/none.json", "--out", "EMPTY"], "none.json"),
        (["lamp", "download", "lamp-6", "--out", "EMPTY"], "not public"),
        (["lamp", "download", "lamp-3", "--out", "EMPTY", "--source", "EMPTY/nowhere"], "nowhere"),
        (["convert", "lamp-qx", "DATA", "--out", "EMPTY"], "lamp-qa"),
    ],
)
def test_user_error_exits_with_2_and_a_message(words: list[str], message: str, data: Path, tmp_path: Path) -> None:
    placed = [word.replace("DATA", str(data)).replace("EMPTY", str(tmp_path)) for word in words]
    done = _call(*placed)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output


def test_lamp_download_copies_from_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    question = {
        "id": "1",
        "input": "What is the score? review: fine",
        "profile": [{"id": "a", "text": "good", "score": "5"}],
    }
    for split in ("train", "dev", "test"):
        (source / f"{split}_questions.json").write_text(json.dumps([question]))
    for split in ("train", "dev"):
        golds = {"task": "LaMP_3", "golds": [{"id": "1", "output": "4"}]}
        (source / f"{split}_outputs.json").write_text(json.dumps(golds))
    done = _call("lamp", "download", "lamp-3:time", "--source", source, "--out", tmp_path / "got")
    assert done.exit_code == 0, done.output
    assert [sample.target for sample in open_dataset(tmp_path / "got", "dev")] == ["4"]


def test_lamp_download_refuses_files_of_another_task(tmp_path: Path) -> None:
    (tmp_path / "dev_questions.json").write_text("[]")
    (tmp_path / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": []}))
    done = _call("lamp", "download", "lamp-3", "--source", tmp_path, "--out", tmp_path / "got", "--split", "dev")
    assert done.exit_code == 2
    assert "expected LaMP_3 for lamp-3" in done.output


def test_convert_writes_a_data_set(tmp_path: Path) -> None:
    rows = [
        {
            "id": "q1",
            "question": "How do I prune a pear tree?",
            "profile": [{"id": "p1", "text": "I grow apples."}],
            "narrative": "n",
            "rubric_aspects": [{"aspect": "a", "evidence": "e", "reason": "r"}],
        }
    ]
    source = tmp_path / "dev.json"
    source.write_text(json.dumps(rows))
    done = _call("convert", "lamp-qa", source, "--split", "dev", "--out", tmp_path / "set")
    assert done.exit_code == 0, done.output
    assert len(list(open_dataset(tmp_path / "set", "dev"))) == 1


@pytest.mark.parametrize("command", [["bench"], ["report"], ["score"], ["lamp", "download"], ["convert"]])
def test_help_prints_usage(command: list[str]) -> None:
    done = _call(*command, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.output
