"""`train` on a terminal: what it shows, and how Ctrl-C leaves it."""

from __future__ import annotations

from pathlib import Path

from terminal import Terminal
from training_settings import TINY, write_small_data

CTRL_C = b"\x03"


def test_stopped_training_leaves_a_usable_terminal_and_resumes(tmp_path: Path) -> None:
    data = write_small_data(tmp_path / "data")
    settings = (*TINY, "controls=false", "validation_share=0.4", "epochs=200", "save_steps=1")
    words = ["-m", "personaplug", "train", "--data", data, "--out", tmp_path / "run", *settings]
    terminal = Terminal(words, columns=70)
    terminal.wait_until(lambda screen: "personal gain" in screen.text)
    shown = " ".join(terminal.text.split())
    assert "plug (seed 0)" in shown
    assert "held-out" in shown
    assert "samples/s" in shown
    terminal.send(CTRL_C)
    assert terminal.wait() == 130
    assert terminal.shows_cursor
    assert terminal.lines[-1] == "stopped; run the same command again to resume from the last checkpoint"
    assert "\u2501" not in terminal.text
    again = Terminal(words)
    again.wait_until(lambda screen: "personal gain" in screen.text)
    assert "plug (seed 0): resuming after step" in again.text
    again.send(CTRL_C)
    again.wait()
