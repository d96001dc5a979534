"""Print the tables of docs/scale.md from the results of `scale.py`.

python benchmarks/scale_tables.py [FILE]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scale.json"
ENGINES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}

Report = Mapping[str, Any]
_TIMES: Mapping[str, Callable[[Report], Any]] = {
    "a history": lambda report: report["threads_1"]["history"],
    "a cached persona": lambda report: report["threads_1"]["cached_persona"],
    "a new persona": lambda report: report["threads_1"]["new_persona"],
    "a history, cold": lambda report: report.get("cold_history"),
    "adding an item": lambda report: report["adding_one_item"],
    "erasing a user": lambda report: report["erasing_a_user"],
}
_RATES = {"histories": "history", "cached personas": "cached_persona", "new personas": "new_persona"}
_SECONDS = {
    "opening the store": "open",
    "listing 100 users": "list_100_users",
    "looking for expired items": "look_for_expired_items",
    "checking all rows": "check_all_rows",
    "backing up": "back_up",
}


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table for each engine."""
    for engine, name in ENGINES.items():
        if engine in results:
            yield from _table(name, results[engine]["growth"], results[engine]["again"])
            yield ""


def _table(name: str, growth: list[Report], again: list[Report]) -> Iterator[str]:
    reports = [*growth, *again]
    yield _row(name, [f"{r['users']:,} users" for r in growth] + [f"{r['users']:,} again" for r in again])
    yield "|---" * (len(reports) + 1) + "|"
    yield _row("items", [f"{report['items']:,}" for report in reports])
    yield _row("files", [_size(report["bytes"]["files"]) for report in reports])
    yield _row("bytes an item", [f"{report['bytes']['files'] / report['items']:,.0f}" for report in reports])
    yield _row("of these in indexes", [f"{report['bytes']['share_of_indexes']:.1%}" for report in reports])
    for label, times in _TIMES.items():
        if times(growth[0]):
            yield _row(f"{label}, p50 / p99 ms", [_time(times(report)) for report in reports])
            if name == "SQLite":  # a PostgreSQL server has processes of its own
                yield _row("… processor time, p50 ms", [_processor(times(r), times(growth[0])) for r in reports])
    for label, kind in _RATES.items():
        rates = [[report[f"threads_{threads}"][kind]["per_second"] for threads in (1, 8)] for report in reports]
        yield _row(f"{label} a second, 1 / 8 threads", [f"{one:,} / {eight:,}" for one, eight in rates])
    for label, kind in _SECONDS.items():
        if kind in growth[0]["seconds"]:
            yield _row(f"{label}, s", [_seconds(report["seconds"].get(kind)) for report in reports])


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _time(times: Report) -> str:
    return f"{_milliseconds(times['p50_ms'])} / {_milliseconds(times['p99_ms'])}"


def _processor(times: Report, first: Report) -> str:
    ratio = times["processor_p50_ms"] / first["processor_p50_ms"]
    return f"{_milliseconds(times['processor_p50_ms'])} ({ratio:.1f} ×)"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    print("\n".join(tables(json.loads((Path(sys.argv[1]) if sys.argv[1:] else RESULTS).read_text()))))
