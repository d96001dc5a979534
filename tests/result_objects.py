"""Results for tests: dicts in the format of a results file, with the facts of the package's methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.results_file import Results
from personaplug.errors import ConfigError
from personaplug.methods import find_method


def method_of(name: str) -> MethodInfo:
    """Return the facts of a row of the package, or default facts for an unknown row."""
    try:
        return find_method(name).info
    except ConfigError:
        return MethodInfo(name, family="oracle" if name == "all-knowing" else "none")


def with_methods(part: Mapping[str, Any]) -> dict[str, Any]:
    """Add to each row the method facts that the evaluator writes."""

    def described(row: Mapping[str, Any]) -> dict[str, Any]:
        facts = asdict(method_of(row["method"])) if "method" in row else {}
        return {name: fact for name, fact in facts.items() if name != "name"} | dict(row)

    added: dict[str, Any] = {"rows": [described(row) for row in part["rows"]]} if "rows" in part else {}
    if isinstance(part.get("subgroups"), list):
        added["subgroups"] = [with_methods(subgroup) for subgroup in part["subgroups"]]
    return {**part, **added}


def typed(results: Mapping[str, Any]) -> Results:
    """Parse results from a dict."""
    return Results.from_json(with_methods(results))
