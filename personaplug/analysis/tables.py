"""Results as tables, with notes that explain them.

A dash stands for an unknown value. Empty columns are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import filterfalse
from typing import TypeVar

from personaplug.analysis.metrics import has_estimate, is_instrument, metric_class
from personaplug.analysis.rendering import ABSENT, Column, Section, Table, one_line, to_markdown
from personaplug.analysis.results_file import Comparison, ResultRow, Results
from personaplug.analysis.trials import Diagnostics

T = TypeVar("T")


def results_table(results: Results) -> str:
    """Return results as Markdown: what was run, the tables, the notes."""
    facts, models = head(results)
    sections = [Section(text=facts, bullets=models)]
    sections += [Section(text=title and f"{title}:", table=table) for title, table in tables(results)]
    return to_markdown([*sections, Section(text="" if results.rows else "No rows.", bullets=notes(results))])


def head(results: Results) -> tuple[str, list[str]]:
    """Return one line of facts about the run, and one line for each model."""
    about, sizes = results.about, {row.n for row in results.rows}
    evaluation = {"persona_scale": 1, "max_eval_history": -1, "item_kinds": "all"} | about.config.get("evaluation", {})
    persona_scale, max_history = evaluation["persona_scale"], evaluation["max_eval_history"]
    item_kinds = evaluation["item_kinds"]
    facts = {
        "experiment": about.experiment,
        "variant": about.variant,
        "set": "" if about.set == about.task else about.set,
        "task": about.task,
        "split": about.split,
        "samples": sizes.pop() if len(sizes) == 1 else None,
        "users": about.users,
        "placement": about.placement,
        "persona_scale": None if persona_scale == 1 else persona_scale,
        "items shown": None if item_kinds == "all" else item_kinds,
        "items shown at most": None if max_history < 0 else max_history,
        "seeds": ", ".join(map(str, about.seeds)),
    }
    line = " · ".join(f"{name} {one_line(value)}" for name, value in facts.items() if value not in (None, ""))
    models = {"model": about.model, "encoder": about.encoder}
    return line, [f"{name}: {one_line(value)}" for name, value in models.items() if value]


def tables(results: Results) -> list[tuple[str, Table]]:
    """Return the tables with their titles; the table of scores comes first and has an empty title."""
    named = [
        ("Instruments: is what is written personal?", _instruments(results)),
        ("Rates and costs", _rates_and_costs(results)),
        ("Comparisons", _comparisons(results)),
    ]
    scores = [("", _scores(results))] if results.rows else []
    return scores + [pair for pair in [*named, *_subgroups(results)] if pair[1].lines and len(pair[1].titles) > 1]


def notes(results: Results) -> list[str]:
    """Return the notes of the results, and an explanation of each column that needs one."""
    pairs = results.pairs
    has_spread = any(row.seed_spread for row in results.rows)
    has_user_averages = any(_per_user(row, users=results.about.users) for row in results.rows)
    has_gains = any(results.is_personal_gain(pair.a, pair.b) for pair in pairs)
    has_holm = any(pair.p_holm is not None for pair in pairs)
    explanations = {
        "± seeds: standard deviation over training seeds.": has_spread,
        "@median, @mean: the prediction is the median of the label probabilities, or the label nearest to their mean. "
        "Other metrics score the likeliest label. If a row has no probabilities, all metrics score the same "
        "predictions.": any(map(has_estimate, results.metric_names)),
        "choice: share of the samples whose right answer is likelier per token than every rejected answer. margin: "
        "log-probability per token of the right answer minus that of the best rejected answer, in nats, averaged over "
        "samples.": "choice" in results.metric_names,
        "divergence: KL(plain ‖ row) of the next token, averaged over the tokens of the plain model's answers, in "
        "nats.": "divergence" in results.metric_names,
        "own_words_recall, own_words_precision: own words written, as a share of all own words and of all words "
        "written. An own word is a word of the right answer that occurs in the past answers of either the user or the "
        "wrong-user stranger, not of both, and not in the input.": "own_words_recall" in results.metric_names,
        "attribution: reciprocal rank of the right user among up to 20 users whose past answers a model of characters "
        "has seen; attribution_top1: share of first ranks. Each user counts once. A text that repeats a past answer "
        "is at chance. The row reference is the ceiling, reference@wrong-user the floor, which depends on the number "
        "of users.": "attribution" in results.metric_names,
        "identified_persona: reciprocal rank of the user's persona among up to 20 by the likelihood of the right "
        "answer. Chance is 0.18 for 20.": "identified_persona" in results.metric_names,
        "form_distance: mean distance between the written and the right answer in length, capitals and punctuation. "
        "Typical spreads of short texts are 1, and the difference in a feature is at most 4.": "form_distance"
        in results.metric_names,
        "@expected, @best: mean score of the sampled answers, and the score of the best of them. Other columns score "
        "one answer.": any(name.endswith("@expected") for name in results.metric_names),
        "per user: mean of the users' scores, so that each user counts once. In other columns each sample counts "
        "once.": has_user_averages,
        "Advantage: positive if the first method is better, for every metric.": bool(pairs),
        "Personal gain: advantage of the user's own history over another user's history.": has_gains,
        "Holm p: p corrected by Holm's method, for each metric and each family of comparisons. The families are: "
        "personal gains; against plain; against instruction-only; gains of rows without a language model; all "
        "others. The column p is not corrected.": has_holm,
        f"p is not corrected for the number of comparisons, {len(pairs)}.": len(pairs) > 1 and not has_holm,
        "McNemar p: the lowest and the highest over the seeds. McNemar's test assumes independent samples. If users "
        "have several samples, rely on p instead.": any(_mcnemar_cell(pair) for pair in pairs),
    }
    explained = [text for text, applies in explanations.items() if applies]
    return [one_line(line) for line in [*results.about.notes, *explained]]


def set_names(results_list: Sequence[Results]) -> list[str]:
    """Return a unique name for each of several results: its set or task, with variant, experiment, split or position.

    These are added only if two results would have the same name.
    """
    abouts = [results.about for results in results_list]
    names = [one_line(about.set or about.task or ABSENT) for about in abouts]
    for key in ("variant", "experiment", "split"):
        labels = [one_line(getattr(about, key)) for about in abouts]
        # A label that all results of a name share does not distinguish them.
        label_counts = Counter(name for name, _ in set(zip(names, labels, strict=True)))
        pairs = zip(names, labels, strict=True)
        names = [f"{name} ({label})" if label_counts[name] > 1 and label else name for name, label in pairs]
    counts = [(names.count(name), names[: index + 1].count(name)) for index, name in enumerate(names)]
    return [f"{name} #{nth}" if count > 1 else name for name, (count, nth) in zip(names, counts, strict=True)]


def metric_title(metric: str) -> str:
    """Return a metric's name with an arrow for its direction."""
    kind = metric_class(metric)
    return metric if kind is None else f"{metric} {'↑' if kind.greater_is_better else '↓'}"


def score_cell(row: ResultRow | None, metric: str) -> str | None:
    """Return a row's score with its interval."""
    if row is None or metric not in row.metrics:
        return None
    return number_cell(row.metrics[metric]) + _range(row.intervals.get(metric))


def gain_cell(pair: Comparison | None) -> str | None:
    """Return a difference with its interval and its p or Holm p."""
    if pair is None:
        return None
    p = p_cell(pair.deciding_p)
    if p is None:
        return difference_cell(pair)
    return f"{difference_cell(pair)}, {p_title(pair)} {p if p.startswith('<') else f'= {p}'}"


def difference_cell(pair: Comparison) -> str:
    """Return a difference with its interval."""
    ends = None if pair.low is None or pair.high is None else (pair.low, pair.high)
    return number_cell(pair.difference, "+z.3f") + _range(ends, "+z.3f")


def p_title(pair: Comparison) -> str:
    """Return "Holm p" if the comparison has a corrected p, else "p"."""
    return "p" if pair.p_holm is None else "Holm p"


def p_cell(p: float | None) -> str | None:
    """Return a p with three digits."""
    return _cell(p, lambda value: "< 0.001" if value < 0.001 else number_cell(value))


def rate_columns(rows: Sequence[ResultRow]) -> list[Column]:
    """Return the shares of predictions, prompts and histories that are invalid, cut or missing, as columns."""
    diagnostics = [row.diagnostics for row in rows]
    return [
        ("invalid", [_cell(row.invalid_rate, _share) for row in rows]),
        ("truncated", [_cell(d.truncated_rate, _share) for d in diagnostics]),
        ("unfinished", [_cell(d.unfinished_rate, _share) for d in diagnostics]),
        ("no history", [_cell(d.lost_history_rate, _share) for d in diagnostics]),
        ("cut items", [_cell(d.cut_items_rate, _share) for d in diagnostics]),
    ]


def work_columns(rows: Sequence[ResultRow]) -> list[Column]:
    """Return the columns of prompt lengths, run time, and costs beyond those of the plain model."""
    diagnostics = [row.diagnostics for row in rows]
    return [
        ("prompt tokens", [_cell(d.prompt_tokens_mean, _amount) for d in diagnostics]),
        *cost_columns(diagnostics),
        ("seconds", [_cell(d.seconds, _amount) for d in diagnostics]),
    ]


def cost_columns(diagnostics: Sequence[Diagnostics]) -> list[Column]:
    """Return the columns of costs beyond those of the plain model."""
    return [
        ("extra prompt tokens", [_cell(d.extra_prompt_tokens, _amount) for d in diagnostics]),
        ("bytes per user", [_cell(d.bytes_per_user, bytes_cell) for d in diagnostics]),
        ("seconds to add a user", [_cell(d.seconds_per_user, seconds_cell) for d in diagnostics]),
    ]


def _scores(results: Results) -> Table:
    rows = results.rows
    columns: list[Column] = [("method", [row.name for row in rows])]
    if len({row.n for row in rows}) > 1:
        columns.append(("n", [_cell(row.n, str) for row in rows]))
    for metric in filterfalse(is_instrument, results.metric_names):
        averages = [_per_user(row, users=results.about.users).get(metric) for row in rows]
        columns += [
            (metric_title(metric), [score_cell(row, metric) for row in rows]),
            ("± seeds", [_cell(row.seed_spread.get(metric), lambda spread: f"±{number_cell(spread)}") for row in rows]),
            ("per user", [_cell(average, number_cell) for average in averages]),
        ]
    gains = results.personal_gains(results.leading_metric)
    columns.append((f"personal gain ({results.leading_metric})", [gain_cell(gains.get(row.name)) for row in rows]))
    return Table.from_columns(columns)


def _instruments(results: Results) -> Table:
    """Return the instruments of texts and their personal gains; the other comparisons are in the results file."""
    columns: list[Column] = [("method", [row.name for row in results.rows])]
    for metric in filter(is_instrument, results.metric_names):
        gains = results.personal_gains(metric)
        columns += [
            (metric_title(metric), [score_cell(row, metric) for row in results.rows]),
            ("personal gain", [gain_cell(gains.get(row.name)) for row in results.rows]),
        ]
    return Table.from_columns(columns).without_empty_lines()


def _rates_and_costs(results: Results) -> Table:
    rows = results.rows
    columns: list[Column] = [
        ("method", [row.name for row in rows]),
        ("answers", [row.decoding or None for row in rows]),
        *rate_columns(rows),
        *work_columns(rows),
    ]
    return Table.from_columns(columns)


def _comparisons(results: Results) -> Table:
    lines: dict[tuple[str, str], dict[str, Comparison]] = {}
    for pair in results.pairs:
        lines.setdefault((pair.a, pair.b), {})[pair.metric] = pair
    ordered = sorted(lines, key=lambda names: not results.is_personal_gain(*names))
    titles = [f"{a} against {b}{' (personal gain)' if results.is_personal_gain(a, b) else ''}" for a, b in ordered]
    columns: list[Column] = [("comparison", titles)]
    for metric in filterfalse(is_instrument, dict.fromkeys(pair.metric for pair in results.pairs)):
        pairs = [lines[names].get(metric) for names in ordered]
        columns += [
            (f"{metric_title(metric)} advantage", [_cell(pair, difference_cell) for pair in pairs]),
            ("p", [_cell(comparison, lambda pair: p_cell(pair.p)) for comparison in pairs]),
            ("Holm p", [_cell(comparison, lambda pair: p_cell(pair.p_holm)) for comparison in pairs]),
            ("McNemar p", [_cell(pair, _mcnemar_cell) for pair in pairs]),
        ]
    return Table.from_columns(columns)


def _subgroups(results: Results) -> list[tuple[str, Table]]:
    """Return a table of the leading metric and one of the personal gains, each with a column per subgroup."""
    subgroups, metric = results.subgroups, results.leading_metric
    if not subgroups or not metric:
        return []
    names = list(dict.fromkeys(row.name for subgroup in subgroups for row in subgroup.rows))
    sizes = [{row.n for row in subgroup.rows} - {None} for subgroup in subgroups]
    titles = [f"{s.name} (n = {n.pop()})" if len(n) == 1 else s.name for s, n in zip(subgroups, sizes, strict=True)]
    scores = [[score_cell(subgroup.by_name.get(name), metric) for name in names] for subgroup in subgroups]
    gains = [[gain_cell(subgroup.personal_gains(metric).get(name)) for name in names] for subgroup in subgroups]
    # An empty column of gains stays, so that a curve shows the gap.
    lines = tuple(zip(names, *gains, strict=True))
    score_table = Table.from_columns([("method", names), *zip(titles, scores, strict=True)])
    return [
        (f"{metric_title(metric)} by subgroup", score_table),
        (f"Personal gain in {metric} by subgroup", Table(("method", *titles), lines).without_empty_lines()),
    ]


def _per_user(row: ResultRow, *, users: int | None) -> dict[str, float]:
    """Return the finite averages over users, unless each user has one sample."""
    has_several = users is None or row.n is None or row.n > users
    return {name: value for name, value in row.per_user.items() if has_several and math.isfinite(value)}


def _cell(value: T | None, to_text: Callable[[T], str | None]) -> str | None:
    return None if value is None else to_text(value)


def _mcnemar_cell(pair: Comparison) -> str | None:
    p_values = sorted(p for p in pair.mcnemar_p if math.isfinite(p))
    ends = [p_cell(p) or "" for p in p_values[:1] + p_values[-1:]]
    return " to ".join(dict.fromkeys(ends)) or None


def _range(ends: Sequence[float] | None, form: str = ".3f") -> str:
    return f" [{', '.join(number_cell(end, form) for end in ends)}]" if ends else ""


def number_cell(value: float, form: str = ".3f") -> str:
    """Return a number in a format; numbers from a million on with three digits, infinity and NaN as words."""
    if not math.isfinite(value):
        return str(value)
    # The error of an unclipped rating can be 1e30, and thirty digits would make the table too wide.
    return format(value, form if abs(value) < 1e6 else ".3g")


_amount, _share = partial(number_cell, form=",.1f"), partial(number_cell, form=".1%")


def bytes_cell(value: float) -> str:
    """Return a size in the largest unit in which it is at least 1: "1.2 KB"."""
    if not math.isfinite(value) or value < 999.5:
        return f"{number_cell(value, '.0f')} B"
    power = next((power for power in (1, 2) if value / 1000**power < 999.95), 3)
    return f"{value / 1000**power:,.1f} {('KB', 'MB', 'GB')[power - 1]}"


def seconds_cell(value: float) -> str:
    """Return seconds with three digits: adding a user takes from a millisecond to an hour."""
    return number_cell(value, ",.0f" if math.isfinite(value) and value >= 99.95 else ".3g")
