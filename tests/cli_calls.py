"""Call commands that must succeed."""

from __future__ import annotations

from click.testing import CliRunner, Result

from personaplug.cli.main import main


def call(*words: object) -> Result:
    """Run `personaplug` with these words, and return its output."""
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done
