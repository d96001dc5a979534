"""Options after markers in prompts, and the question before the options."""

from __future__ import annotations

from personaplug.baselines.regression import OptionFinder
from personaplug.data.records import Options

LABELS = ("[1]", "[2]")


def _prompt(title: str, *options: str) -> str:
    listed = " ".join(f"[{number}]: {option}" for number, option in enumerate(options, start=1))
    return f"For the paper {title} just answer with [1] or [2] now. {listed}"


def test_option_finder_removes_the_wording_that_all_questions_share() -> None:
    prompts = [_prompt("On Cats", "Lions", "Tigers: a list"), _prompt("About Dogs", "Wolves", "Hounds")]
    finder = OptionFinder(prompts, LABELS)
    assert finder.everywhere
    assert finder.find(prompts[0]) == Options("On Cats", ("Lions", "Tigers: a list"))
    assert finder.find(_prompt("On Cows\nand Calves", "a", "b")) == Options("On Cows and Calves", ("a", "b"))


def test_option_finder_question_is_empty_without_text_before_the_options() -> None:
    finder = OptionFinder([_prompt("On Cats", "a", "b"), _prompt("About Dogs", "a", "b")], LABELS)
    assert finder.find("[1]: a [2]: b") == Options("", ("a", "b"))


def test_option_finder_does_not_take_a_list_of_labels_for_options() -> None:
    labels = ("politics", "sports")
    prompts = ["categories: [politics, sports] article: politics: sports won.", "which of [sports, politics]: x"]
    assert not OptionFinder(prompts, labels).everywhere
    assert OptionFinder(prompts, labels).find(prompts[1]) is None
    assert not OptionFinder(["answer with [1] or [2]. text: x"], LABELS).everywhere
    assert not OptionFinder([], LABELS).everywhere


def test_option_finder_needs_nonempty_options_in_every_prompt() -> None:
    good = _prompt("On Cats", "Lions", "Tigers")
    assert not OptionFinder([good, "What is [1]?"], LABELS).everywhere
    assert not OptionFinder([good, _prompt("On Dogs", "Wolves", "")], LABELS).everywhere


def test_option_finder_markers_match_at_word_edges_only() -> None:
    finder = OptionFinder(["In BA. or so: A. one B. two C. three", "x A) one B) two C) three"], ("A", "B", "C"))
    assert finder.everywhere
    assert finder.find("In BA. or so: A. one B. two C. three") == Options("In BA. or so:", ("one", "two", "three"))
