"""The tables of docs/scale.md are those of the published results."""

from __future__ import annotations

import json

from scale_tables import RESULTS, tables

PAGE = RESULTS.parents[2] / "docs" / "scale.md"


def test_the_page_has_the_tables_of_the_results() -> None:
    lines = [line for line in tables(json.loads(RESULTS.read_text(encoding="utf-8"))) if line]
    heads = [line for line in lines if line.startswith(("| SQLite |", "| PostgreSQL |"))]
    assert [head.split(" | ")[0] for head in heads] == ["| SQLite", "| PostgreSQL"]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in page] == []
