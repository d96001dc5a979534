"""The verdict on a table: is its main row personal, better than no history, better than rivals that cost nothing?

Each answer uses the p of the paired bootstrap over users. *Yes*: the main row is better, with p below .05. *No*: it is
worse, with p below .05. *Not shown*: p is .05 or more. *Not measured*: the answer names the row to add.
"""

from __future__ import annotations

import math
from typing import Final

from personaplug.analysis.method_info import WRONG_USER, MethodInfo, main_row
from personaplug.analysis.metrics import metric_class
from personaplug.analysis.rendering import Answer
from personaplug.analysis.results_file import Comparison, ResultPart, ResultRow
from personaplug.analysis.tables import bytes_cell, gain_cell, metric_title, number_cell, seconds_cell
from personaplug.analysis.trials import Diagnostics

_INSTRUCTION = "instruction-only"
OWN: Final = "own history"
STRANGER: Final = "a stranger's history"
NO_HISTORY: Final = "no history"
RIVAL: Final = "best rival at no cost"
COSTLY_RIVAL: Final = "best rival at any cost"
_NO_RIVALS = ("none", "plug")  # families whose rows do not personalize, or are plugs


def verdict(results: ResultPart) -> list[Answer]:
    """Return an answer to each question about the leading metric.

    Return none without metrics, or for a single row that uses no history.
    """
    if not results.leading_metric:
        return []
    main = main_row([row.method for row in results.rows])
    if main is None:
        reason = "no row uses the user's own history. Add the row plug to --methods."
        return [Answer("Is it personal?", "Not measured", reason)] if len(results.rows) > 1 else []
    judge = _Judge(results, main)
    return [judge.is_personal(), judge.beats_no_history(), judge.beats_free_rivals()]


def rows_of_verdict(results: ResultPart) -> dict[str, ResultRow]:
    """Return the rows that the verdict compares, and the best rival at any cost if it costs more, by their roles.

    Rows that the results lack are left out; without a main row, all. Other plugs are no rivals.
    """
    main = main_row([row.method for row in results.rows])
    if main is None:
        return {}
    judge = _Judge(results, main)
    rivals = [row for row in ranked_rows(results, judge.metric) if row.method.family not in _NO_RIVALS]
    free = next(iter(judge.best_free_rivals), None)
    rows = {
        OWN: results.by_name[main.name],
        STRANGER: judge.control,
        NO_HISTORY: results.by_name.get(_INSTRUCTION),
        RIVAL: free,
        COSTLY_RIVAL: next((row for row in rivals[:1] if row is not free), None),
    }
    return {role: row for role, row in rows.items() if row is not None}


def price(results: ResultPart) -> Answer | None:
    """Say what the main row costs, beside the best row with texts in the prompt; None if no cost is known."""
    main = main_row([row.method for row in results.rows])
    costs = _costs(results.by_name[main.name].diagnostics) if main else ""
    if main is None or not costs:
        return None
    rivals = [row for row in ranked_rows(results, results.leading_metric) if row.method.family == "prompt"]
    described = [(row.name, _costs(row.diagnostics)) for row in rivals if row.name != main.name]
    beside = [f" For comparison, {name}: {text}." for name, text in described if text][:1]
    return Answer(f"What does {main.name} cost?", "", f"{costs}.{''.join(beside)}")


def ranked_rows(results: ResultPart, metric: str) -> list[ResultRow]:
    """Return the rows with a finite score, best first, without controls and oracles."""
    kind = metric_class(metric)
    rivals = [row for row in results.rows if not row.method.is_control and row.method.family != "oracle"]
    rows = [row for row in rivals if math.isfinite(row.metrics.get(metric, math.nan))]
    return sorted(rows, key=lambda row: row.metrics[metric], reverse=kind is None or kind.greater_is_better)


def clear_best(results: ResultPart) -> str | None:
    """Return the best row if it is significantly better than the second best, else None.

    If the results do not compare the two rows, their intervals must not overlap.
    """
    metric = results.leading_metric
    rows = ranked_rows(results, metric)
    if len(rows) < 2:
        return None
    best, second = rows[:2]
    if pair := results.comparison(best.name, second.name, metric):
        return best.name if pair.is_significant else None
    ends, second_ends = best.interval(metric), second.interval(metric)
    is_apart = ends and second_ends and (ends[0] > second_ends[1] or second_ends[0] > ends[1])
    return best.name if is_apart else None


class _Judge:
    """Answers questions about the main row of a table."""

    def __init__(self, results: ResultPart, main: MethodInfo) -> None:
        self.results, self.main, self.metric = results, main, results.leading_metric

        self.control = next((row for row in results.rows if row.method.gain_of == main.name), None)
        self.best_free_rivals = [row for row in ranked_rows(results, self.metric) if row.method.is_free_rival]

    def is_personal(self) -> Answer:
        question = f"Is {self.main.name} personal?"
        return self._answer(question, self.control, add=f"{self.main.name}@{WRONG_USER}")

    def beats_no_history(self) -> Answer:
        question = f"Is {self.main.name} better than no history?"
        return self._answer(question, self.results.by_name.get(_INSTRUCTION), add=_INSTRUCTION)

    def beats_free_rivals(self) -> Answer:
        question = f"Is {self.main.name} better than rivals that cost nothing?"
        ranked, rivals = self.best_free_rivals, [row for row in self.results.rows if row.method.is_free_rival]
        best = next(iter(ranked), next(iter(rivals), None))
        remark = f", the best of {len(ranked)} such rows" if len(ranked) > 1 else ""
        return self._answer(question, best, add=self._free_rows(), remark=remark)

    def _answer(self, question: str, rival: ResultRow | None, *, add: str, remark: str = "") -> Answer:
        """Answer a question with the comparison to a rival; without a rival, name the rows to add."""
        if rival is None:
            rows = "rows" if "," in add else "row"
            return Answer(question, "Not measured", f"add the {rows} {add} to --methods.")
        missing = [n for n in (self.main.name, rival.name) if self.metric not in self.results.by_name[n].metrics]
        if missing:
            return Answer(question, "Not measured", f"{missing[0]} has no {self.metric}.")
        pair = self.results.comparison(self.main.name, rival.name, self.metric)
        if pair is None:
            names = f"{self.main.name} with {rival.name}"
            reason = f"the results do not compare {names}. Evaluate both in one table."
            return Answer(question, "Not measured", reason)
        scores = f"{self._score(self.main.name)} against {self._score(rival.name)} of {rival.name}{remark}"
        return Answer(question, _word(pair), f"{metric_title(self.metric)} {scores}; {_advantage(pair)}.")

    def _score(self, name: str) -> str:
        return number_cell(self.results.by_name[name].metrics[self.metric])

    def _free_rows(self) -> str:
        """Return the rows to add to a table without free rivals."""
        kind = metric_class(self.metric)
        if kind is not None and kind.needs_scale:
            return "user-mean,user-median,user-majority"
        return "user-majority,classical" if kind is not None and kind.needs_labels else "copy,user-words"


def _word(pair: Comparison) -> str:
    if not pair.is_significant or pair.difference == 0:
        return "Not shown"
    return "Yes" if pair.difference > 0 else "No"


def _advantage(pair: Comparison) -> str:
    if pair.deciding_p is None or math.isnan(pair.deciding_p):
        difference = number_cell(pair.difference, "+z.3f")
        return f"advantage {difference}, without a p: it needs finite scores of at least two users"
    return f"advantage {gain_cell(pair)}"


def _costs(diagnostics: Diagnostics) -> str:
    tokens, size = diagnostics.extra_prompt_tokens, diagnostics.bytes_per_user
    seconds = diagnostics.seconds_per_user
    parts = [
        "" if tokens is None else f"{number_cell(tokens, ',.1f').removesuffix('.0')} extra tokens in each prompt",
        "" if size is None else f"{bytes_cell(size)} for each user",
        "" if not seconds else f"{seconds_cell(seconds)} s to add a user",
    ]
    return ", ".join(filter(None, parts))
