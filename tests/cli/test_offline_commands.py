"""`generate` and `encode` with Parquet files: what they print, and which combinations of options they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from offline_jobs import read_output, trained_run, write_parquet

from personaplug.cli.main import main


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_generate_and_encode_write_folders_and_report_invalid_rows(tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    source = write_parquet(tmp_path / "in" / "a.parquet", [*rows[:4], {**rows[4], "prompt": "Which score?"}])
    words = ("--run", run.folder, "--input", source.parent, "--shard-rows", 2)
    done = _call("generate", *words, "--output", tmp_path / "answers", "evaluation_batch_size=2")
    assert done.exit_code == 0, done.output
    assert "5 rows in 3 files in" in done.output
    assert "1 rows have no result; the column error has the reasons" in done.output
    assert {row["answer"] for row in read_output(tmp_path / "answers")} <= {"1", "2", "3", "4", "5", None}
    refused = _call("generate", *words, "--output", tmp_path / "answers", "evaluation_batch_size=3")
    assert (refused.exit_code, "another evaluation_batch_size" in refused.output) == (2, True)
    done = _call("encode", *words, "--output", tmp_path / "personas")
    assert done.exit_code == 0, done.output
    assert len(read_output(tmp_path / "personas")) == 5


def test_input_without_any_history_is_reported(tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    strangers = [{**row, "history": "[]"} for row in rows]
    warning = "warning: no row has a history. Check the column history, or --store and --tenant."
    for name, source_rows, words in (("new", strangers, ()), ("known", rows, ()), ("plain", strangers, ("--plain",))):
        source = write_parquet(tmp_path / f"{name}.parquet", source_rows)
        done = _call("generate", "--run", run.folder, "--input", source, "--output", tmp_path / name, *words)
        assert done.exit_code == 0, done.output
        assert (warning in done.output) == (name == "new")


def test_interrupted_job_tells_where_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run, rows = trained_run(tmp_path)
    source = write_parquet(tmp_path / "in.parquet", rows)
    monkeypatch.setattr("personaplug.offline.worker.Worker.run", interrupted)
    for command in ("generate", "encode"):
        done = _call(command, "--run", run.folder, "--input", source, "--output", tmp_path / command)
        assert done.exit_code == 130
        assert "run the same command again to resume from the first unfinished shard" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--run", "r"], "Give --prompt for one answer, or --input and --output"),
        (["generate", "--run", "r", "--input", "i"], "--input needs --output"),
        *(
            (["generate", "--run", "r", "--prompt", "p", name, value], f"remove {name}.")
            for name, value in (
                *(("--output", "o"), ("--store", "s"), ("--tenant", "t"), ("--secret", "s")),
                *(("--shard-rows", "9"), ("--workers", "2"), ("--ray", "local")),
            )
        ),
        *(
            (["generate", "--run", "r", "--input", "i", "--output", "o", *words], f"Remove {words[0]}.")
            for words in (["--prompt", "p"], ["--engine", "local"], ["--copy-head"])
        ),
        *(
            (["encode", "--run", "r", "--input", "i", "--output", "o", *words], f"Remove {words[0]}.")
            for words in (["--data", "d"], ["--split", "dev"], ["--task", "LaMP_3"], ["--skip-bad", "0"])
        ),
        (["encode", "--data", "d", "--vectors", "v", "--seed", "0"], "remove --seed."),
        (["encode", "--run", "r", "--input", "i", "--output", "o", "--tenant", "t"], "Only a store uses --tenant"),
        (["generate", "--run", "r", "--input", "i", "--output", "o", "--workers", "2"], "--workers applies to Ray"),
        (["encode", "--input", "i", "--output", "o"], "--input needs --run, whose"),
        (["encode", "--run", "r"], "Give --data and --vectors to encode items, or --run, --input and --output"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    done = _call(*words)
    assert (done.exit_code, message in done.output) == (2, True), done.output
