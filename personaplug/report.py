"""A results object as a table for people: aligned Markdown that reads well in a terminal too.

The object's format is the results file's (see `evaluation.py`). No key of it is required, nor any of a row:
what is absent or unknown shows as a dash, a score that JSON cannot hold (null) as "nan", and a column that no row fills
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from personaplug.metrics import METRICS

Row = Mapping[str, Any]
Cell = Callable[[Row], str | None]

_CONTROL = "wrong-user"
_METHOD = "plug"
_ABSENT = "–"


def results_table(results: Mapping[str, Any]) -> str:
    """Return a results object as text: what was run, a line per condition, the comparisons, the notes."""
    rows, pairs = results.get("rows") or [], results.get("pairs") or []
    blocks = [_headline(results, rows), _conditions(rows), _comparisons(pairs), _notes(results, rows, pairs)]
    return "\n\n".join(block for block in blocks if block)


def _headline(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    sizes = {row.get("n") for row in rows}
    seeds = results.get("seeds") or []
    facts = [
        ("task", results.get("task")),
        ("split", results.get("split")),
        ("samples", sizes.pop() if len(sizes) == 1 else None),
        ("users", results.get("users")),
        ("placement", results.get("placement")),
        ("seeds", ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple) else seeds),
    ]
    first = " · ".join(f"{name} {_line(value)}" for name, value in facts if value not in (None, ""))
    # The models' descriptions are long: a line each.
    models = [f"- {key}: {_line(results[key])}" for key in ("model", "encoder") if results.get(key)]
    return "\n\n".join(block for block in (first, "\n".join(models)) if block)


def _conditions(rows: Sequence[Row]) -> str:
    if not rows:
        return "No rows."
    columns: list[tuple[str, Cell]] = [("condition", lambda row: _text(row.get("condition")) or _ABSENT)]
    if len({row.get("n") for row in rows}) > 1:
        columns.append(("n", lambda row: _text(row.get("n"))))
    for metric in _in_order(name for row in rows for name in row.get("metrics") or {}):
        columns.append((_titled(metric), _score(metric)))
        columns.append(("± seeds", _spread(metric)))
    columns += [
        ("answers", lambda row: _text(row.get("decoding"))),
        ("invalid", _share("invalid_rate")),
        ("truncated", _share("truncated_rate")),
        ("unfinished", _share("unfinished_rate")),
        ("no history", _share("lost_history_rate")),
        ("prompt tokens", _amount("prompt_tokens_mean")),
        ("seconds", _amount("seconds")),
    ]
    filled = [(title, [cell(row) for row in rows]) for title, cell in columns]
    return _markdown([(title, cells) for title, cells in filled if any(cell is not None for cell in cells)])


def _comparisons(pairs: Sequence[Row]) -> str:
    """One line per pair of conditions, the personal gain first."""
    if not pairs:
        return ""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for pair in sorted(map(_method_first, pairs), key=lambda pair: not _is_gain(pair)):
        lines.setdefault((str(pair.get("a")), str(pair.get("b"))), {})[str(pair.get("metric"))] = pair
    columns: list[tuple[str, Sequence[str | None]]] = [("comparison", [_named(a, b) for a, b in lines])]
    for metric in _in_order(str(pair.get("metric")) for pair in pairs):
        found = [of_metric.get(metric, {}) for of_metric in lines.values()]
        columns.append((f"{_titled(metric)} advantage", [_difference(pair) for pair in found]))
        columns.append(("p", [_p_value(pair) for pair in found]))
    return _markdown(columns)


def _notes(results: Mapping[str, Any], rows: Sequence[Row], pairs: Sequence[Row]) -> str:
    said = results.get("notes") or []
    notes = [said] if isinstance(said, str) else [str(note) for note in said]
    if any(row.get("seed_spread") for row in rows):
        notes.append("± seeds: standard deviation between trainings with different seeds.")
    if pairs:
        notes.append("A positive advantage: the first condition is better, whatever the metric's direction.")
    if any(_is_gain(_method_first(pair)) for pair in pairs):
        notes.append("Personal gain: what a user's own history gains over a stranger's.")
    if len(pairs) > 1:
        notes.append(f"p is not corrected for the {len(pairs)} comparisons shown.")
    return "\n".join(f"- {_line(note)}" for note in notes)


def _titled(metric: str) -> str:
    known = METRICS.get(metric)
    return metric if known is None else f"{metric} {'↑' if known.greater_is_better else '↓'}"


def _score(metric: str) -> Cell:
    def cell(row: Row) -> str | None:
        values, intervals = row.get("metrics") or {}, row.get("intervals") or {}
        if metric not in values:
            return None
        return _number(values[metric]) + _range(intervals.get(metric))

    return cell


def _spread(metric: str) -> Cell:
    def cell(row: Row) -> str | None:
        spread = row.get("seed_spread") or {}
        return f"±{_number(spread[metric])}" if metric in spread else None

    return cell


def _share(key: str) -> Cell:
    return lambda row: (_number(row[key], form=".1%")) if row.get(key) is not None else None


def _amount(key: str) -> Cell:
    return lambda row: _number(row[key], form=",.1f") if row.get(key) is not None else None


def _difference(pair: Row) -> str | None:
    if "difference" not in pair:
        return None
    ends = (pair["low"], pair["high"]) if "low" in pair and "high" in pair else None
    return _number(pair["difference"], form="+z.3f") + _range(ends, form="+z.3f")


def _p_value(pair: Row) -> str | None:
    if "p" not in pair:
        return None
    return "<0.001" if _is_finite(pair["p"]) and pair["p"] < 0.001 else _number(pair["p"])


def _range(ends: Sequence[Any] | None, *, form: str = ".3f") -> str:
    return f" [{', '.join(_number(end, form=form) for end in ends)}]" if ends else ""


def _number(value: Any, *, form: str = ".3f") -> str:
    if not _is_finite(value):
        return str(value) if isinstance(value, float) else "nan"
    # The error of an unclipped rating can be 1e30; thirty digits would wreck the table.
    return format(value, form if abs(value) < 1e6 else ".3g")


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _is_gain(pair: Row) -> bool:
    return pair.get("b") == _CONTROL and str(pair.get("a")).startswith(_METHOD)


def _method_first(pair: Row) -> Row:
    """The pair, turned round if it says how much worse a stranger's history is than the user's own."""
    turned = {**pair, "a": pair.get("b"), "b": pair.get("a")}
    if not _is_gain(turned):
        return pair
    for key, source in (("difference", "difference"), ("low", "high"), ("high", "low")):
        if source in pair:
            turned[key] = None if pair[source] is None else -pair[source]
    return turned


def _named(a: str, b: str) -> str:
    gain = " (personal gain)" if _is_gain({"a": a, "b": b}) else ""
    return f"{a} against {b}{gain}"


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _markdown(columns: Sequence[tuple[str, Sequence[str | None]]]) -> str:
    """Columns as an aligned table: the first to the left, the others to the right."""
    padded = [_padded(title, cells, left=place == 0) for place, (title, cells) in enumerate(columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*padded, strict=True))


def _padded(title: str, cells: Sequence[str | None], *, left: bool) -> list[str]:
    shown = [_ABSENT if cell is None else _line(cell).replace("|", "\\|") for cell in (title, *cells)]
    width = max(3, *map(len, shown))
    shown = [cell.ljust(width) if left else cell.rjust(width) for cell in shown]
    rule = ":" + "-" * (width - 1) if left else "-" * (width - 1) + ":"
    return [shown[0], rule, *shown[1:]]
