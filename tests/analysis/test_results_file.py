"""A results file survives a round trip, and the error of a broken file names the field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.results_file import ResultRow, Results, Subgroup, load_results, write_results
from personaplug.analysis.trials import Diagnostics
from personaplug.errors import DamagedFile, MissingData, RecordError
from personaplug.infra.atomic_io import write_json

PUBLISHED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("**/*.json"))
TABLES = [path for path in PUBLISHED if "rows" in json.loads(path.read_text(encoding="utf-8"))]


def row(name: str = "plug", **more: Any) -> dict[str, Any]:
    return {"method": name, "n": 3, "seeds": [0], "metrics": {"mae": 1.0}, "intervals": {"mae": [0.5, 2.0]}} | more


def pair(**more: Any) -> dict[str, Any]:
    return {"a": "plug", "b": "plain", "metric": "mae", "difference": 0.5, "low": -0.1, "high": 0.2, "p": 0.4} | more


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_file_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "again.json", load_results(path).to_json())
    record, again = (json.loads(file.read_text(encoding="utf-8")) for file in (path, tmp_path / "again.json"))
    parts = zip([record, *record.get("subgroups", [])], [again, *again.get("subgroups", [])], strict=True)
    for part, part_again in parts:
        assert part_again["pairs"] == part["pairs"]
        assert [row_again | row for row, row_again in zip(part["rows"], part_again["rows"], strict=True)] == (
            part_again["rows"]
        )
    about = {key: value for key, value in record.items() if key not in ("rows", "pairs", "subgroups", "checksum")}
    assert {key: again[key] for key in about} == about


def test_unknown_fields_are_ignored_everywhere() -> None:
    def record(**extra: Any) -> dict[str, Any]:
        part = {"rows": [row(**extra)], "pairs": [pair(**extra)], **extra}
        return part | {"task": "T", "subgroups": [{"name": "short", "samples": 2} | part]}

    assert Results.from_json(record(extra=1)) == Results.from_json(record())


def test_row_has_its_method_info_and_diagnostics() -> None:
    costs = {"extra_prompt_tokens": 2.0, "bytes_per_user": None, "seconds_per_user": 0.5}
    method_info: dict[str, Any] = {
        "family": "plug",
        "history": "own",
        "control_of": None,
        "parents": ["x"],
        "is_seeded": True,
    }
    record = row(**method_info, truncated_rate=0.25, costs=costs, decoding="scored", fit_seconds=1.0)
    [parsed] = Results.from_json({"rows": [record]}).rows
    assert (parsed.method.family, parsed.method.parents, parsed.method.is_seeded) == ("plug", ("x",), True)
    expected = Diagnostics(truncated_rate=0.25, extra_prompt_tokens=2.0, seconds_per_user=0.5, fit_seconds=1.0)
    assert parsed.diagnostics == expected
    written = parsed.to_json()
    assert {key: written[key] for key in ("costs", "decoding", "fit_seconds")} == {
        "costs": costs,
        "decoding": "scored",
        "fit_seconds": 1.0,
    }
    assert "per_seed" not in written


def test_null_is_read_as_nan_and_nan_written_as_null(tmp_path: Path) -> None:
    broken = row(metrics={"mae": None}, intervals={"mae": [None, None]}, per_user={"mae": None})
    results = Results.from_json({"rows": [broken], "pairs": [pair(difference=None, p=None)]})
    assert math.isnan(results.rows[0].metrics["mae"])
    assert results.rows[0].interval("mae") is None
    assert math.isnan(results.pairs[0].p or 0)
    write_json(tmp_path / "a.json", results.to_json())
    again = json.loads((tmp_path / "a.json").read_text())
    assert again["rows"][0]["intervals"] == {"mae": [None, None]}
    assert again["pairs"][0]["p"] is None


def test_subgroup_without_rows_is_read() -> None:
    assert Results.from_json({"rows": [], "subgroups": [{"name": "none"}]}).subgroups == [Subgroup([], [], "none")]


@pytest.mark.parametrize(
    ("content", "position"),
    [
        ("{", "line 1"),
        ("[1]", "the whole file"),
        ('{"samples": 3}', "the whole file"),
        ('{"rows": [3]}', "the field 'rows'"),
        ('{"rows": {"a": 1}}', "the field 'rows'"),
        ('{"rows": [], "pairs": [[1]]}', "the field 'pairs'"),
        ('{"rows": [], "subgroups": [{"name": "a", "rows": 1}]}', "the field 'rows'"),
        ('{"rows": [], "subgroups": 7}', "the field 'subgroups'"),
        ('{"rows": [{"method": "a"}, {"n": 3}]}', "entry 2 of 'rows': the field 'method'"),
        (
            '{"rows": [], "pairs": [{"a": "x", "b": "y", "metric": "mae"}]}',
            "entry 1 of 'pairs': the field 'difference'",
        ),
        ('{"rows": [], "subgroups": [{"rows": []}]}', "entry 1 of 'subgroups': the field 'name'"),
        ('{"rows": [{"method": null}]}', "entry 1 of 'rows': the field 'method'"),
        ('{"rows": [{"method": "a", "metrics": {"mae": "x"}}]}', "entry 1 of 'rows': the field 'metrics'"),
        ('{"rows": [{"method": "a", "costs": 3}]}', "entry 1 of 'rows': the field 'costs'"),
        ('{"rows": [{"method": "a", "bytes_per_user": "x"}]}', "entry 1 of 'rows': the field 'bytes_per_user'"),
        ('{"rows": [{"method": "a", "parents": 3}]}', "entry 1 of 'rows': the field 'parents'"),
        (
            '{"rows": [], "pairs": [{"a": "x", "b": "y", "metric": "mae", "difference": "1"}]}',
            "entry 1 of 'pairs': the field 'difference'",
        ),
        ('{"rows": [], "subgroups": [{"name": 5}]}', "entry 1 of 'subgroups': the field 'name'"),
        (f'{{"rows": {"9" * 5000}}}', "the whole file"),
        ("[" * 100_000, "the whole file"),
    ],
)
def test_error_for_a_broken_file_names_the_file_and_the_field(tmp_path: Path, content: str, position: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecordError, match=rf"a\.json, {position}"):
        load_results(tmp_path / "a.json")


def test_missing_files_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="evaluate --json"):
        load_results(tmp_path / "absent.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match="UTF-8"):
        load_results(tmp_path / "b.json")


def test_a_repeated_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": [{"method": "plain"}, {"method": "plug"}, {"method": "plain"}]}))
    with pytest.raises(RecordError, match="found 'plain' more than once"):
        load_results(path)


def test_a_changed_file_is_refused_and_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_results(path, Results([ResultRow(MethodInfo("plain"), metrics={"mae": 1.25, "nll": math.nan})], []))
    written = json.loads(path.read_text())
    assert load_results(path).rows[0].metrics["mae"] == 1.25
    path.write_text(path.read_text().replace("1.25", "1.35"))
    with pytest.raises(DamagedFile, match="evaluate again"):
        load_results(path)
    del written["checksum"]
    path.write_text(json.dumps(written))
    assert load_results(path).rows[0].metrics["mae"] == 1.25
