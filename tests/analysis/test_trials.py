"""Cells on disk: nothing lost, nothing glued together, and no texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from personaplug.analysis.trials import EvalSamples, Trial, TrialFile, numbered
from personaplug.errors import RecordError

SCORED = EvalSamples(groups=[0, 0, 1], history_items=[3, 4, 5], about={"task": "T"})


def _cell(name: str = "plug", seed: int = 0, **changes: object) -> Trial:
    one_hots = np.zeros((3, 6))
    one_hots[[0, 1, 2], [5, 0, 3]] = 1
    stats = {"mae": np.array([[0.0], [1.5], [np.inf]]), "rouge_1": np.array([[1 / 3], [0.1], [0.0]]), "f1": one_hots}
    return replace(Trial(name, seed, stats, invalid_rate=0.25, seconds=1.5, key="k"), **changes)  # type: ignore[arg-type]


def test_a_cell_survives_the_file(tmp_path: Path) -> None:
    file = TrialFile(tmp_path / "deep" / "set.cells.jsonl")
    assert file.read() == (None, [])
    file.start(SCORED)
    file.append(_cell())
    file.append(_cell("plain", bytes_per_user=0.0))
    scored, cells = file.read()
    assert scored == SCORED
    assert [cell.condition for cell in cells] == ["plug", "plain"]
    for name, stats in _cell().statistics.items():
        np.testing.assert_allclose(cells[0].statistics[name], stats, rtol=1e-8)
    assert (cells[0].key, cells[0].seconds, cells[1].bytes_per_user) == ("k", 1.5, 0.0)


def test_the_latest_cell_of_a_condition_and_seed_counts(tmp_path: Path) -> None:
    file = TrialFile(tmp_path / "cells.jsonl")
    file.start(SCORED)
    for rate in (0.1, 0.2):
        file.append(_cell(invalid_rate=rate))
    file.append(_cell(seed=1, invalid_rate=0.3))
    assert [(cell.seed, cell.invalid_rate) for cell in file.read()[1]] == [(0, 0.2), (1, 0.3)]


def test_a_line_cut_off_by_a_kill_costs_that_cell_alone(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    file = TrialFile(path)
    file.start(SCORED)
    file.append(_cell())
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole) - 1, 37):
        path.write_bytes(whole[:cut])
        assert file.read()[1] == []
        file.append(_cell("plain"))
        assert [cell.condition for cell in file.read()[1]] == ["plain"]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(RecordError, match="line 1"):
        TrialFile(path).read()


def test_users_become_numbers_in_order_of_appearance() -> None:
    assert numbered(["x", "y", "x", "z"]) == [0, 1, 0, 2]


def test_the_file_is_lines_of_json_without_infinities(tmp_path: Path) -> None:
    file = TrialFile(tmp_path / "cells.jsonl")
    file.start(SCORED)
    file.append(_cell())

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (tmp_path / "cells.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
