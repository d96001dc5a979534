"""One answer of an engine without a server: its length is the task's, and beams are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from offline_jobs import trained_run

from personaplug.cli.main import main
from personaplug.serving.config import ServingConfig
from personaplug.serving.one_answer import answer_once

LONGEST = 6


def test_engine_has_no_shorter_limit_than_the_evaluation(tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    evaluation = replace(run.config.evaluation, decoding="generate", max_new_tokens=LONGEST)
    texts = [
        answer_once(
            run,
            rows[0]["prompt"],
            history=(),
            config=ServingConfig(store="", max_rows=1, max_new_tokens=limit),
            evaluation=evaluation,
        )
        for limit in (1, LONGEST)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 1


@pytest.mark.parametrize("settings", [("num_beams=4",), ("evaluation.num_beams=2",)])
def test_beams_are_refused_with_an_engine(settings: tuple[str, ...], tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    words = ["generate", "--run", str(run.folder), "--prompt", rows[0]["prompt"], "--engine", "http://127.0.0.1:9"]
    refused = CliRunner().invoke(main, [*words, *settings])
    assert (refused.exit_code, "decodes without beams; found num_beams=" in refused.output) == (2, True)
    assert "num_beams" not in CliRunner().invoke(main, words).output
