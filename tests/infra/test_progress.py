"""Progress of stages: bars on a terminal, bounded lines elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from terminal import Terminal

from personaplug.infra import progress
from personaplug.infra.progress import Progress, show_progress

STAGES = """
import logging, sys, warnings
from personaplug.infra.progress import Progress
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
with Progress("outer (seed 0)", total=1000, unit="steps") as outer:
    outer.advance(600, note="loss 1.234, held-out 1.345 (best 1.301), personal gain +0.120 nats, 35.2 samples/s")
    logging.info("a line of the log")
    warnings.warn("a warning")
    print("a result")
    with Progress("inner", total=None) as inner:
        inner.advance(1234)
        input()
    logging.info("another line of the log")
    outer.advance(400, note="loss 0.5")
logging.info("the last line")
"""
BAR = "\u2501"


@pytest.mark.parametrize("columns", [60, 100])
def test_terminal_shows_bars_below_whole_log_lines(columns: int) -> None:
    terminal = Terminal(["-c", STAGES], columns=columns, echoes=False)
    # A long time left shortens the title.
    terminal.wait_until(lambda screen: "1,234 items" in screen.text and screen.text.count("outer") == 1)
    assert not terminal.shows_cursor
    above, below = terminal.text.split("outer")
    assert "a line of the log\n" in above
    assert "UserWarning: a warning\n" in above
    assert "a result\n" in above
    outer, *note, inner = below.splitlines()
    assert BAR in outer
    assert "600/1,000 steps" in outer
    assert "inner" in inner
    assert " ".join(" ".join(note).split()) == (
        "loss 1.234, held-out 1.345 (best 1.301), personal gain +0.120 nats, 35.2 samples/s"
    )
    terminal.send(b"\n")
    assert terminal.wait() == 0
    assert terminal.shows_cursor
    assert BAR not in terminal.text
    assert terminal.lines[-4].startswith("inner: 1,234 items in ")
    assert terminal.lines[-3] == "another line of the log"
    assert terminal.lines[-2].startswith("outer (seed 0): 1,000 steps in ")
    assert terminal.lines[-2].endswith(", loss 0.5")
    assert terminal.lines[-1] == "the last line"


def test_results_in_a_file_stay_in_the_file(tmp_path: Path) -> None:
    with (tmp_path / "results").open("w") as file:
        terminal = Terminal(["-c", STAGES], stdout=file)
        terminal.wait_until(lambda screen: "1,234 items" in screen.text)
        terminal.send(b"\n")
        assert terminal.wait() == 0
    assert (tmp_path / "results").read_text() == "a result\n"
    assert "a result" not in terminal.text


def test_dumb_terminal_gets_no_bars() -> None:
    terminal = Terminal(["-c", STAGES], variables={"TERM": "dumb"})
    terminal.wait_until(lambda screen: "a warning" in screen.text)
    terminal.send(b"\n")
    assert terminal.wait() == 0
    assert b"\x1b" not in terminal.output
    assert "another line of the log" in terminal.lines


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ValueError"])
def test_failed_stage_leaves_no_bar_and_shows_the_cursor(error: str) -> None:
    code = (
        f"from personaplug.infra.progress import Progress\nwith Progress('s', total=2) as s: s.advance(); raise {error}"
    )
    terminal = Terminal(["-c", code])
    assert terminal.wait() != 0
    assert terminal.shows_cursor
    assert BAR not in terminal.text
    assert "s: 1 items" not in terminal.text
    assert terminal.lines[-1].startswith(error)


def test_bar_of_a_suspended_generator_can_be_removed() -> None:
    code = """
from personaplug.infra.progress import Progress, stop_bars
def batches():
    with Progress("suspended", total=2) as stage:
        for _ in range(2):
            yield
            stage.advance()
held = batches()
next(held), next(held)
stop_bars()
print("after the bar")
input()
with Progress("next", total=2) as stage:
    stage.advance()
    held.close()
    input()
"""
    terminal = Terminal(["-c", code], echoes=False)
    terminal.wait_until(lambda screen: "after the bar" in screen.text)
    assert terminal.shows_cursor
    assert terminal.lines == ["after the bar"]
    terminal.send(b"\n")
    terminal.wait_until(lambda screen: "1/2 items" in screen.text)
    terminal.send(b"\n")
    assert terminal.wait() == 0
    assert terminal.shows_cursor
    assert terminal.lines[0] == "after the bar"
    assert terminal.lines[1].startswith("next: 1 items in ")


def _stage() -> None:
    with Progress("train", total=4, start=1, unit="steps") as stage:
        stage.advance(note="loss 1.0")
        stage.advance(2)


def test_lines_without_a_terminal_are_rare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _stage()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    _stage()
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "train: 2/4 steps, loss 1.0, 0 s left"
    assert second == "train: 4/4 steps, loss 1.0"
    assert last == "train: 3 steps in 0 s, loss 1.0"


def test_only_the_main_process_reports_and_only_if_it_is_not_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    show_progress(False)
    try:
        _stage()
    finally:
        show_progress(True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    _stage()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    _stage()
    assert len(capsys.readouterr().err.splitlines()) == 3
