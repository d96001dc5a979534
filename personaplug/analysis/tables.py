"""A results object as tables for people: aligned Markdown that reads well in a terminal too.

The object's format is the results file's (see `results.py`). No key of it is required, nor any of a row:
what is absent or unknown shows as a dash, a score that JSON cannot hold (null) as "nan", and a column that no row fills
is left out.

`results_table` gives the whole text; the parts it is made of (`headline`, `tables`, `notes`) are there for other
formats, and so are the questions that a page or a figure asks a results object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from personaplug.analysis.metrics import has_estimate, metric_class
from personaplug.methods import control_of

Row = Mapping[str, Any]
Trial = Callable[[Row], str | None]

_ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """Text in lines and columns.

    Attributes:
        titles: of the columns; the first column names the lines.
        lines: a cell per column; None where nothing is known.
        strong: (line, column) of the cells to be set in bold.
    """

    titles: tuple[str, ...]
    lines: tuple[tuple[str | None, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()

    def shown(self) -> list[list[str]]:
        """Every line's cells, each as one line of text and a dash where nothing is known."""
        return [[_ABSENT if cell is None else one_line(cell) for cell in line] for line in self.lines]

    def markdown(self) -> str:
        """The table as aligned Markdown: the first column to the left, the others to the right."""
        cells = [[cell.replace("|", "\\|") for cell in line] for line in [map(one_line, self.titles), *self.shown()]]
        for line, column in self.strong:
            cells[line + 1][column] = f"**{cells[line + 1][column]}**"
        padded = [_padded(column, left=place == 0) for place, column in enumerate(zip(*cells, strict=True))]
        return "\n".join(f"| {' | '.join(line)} |" for line in zip(*padded, strict=True))


def results_table(results: Mapping[str, Any]) -> str:
    """Return a results object as text: what was run, a line per condition, the comparisons, the notes."""
    facts, models = headline(results)
    blocks = [facts, "\n".join(f"- {model}" for model in models)]
    for title, table in tables(results):
        blocks += [title and f"{title}:", table.markdown()]
    if not results.get("rows"):
        blocks.append("No rows.")
    blocks.append("\n".join(f"- {note}" for note in notes(results)))
    return "\n\n".join(block for block in blocks if block)


def headline(results: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return what was run: the facts as one line, and a line for each model."""
    sizes = {row.get("n") for row in _rows(results)}
    seeds = results.get("seeds") or []
    asked = (results.get("config") or {}).get("evaluation") or {}
    persona_scale, shown = asked.get("persona_scale", 1), asked.get("max_eval_history", -1)
    facts = [
        ("experiment", results.get("experiment")),
        ("variant", results.get("variant")),
        ("set", None if results.get("set") == results.get("task") else results.get("set")),
        ("task", results.get("task")),
        ("split", results.get("split")),
        ("samples", sizes.pop() if len(sizes) == 1 else None),
        ("users", results.get("users")),
        ("placement", results.get("placement")),
        ("persona_scale", None if persona_scale == 1 else persona_scale),
        ("items shown at most", None if shown < 0 else shown),
        ("seeds", ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple) else seeds),
    ]
    first = " · ".join(f"{name} {one_line(value)}" for name, value in facts if value not in (None, ""))
    # The models' descriptions are long: a line each.
    return first, [f"{key}: {one_line(results[key])}" for key in ("model", "encoder") if results.get(key)]


def tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return the tables of a results object with their titles; the first, of the scores, has none."""
    rows = _rows(results)
    found = [("", _scores(results, rows)), ("Rates and costs", _rates_and_costs(rows))] if rows else []
    found.append(("Comparisons", _comparisons(results.get("pairs") or [])))
    found += _slices(results)
    return [(title, table) for title, table in found if not title or (table.lines and len(table.titles) > 1)]


def notes(results: Mapping[str, Any]) -> list[str]:
    """Return what must be known to read the tables, a line each."""
    rows, pairs = _rows(results), results.get("pairs") or []
    said = results.get("notes") or []
    lines = [said] if isinstance(said, str) else [str(note) for note in said]
    if any(row.get("seed_spread") for row in rows):
        lines.append("± seeds: standard deviation between trainings with different seeds.")
    if any(has_estimate(name) for row in rows for name in row.get("metrics") or {}):
        lines.append(
            "@median, @mean: the answer is the median of the labels' probabilities, or the label nearest to their "
            "mean; elsewhere it is the likeliest label. A row without probabilities is scored with its answers as they "
            "stand."
        )
    if any(_per_user(row, results=results) for row in rows):
        lines.append("per user: the score of each user, averaged, so that each counts once; others count each sample.")
    if pairs:
        lines.append("A positive advantage: the first condition is better, whatever the metric's direction.")
    if any(_is_gain(_method_first(pair)) for pair in pairs):
        lines.append("Personal gain: what a user's own history gains over a stranger's.")
    return [one_line(line) for line in lines + _notes_on_p(pairs)]


def _notes_on_p(pairs: Sequence[Row]) -> list[str]:
    lines = []
    if any(pair.get("p_holm") is not None for pair in pairs):
        lines.append(
            "Holm p: corrected by Holm's rule, metric by metric, over a family of comparisons (personal gains; against "
            "plain; against instruction-only; gains of rows without the language model; the rest); p is not."
        )
    elif len(pairs) > 1:
        lines.append(f"p is not corrected for the {len(pairs)} comparisons shown.")
    if any(_mcnemar_p(pair) is not None for pair in pairs):
        lines.append(
            "McNemar p: of several seeds the lowest and the highest; it takes samples for independent, so where users "
            "have several, p is the one to trust."
        )
    return lines


def set_names(results_list: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each results object: its set, or task; told apart by variant, experiment or place in line."""
    names = [one_line(results.get("set") or results.get("task") or _ABSENT) for results in results_list]
    for key in ("variant", "experiment", "split"):
        told = [one_line(results.get(key) or "") for results in results_list]
        # What namesakes share does not tell them apart.
        differ = {name for name in names if len({t for t, n in zip(told, names, strict=True) if n == name}) > 1}
        names = [f"{n} ({t})" if n in differ and t else n for t, n in zip(told, names, strict=True)]
    return [
        f"{name} #{names[: place + 1].count(name)}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def leading_metric(results: Mapping[str, Any]) -> str | None:
    """Return the metric that stands first in the rows; None without any."""
    return next((str(name) for row in _rows(results) for name in row.get("metrics") or {}), None)


def personal_gains(results: Mapping[str, Any], metric: str | None) -> dict[str, Row]:
    """Return the pair of each method with its own wrong-user control in one metric, by the method's name."""
    turned = map(_method_first, results.get("pairs") or [])
    return {str(pair["a"]): pair for pair in turned if _is_gain(pair) and pair.get("metric") == metric}


def is_significant(pair: Row) -> bool:
    """Say whether p is below .05, corrected by Holm where that is given."""
    p = pair.get("p") if pair.get("p_holm") is None else pair["p_holm"]
    return is_finite(p) and p < 0.05


def score_cell(row: Row, metric: str) -> str | None:
    """Return a row's score with its interval."""
    values, intervals = row.get("metrics") or {}, row.get("intervals") or {}
    return _number(values[metric]) + _range(intervals.get(metric)) if metric in values else None


def gain_cell(pair: Row | None) -> str | None:
    """Return a difference with its interval and p; the p says so if it is corrected by Holm."""
    difference = None if pair is None else _difference(pair)
    if pair is None or difference is None:
        return None
    key = "p" if pair.get("p_holm") is None else "p_holm"
    shown = _p_value(pair, key)
    if shown is None:
        return difference
    return f"{difference}, {'Holm ' if key == 'p_holm' else ''}p {shown if shown[0] == '<' else f'= {shown}'}"


def titled(metric: str) -> str:
    """Return a metric's name with its direction."""
    known = metric_class(metric)
    return metric if known is None else f"{metric} {'↑' if known.greater_is_better else '↓'}"


def cost_columns(rows: Sequence[Row]) -> list[tuple[str, list[str | None]]]:
    """Return the columns of what a method costs beyond the plain model, for rows that hold `costs`."""
    kinds: list[tuple[str, str, Callable[[Any], str]]] = [
        ("extra prompt tokens", "extra_prompt_tokens", lambda value: _number(value, form=",.1f")),
        ("bytes per user", "bytes_per_user", _bytes),
        ("seconds to add a user", "seconds_per_user", _seconds),
    ]
    costs = [row.get("costs") or {} for row in rows]
    return [(title, [form(c[key]) if c.get(key) is not None else None for c in costs]) for title, key, form in kinds]


def filled(columns: Sequence[tuple[str, Sequence[str | None]]]) -> Table:
    """Return columns as a table, but for those after the first in which nothing is known."""
    kept = [column for place, column in enumerate(columns) if not place or any(cell is not None for cell in column[1])]
    return Table(tuple(title for title, _ in kept), tuple(zip(*(cells for _, cells in kept), strict=True)))


def is_finite(value: Any) -> TypeGuard[float]:
    """Say whether a value is there and a number that can be drawn."""
    return value is not None and math.isfinite(value)


def one_line(value: Any) -> str:
    """Return a value as text without line breaks."""
    return " ".join(str(value).split())


def in_order(names: Iterable[str]) -> list[str]:
    """Return each name once, where it first stands."""
    return list(dict.fromkeys(names))


def _scores(results: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    columns: list[tuple[str, Trial]] = [("condition", lambda row: _text(row.get("condition")) or _ABSENT)]
    if len({row.get("n") for row in rows}) > 1:
        columns.append(("n", lambda row: _text(row.get("n"))))
    for metric in in_order(name for row in rows for name in row.get("metrics") or {}):
        columns.append((titled(metric), _score(metric)))
        columns.append(("± seeds", _spread(metric)))
        columns.append(("per user", _user_average(metric, results=results)))
    leading = leading_metric(results)
    gains = personal_gains(results, leading)
    columns.append((f"personal gain ({leading})", lambda row: gain_cell(gains.get(str(row.get("condition"))))))
    return filled([(title, [cell(row) for row in rows]) for title, cell in columns])


def _rates_and_costs(rows: Sequence[Row]) -> Table:
    cells: list[tuple[str, Trial]] = [
        ("condition", lambda row: _text(row.get("condition")) or _ABSENT),
        ("answers", lambda row: _text(row.get("decoding"))),
        ("invalid", _share("invalid_rate")),
        ("truncated", _share("truncated_rate")),
        ("unfinished", _share("unfinished_rate")),
        ("no history", _share("lost_history_rate")),
        ("cut items", _share("cut_items_rate")),
        ("prompt tokens", _amount("prompt_tokens_mean")),
    ]
    columns = [(title, [cell(row) for row in rows]) for title, cell in cells]
    return filled([*columns, *cost_columns(rows), ("seconds", [_amount("seconds")(row) for row in rows])])


def _comparisons(pairs: Sequence[Row]) -> Table:
    """One line per pair of conditions, the personal gains first."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for pair in sorted(map(_method_first, pairs), key=lambda pair: not _is_gain(pair)):
        lines.setdefault((str(pair.get("a")), str(pair.get("b"))), {})[str(pair.get("metric"))] = pair
    columns: list[tuple[str, Sequence[str | None]]] = [("comparison", [_named(a, b) for a, b in lines])]
    for metric in in_order(str(pair.get("metric")) for pair in pairs):
        found = [of_metric.get(metric, {}) for of_metric in lines.values()]
        columns.append((f"{titled(metric)} advantage", [_difference(pair) for pair in found]))
        for title, key in (("p", "p"), ("Holm p", "p_holm")):
            columns.append((title, [_p_value(pair, key) for pair in found]))
        columns.append(("McNemar p", [_mcnemar_p(pair) for pair in found]))
    return filled(columns)


def _slices(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """The leading metric and the personal gains, a column per slice of the samples."""
    slices, metric = results.get("slices") or [], leading_metric(results)
    if not slices or metric is None:
        return []
    names = in_order(str(row.get("condition")) for part in slices for row in _rows(part))
    scores: list[tuple[str, Sequence[str | None]]] = [("condition", names)]
    gains: list[tuple[str, Sequence[str | None]]] = [("method", names)]
    for part in slices:
        of_name = {str(row.get("condition")): row for row in _rows(part)}
        of_method = personal_gains(part, metric)
        scores.append((_slice_title(part), [score_cell(of_name.get(name, {}), metric) for name in names]))
        gains.append((_slice_title(part), [gain_cell(of_method.get(name)) for name in names]))
    told = Table(
        tuple(title for title, _ in gains),
        tuple(line for line in zip(*(cells for _, cells in gains), strict=True) if any(line[1:])),
    )
    return [(f"{titled(metric)} by slice", filled(scores)), (f"Personal gain in {metric} by slice", told)]


def _slice_title(part: Mapping[str, Any]) -> str:
    sizes = {row.get("n") for row in _rows(part)} - {None}
    return f"{part.get('name', _ABSENT)}{f' (n = {sizes.pop()})' if len(sizes) == 1 else ''}"


def _rows(results: Mapping[str, Any]) -> Sequence[Row]:
    return results.get("rows") or []


def _is_gain(pair: Row) -> bool:
    return pair.get("b") is not None and pair["b"] == control_of(str(pair.get("a")))


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


def _score(metric: str) -> Trial:
    return lambda row: score_cell(row, metric)


def _spread(metric: str) -> Trial:
    def cell(row: Row) -> str | None:
        spread = row.get("seed_spread") or {}
        return f"±{_number(spread[metric])}" if metric in spread else None

    return cell


def _per_user(row: Row, *, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The averages over users, where they are another thing than those over samples."""
    users, samples = results.get("users"), row.get("n")
    several = users is None or samples is None or samples > users
    return {name: value for name, value in (row.get("per_user") or {}).items() if several and is_finite(value)}


def _user_average(metric: str, *, results: Mapping[str, Any]) -> Trial:
    def cell(row: Row) -> str | None:
        averages = _per_user(row, results=results)
        return _number(averages[metric]) if metric in averages else None

    return cell


def _share(key: str) -> Trial:
    return lambda row: (_number(row[key], form=".1%")) if row.get(key) is not None else None


def _amount(key: str) -> Trial:
    return lambda row: _number(row[key], form=",.1f") if row.get(key) is not None else None


def _difference(pair: Row) -> str | None:
    if "difference" not in pair:
        return None
    ends = (pair["low"], pair["high"]) if "low" in pair and "high" in pair else None
    return _number(pair["difference"], form="+z.3f") + _range(ends, form="+z.3f")


def _p_value(pair: Row, key: str) -> str | None:
    # A test that was not made has no p, and null there; the bootstrap's own p is null where it could not be found.
    if key not in pair or (key != "p" and pair[key] is None):
        return None
    return _short_p(pair[key])


def _mcnemar_p(pair: Row) -> str | None:
    """McNemar's p of the seeds, from the lowest to the highest; a single one may stand without a list."""
    told = pair.get("mcnemar_p")
    found = sorted(p for p in (told if isinstance(told, list | tuple) else [told]) if is_finite(p))
    return " to ".join(in_order(_short_p(p) for p in found[:1] + found[-1:])) or None


def _short_p(p: Any) -> str:
    return "< 0.001" if is_finite(p) and p < 0.001 else _number(p)


def _range(ends: Sequence[Any] | None, *, form: str = ".3f") -> str:
    return f" [{', '.join(_number(end, form=form) for end in ends)}]" if ends else ""


def _number(value: Any, *, form: str = ".3f") -> str:
    if not is_finite(value):
        return str(value) if isinstance(value, float) else "nan"
    # The error of an unclipped rating can be 1e30; thirty digits would wreck the table.
    return format(value, form if abs(value) < 1e6 else ".3g")


def _bytes(value: float) -> str:
    """A size in the largest unit that leaves at least 1 before the point: "1.2 KB"."""
    if not is_finite(value) or value < 999.5:
        return f"{_number(value, form='.0f')} B"
    power = next((power for power in (1, 2) if value / 1000**power < 999.95), 3)
    return f"{value / 1000**power:,.1f} {('KB', 'MB', 'GB')[power - 1]}"


def _seconds(value: float) -> str:
    """Three digits at most, since adding a user takes from a millisecond to an hour."""
    return _number(value, form=",.0f" if is_finite(value) and value >= 99.95 else ".3g")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _padded(cells: Sequence[str], *, left: bool) -> list[str]:
    width = max(3, *map(len, cells))
    padded = [cell.ljust(width) if left else cell.rjust(width) for cell in cells]
    rule = ":" + "-" * (width - 1) if left else "-" * (width - 1) + ":"
    return [padded[0], rule, *padded[1:]]
