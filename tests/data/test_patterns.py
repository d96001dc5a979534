"""Patterns of a task.json match as in Python, but in linear time."""

from __future__ import annotations

import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaplug.data import LAMP_TASKS
from personaplug.data.parsing import Flaw, options_of, query_of
from personaplug.data.patterns import MAX_MATCHED_LENGTH, group_count, search
from personaplug.data.task_registry import parse_task
from personaplug.errors import ConfigError

CITATION = LAMP_TASKS["LaMP_1"]
FIRST, SECOND = 'without explanation. [1]: "', '" [2]: "'


@given(st.lists(st.sampled_from([FIRST, SECOND, '"', " ", "\n", "x", "é😀", "[1]", "\\"]), max_size=12).map("".join))
def test_built_in_pattern_finds_what_python_finds(text: str) -> None:
    expected, match = re.search(CITATION.query_pattern, text, re.DOTALL), search(CITATION.query_pattern, text)
    assert (match and (match.groups(), match.start(1))) == (expected and (expected.groups(), expected.start(1)))


@pytest.mark.parametrize(
    "prompt",
    [FIRST * 500 + SECOND * 500 + "x", (FIRST + SECOND) * 1500 + "x", FIRST + SECOND + '" ' * 40_000 + "x",
     FIRST + SECOND + '"' + " " * 90_000 + "x"],
    ids=["all first", "pairs", "quotes", "blanks"],
)  # fmt: skip
def test_built_in_pattern_takes_linear_time(prompt: str) -> None:
    start = time.perf_counter()
    with pytest.raises(Flaw, match="does not match"):
        query_of(CITATION, prompt)
    assert options_of(CITATION, prompt) is None
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(.*)(.*)(.*)(.*)z", r"((x|xx)+)$", r"(?:(x{1,10}){1,10})+b"])
def test_pattern_that_takes_python_forever_is_matched(pattern: str) -> None:
    task = parse_task({"name": "T", "kind": "text", "item_fields": ["t"], "query_pattern": pattern})
    results: list[str] = []

    def find() -> None:
        try:
            results.append(query_of(task, "x" * MAX_MATCHED_LENGTH))
        except Flaw as flaw:
            results.append(str(flaw))

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(60)
    assert results


def test_text_too_long_for_a_pattern_is_a_flaw() -> None:
    with pytest.raises(Flaw, match="has 100,001 characters"):
        query_of(CITATION, "x" * (MAX_MATCHED_LENGTH + 1))
    assert query_of(LAMP_TASKS["LaMP_3"], "review: " + "x" * 10**6)


@pytest.mark.parametrize(
    "pattern",
    ["(", r"(a)\1", "(?<=a)(b)", "(?=a)(b)", "(((a{1000}){1000}){1000})", "(a{99999})", "(.{0,1000}){9}",
     "(" + "a" * 1000 + ")", "(\ud800)"],
    ids=ascii,
)  # fmt: skip
def test_pattern_that_is_too_large_or_not_linear_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="'query_pattern' is not a valid RE2 regular expression: "):
        parse_task({"name": "T", "kind": "text", "item_fields": ["t"], "query_pattern": pattern})


@pytest.mark.parametrize(
    ("pattern", "text", "groups"),
    [
        (r"q: (.*)\Z", "q: a\nb", ("a\nb",)),
        (r"(a)\\Z", "a\\Z", ("a",)),
        (r"(a)\\\Z", "ba\\", ("a",)),
        (r"q: (.*?)(?: opt: (.*))?$", "q: é", ("é", None)),
        (r"\Z(x?)", "", ("",)),
    ],
)
def test_pattern_in_python_syntax_has_the_same_matches(pattern: str, text: str, groups: tuple[str | None, ...]) -> None:
    assert search(pattern, text).groups() == groups == re.search(pattern, text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert group_count(pattern) == len(groups)


def test_lone_surrogate_is_a_flaw() -> None:
    with pytest.raises(Flaw, match="not valid Unicode"):
        search("(a)", "a\ud800")


def test_many_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="200 groups; at most 32"):
        group_count("(.*)" * 200)
