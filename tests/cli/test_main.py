"""The command line, end to end with toy models: exit codes, files, messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from personaplug.analysis import results_file
from personaplug.cli.main import main
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import StorageError

TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1"]
SHORT = ["controls=false", "max_steps=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_simulation(
        SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=0, max_items=5, cold_share=0.2), folder
    )
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = _call("train", "--data", data, "--out", out, *TOY)
    assert done.exit_code == 0, done.output
    return out


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_train_saves_the_resolved_config_and_prints_the_loss(trained: Path, data: Path) -> None:
    assert "batch_size: 4" in (trained / "config.yaml").read_text()
    about = json.loads((trained / "run.json").read_text())
    assert about["task"]["name"] == "Simulated_rating"
    assert about["versions"]["torch"]
    again = _call("train", "--data", data, "--out", trained, *TOY)
    assert again.exit_code == 0
    assert "validation loss" in again.output


def test_evaluate_refuses_a_folder_as_results_file(trained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    done = _call("evaluate", "--run", trained, "--data", data, "--json", tmp_path / "results")
    assert (done.exit_code, "is a directory" in done.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_evaluate_restores_previous_results_if_writing_fails(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, results: object) -> None:
        raise StorageError("The disk is full.")

    target = tmp_path / "results.json"
    words = ("evaluate", "--run", trained, "--data", data, "--split", "dev", "--methods", "plug", "--json", target,
             "resamples=100")  # fmt: skip
    target.write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr(results_file, "write_results", fail)
        done = _call(*words)
    assert done.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert target.read_text() == "earlier"
    assert _call(*words).exit_code == 0
    assert (tmp_path / "results.previous.json").read_text() == "earlier"


def test_evaluate_prints_the_table_and_writes_the_results(trained: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    done = _call(
        "evaluate",
        "--run",
        trained,
        "--data",
        data,
        "--split",
        "dev",
        "--methods",
        "plain,instruction-only,wrong-user,shuffled,plug",
        "--json",
        target,
        "resamples=200",
    )
    assert done.exit_code == 0, done.output
    rows = [row["method"] for row in json.loads(target.read_text())["rows"]]
    assert rows == ["plain", "instruction-only", "wrong-user", "shuffled", "plug", "all-knowing"]
    assert "personal gain" in done.output
    flat = " ".join(done.output.split())
    assert "mae@median ↓, rmse@mean ↓" in flat  # hidden columns of a table with 80 characters
    assert "Is plug better than rivals that cost nothing? Not measured: add the rows user-mean" in flat


def test_default_rows_need_the_train_split_of_the_run(trained: Path, data: Path, tmp_path: Path) -> None:
    def rows(folder: Path) -> tuple[list[str], str]:
        done = _call("evaluate", "--run", trained, "--data", folder, "--json", tmp_path / "r.json", "resamples=100")
        assert done.exit_code == 0, done.output
        return [row["method"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]], done.output

    fitted = ["user-mean", "user-median", "user-majority", "classical"]
    counting = ["instruction+labels", "instruction+neighbors"]
    names, output = rows(data)
    assert names == ["plain", "instruction-only", *fitted, *counting, "wrong-user", "plug", "all-knowing"]
    assert "left out\n" not in output
    dev_only = tmp_path / "dev-only"
    dev_only.mkdir()
    for file in data.iterdir():
        if not file.name.startswith("train"):
            (dev_only / file.name).write_bytes(file.read_bytes())
    names, output = rows(dev_only)
    assert names == ["plain", "instruction-only", *counting, "wrong-user", "plug", "all-knowing"]
    assert "has no train split; leaving out the rows that must be fitted on it" in output
    questions = json.loads((data / "train_questions.json").read_text())
    (dev_only / "train_questions.json").write_text(
        json.dumps([q | {"user_id": f"new {q['user_id']}"} for q in questions])
    )
    (dev_only / "train_outputs.json").write_bytes((data / "train_outputs.json").read_bytes())
    names, output = rows(dev_only)
    assert "plug" in names
    assert "classical" not in names
    assert "does not have the train split that the run was trained on" in output


def test_evaluate_and_predict_refuse_data_of_another_task_kind(trained: Path, tmp_path: Path) -> None:
    assert _call("simulate", "--out", tmp_path / "style", "--kind", "style", "--users", 4).exit_code == 0
    before = sorted(trained.rglob("*"))
    for command in ("evaluate", "predict"):
        done = _call(command, "--run", trained, "--data", tmp_path / "style", "--split", "dev")
        assert done.exit_code == 2
        assert "which has other answers" in done.output
    assert sorted(trained.rglob("*")) == before


def test_evaluate_prints_persona_scale_and_history_limit(trained: Path, data: Path, tmp_path: Path) -> None:
    result = _call("evaluate", "--run", trained, "--data", data, "--methods", "plug", "--json", tmp_path / "r.json",
                 "persona_scale=0.5", "max_eval_history=2", "resamples=100")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "persona_scale 0.5 · items shown at most 2" in result.output


def test_generate_answers_for_a_history_and_for_a_new_user(trained: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"text": "A slow western.", "score": 5}\n{"text": "A loud musical.", "score": "1"}\n')
    prompt = "Which score? film: A quiet western."
    for words in (["--history", items], [], ["--plain"]):
        done = _call("generate", "--run", trained, "--prompt", prompt, *words)
        assert done.exit_code == 0, done.output
        assert done.output.splitlines()[-1] in {"1", "2", "3", "4", "5"}


def test_generate_refuses_a_prompt_without_the_wording_and_does_not_quote_it(trained: Path) -> None:
    done = _call("generate", "--run", trained, "--prompt", "my secret wish")
    assert done.exit_code == 2
    assert "film: " in done.output
    assert "secret" not in done.output


def test_generate_names_the_line_of_a_broken_item_and_does_not_quote_it(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"text": "fine", "score": 5}\n{"text": "my secret"}\n')
    done = _call("generate", "--run", trained, "--prompt", "film: x", "--history", tmp_path / "items.jsonl")
    assert done.exit_code == 2
    assert "line 2" in done.output
    assert "secret" not in done.output


def test_encode_skips_texts_that_have_vectors(data: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors"
    first = _call("encode", "--data", data, "--vectors", vectors, *TOY[1:3])
    again = _call("encode", "--data", data, "--vectors", vectors, *TOY[1:3])
    assert (first.exit_code, again.exit_code) == (0, 0), first.output
    assert "train: 0 new vectors" in again.output
    done = _call("train", "--data", data, "--out", tmp_path / "run", "--vectors", vectors, *TOY, *SHORT)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "vectors").exists()


def test_estimate_writes_the_cost_of_a_run(data: Path, tmp_path: Path) -> None:
    done = _call("estimate", "--data", data, "--json", tmp_path / "e.json", *TOY)
    assert done.exit_code == 0, done.output
    cost = json.loads((tmp_path / "e.json").read_text())
    assert cost["samples"] == 16
    assert cost["trainings"] == 2
    assert cost["step_seconds"] > 0
    assert cost["disk_bytes"] > 0
    assert "time" in done.output


@pytest.mark.parametrize("kind", ["style", "manners", "taste-category", "taste-keywords"])
def test_simulate_writes_a_data_set_with_its_oracle(tmp_path: Path, kind: str) -> None:
    done = _call("simulate", "--out", tmp_path / "d", "--kind", kind, "--users", "6")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "d" / "dev_oracle.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "DATA", "--out", "OUT", "epochs=0"], "training.epochs must be a number [from 1]"),
        (["train", "--data", "DATA", "--out", "OUT", "epoch=1"], "did you mean 'epochs'"),
        (["train", "--data", "NOWHERE", "--out", "OUT"], "NOWHERE"),
        (["train", "--data", "DATA", "--out", "OUT", "llm=./no-such-model", "encoder=hash"], "no-such-model"),
        (["evaluate", "--run", "NOWHERE", "--data", "DATA"], "run.json is missing"),
        (["evaluate", "--run", "RUN", "--data", "DATA", "--methods", "magic"], "instruction-only"),
        (["evaluate", "--run", "RUN", "--data", "DATA", "--split", "test"], "test_questions"),
        (["evaluate", "--run", "RUN", "--data", "DATA", "persona_tokens=9"], "cannot be changed after training"),
        (["train", "--data", "DATA", "--out", "RUN", "epochs=5"], "training.epochs"),
        (["train", "--data", "DATA", "--out", "FILE"], "is a file"),
        (["simulate", "--out", "FILE"], "is a file"),
        (["quickstart", "--out", "FILE"], "is a file"),
    ],
)
def test_user_error_exits_with_2_and_a_message(
    words: list[str], message: str, data: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "FILE").write_text("")
    places = {
        "FILE": tmp_path / "FILE",
        "DATA": data,
        "RUN": trained,
        "OUT": tmp_path / "out",
        "NOWHERE": tmp_path / "NOWHERE",
    }
    done = _call(*[places.get(word, word) for word in words])
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "command", ["quickstart", "simulate", "encode", "train", "evaluate", "generate", "estimate", "synthesize"]
)
def test_help_prints_usage_and_settings(command: str) -> None:
    done = _call(command, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.output
    if command in ("train", "estimate", "quickstart"):
        assert "learning_rate=0.0" in done.output
        assert "eq. 3" in done.output
    if command in ("evaluate", "quickstart"):
        assert "num_beams=4" in done.output


def test_operating_system_error_exits_with_1_and_a_message(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/locked")

    monkeypatch.setattr("personaplug.data.open_dataset", refused)
    done = _call("estimate", "--data", data, *TOY)
    assert (done.exit_code, done.exception.__class__) == (1, SystemExit)
    assert "error: the operating system refused" in done.output
    assert "/locked" in done.output


def test_quiet_logs_no_settings_but_saves_them(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quiet = _call("--quiet", "train", "--data", data, "--out", tmp_path / "a", *TOY, *SHORT)
    assert quiet.exit_code == 0, quiet.output
    assert "batch_size" not in caplog.text + quiet.output
    assert "batch_size: 4" in (tmp_path / "a" / "config.yaml").read_text()
    _call("encode", "--data", data, "--vectors", tmp_path / "v", *TOY[1:3])
    assert "settings: encoder=hash:32 dtype=float32" in caplog.text


@pytest.mark.parametrize("command", ["evaluate", "estimate"])
def test_evaluate_and_estimate_print_the_number_of_samples(command: str, data: Path, trained: Path) -> None:
    if command == "evaluate":
        done = _call(command, "--run", trained, "--data", data, "--methods", "plain", "resamples=100")
        assert "dev: 8 samples" in done.output
    else:
        done = _call(command, "--data", data, *TOY)
        assert "train: 16 samples" in done.output
    assert "0 broken records skipped" in done.output


def test_skip_bad_limits_and_counts_broken_records(data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    questions = json.loads((tmp_path / "train_questions.json").read_text())
    questions[3]["input"] = 7
    (tmp_path / "train_questions.json").write_text(json.dumps(questions))
    refused = _call("train", "--data", tmp_path, "--out", tmp_path / "run", *TOY)
    assert refused.exit_code == 2
    assert "question 4" in refused.output
    passed = _call("train", "--data", tmp_path, "--out", tmp_path / "run", "--skip-bad", "1", *TOY, *SHORT)
    assert passed.exit_code == 0, passed.output
    assert "1 broken records skipped" in passed.output


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("llm=typo/name", "llm=toy"),
        ("encoder=typo/name", "encoder=hash:32"),
        ("report_to=maybe", "report_to=none"),
    ],
)
@pytest.mark.parametrize("command", ["train", "quickstart", "encode"])
def test_command_with_an_invalid_setting_creates_no_folder(
    command: str, wrong: str, right: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = {
        "train": ["train", "--data", data, "--out", out, *TOY],
        "quickstart": ["quickstart", "--out", out],
        "encode": ["encode", "--data", data, "--vectors", out, "encoder=hash:32"],
    }[command]
    key = wrong.partition("=")[0]
    if command == "encode" and key != "encoder":
        pytest.skip("encode loads no language model and trains nothing")
    other_words = [word for word in words if not str(word).startswith(f"{key}=")]
    done = _call(*other_words, wrong)
    assert done.exit_code == 2, done.output
    assert not out.exists()
    if command == "train" and key != "encoder":
        assert _call(*words, right, *SHORT).exit_code == 0


def test_settings_may_change_after_a_start_that_failed_before_training(data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    outputs = tmp_path / "train_outputs.json"
    outputs.rename(tmp_path / "kept.json")
    refused = _call("train", "--data", tmp_path, "--out", tmp_path / "run", *TOY, "learning_rate=0.5")
    assert refused.exit_code == 2, refused.output
    (tmp_path / "kept.json").rename(outputs)
    done = _call("train", "--data", tmp_path, "--out", tmp_path / "run", *TOY, *SHORT)
    assert done.exit_code == 0, done.output


def test_train_logs_trained_already_only_for_earlier_trainings(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("train", "--data", data, "--out", tmp_path / "run", *TOY, "max_steps=1")
    assert _call(*words).exit_code == 0
    assert "trained already" not in caplog.text
    assert _call(*words).exit_code == 0
    assert caplog.text.count("is already trained") == 4


def test_evaluate_prints_settings_verdict_and_a_narrow_table(
    trained: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = _call("evaluate", "--run", trained, "--data", data, "--json", tmp_path / "r.json",
                 "--methods", "plain,wrong-user,plug,user-median", "resamples=200")  # fmt: skip
    assert done.exit_code == 0, done.output
    settings = [record.message for record in caplog.records if record.message.startswith("settings: ")]
    assert settings == ["settings: resamples=200"]
    lines = done.output.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Is plug personal? "))
    written = next(index for index, line in enumerate(lines) if line.startswith("written to "))
    assert max(map(len, lines[start:written])) <= 100
    flat = " ".join(" ".join(lines[start:written]).split())
    assert "no history? Not measured: add the row instruction-only" in flat
    assert "of user-median;" in flat


def test_evaluate_reports_and_replaces_a_damaged_prediction_cache(
    trained: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["evaluate", "--run", trained, "--data", data, "--methods", "plain", "resamples=200", "--json"]
    assert _call(*words, tmp_path / "one.json").exit_code == 0
    path = next(trained.glob("evaluations/dev/plain*.predictions.json"))
    path.write_text(path.read_text().replace('"1"', '"5"').replace("0.1", "0.2").replace("0.2", "0.3"))
    assert _call(*words, tmp_path / "two.json").exit_code == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["rows"][0]["metrics"] == two["rows"][0]["metrics"]
    assert "does not match its checksum. The samples are predicted again." in caplog.text


def test_version_option_prints_the_version() -> None:
    done = _call("--version")
    assert done.exit_code == 0
    assert done.output == f"personaplug {version('personaplug')}\n"


def test_ctrl_c_prints_how_to_resume(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("personaplug.data.open_dataset", stop)
    monkeypatch.setattr("personaplug.data.splits.split_by_user", stop)
    for words, message in (
        (["encode", "--data", data, "--vectors", "unused", "encoder=hash"], "resume from the first text"),
        (["split", "--data", data, "--out", "unused"], "\nstopped\n"),
        (["estimate", "--data", data, *TOY], "\nstopped\n"),
    ):
        done = _call(*words)
        assert done.exit_code == 130
        assert message in done.output
        assert "checkpoint" not in done.output


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "personaplug",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        *TOY[:-1],
        "epochs=60",
        "save_steps=2",
        "controls=false",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        # In a background job of a shell, the test process ignores SIGINT, and its children inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder = out / "plug" / "seed-0"
    while not list(folder.glob("state-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert list(folder.glob("state-*"))
    assert not (folder / "plug.json").exists()
