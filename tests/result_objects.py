"""Results objects for tests: dicts as a results file holds them, with the facts of the package's own methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.results_file import Results
from personaplug.errors import ConfigError
from personaplug.methods import find_method


def method_of(name: str) -> MethodInfo:
    """Return the facts of a row of the package, or of a row without any."""
    try:
        return find_method(name).info
    except ConfigError:
        return MethodInfo(name, family="oracle" if name == "all-knowing" else "none")


def with_methods(part: Mapping[str, Any]) -> dict[str, Any]:
    """Add to each row what the evaluator writes of its method."""

    def described(row: Mapping[str, Any]) -> dict[str, Any]:
        facts = asdict(method_of(row["method"])) if "method" in row else {}
        return {name: fact for name, fact in facts.items() if name != "name"} | dict(row)

    added: dict[str, Any] = {"rows": [described(row) for row in part["rows"]]} if "rows" in part else {}
    if isinstance(part.get("subgroups"), list):
        added["subgroups"] = [with_methods(subgroup) for subgroup in part["subgroups"]]
    return {**part, **added}


def typed(results: Mapping[str, Any]) -> Results:
    """Read a results object."""
    return Results.from_json(with_methods(results))
