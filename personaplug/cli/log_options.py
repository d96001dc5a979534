"""The options of `import` and `load` that describe the columns of a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from personaplug.errors import ConfigError

if TYPE_CHECKING:
    from personaplug.data.logs.options import LogOptions

Command = TypeVar("Command", bound=Callable[..., Any])

_COLUMNS = (
    click.option("--user", metavar="COLUMN", help="Column with the user of the row."),
    click.option(
        "--question", "questions", metavar="COLUMN", multiple=True, help="Column with the question; may be repeated."
    ),
    click.option("--answer", metavar="COLUMN", help="Column with the user's answer, rating or text."),
    click.option("--date", metavar="COLUMN", help="Column with the date of the row."),
    click.option("--id", metavar="COLUMN", help="Column with a unique name of the row."),
    click.option("--image", metavar="COLUMN", help="Column with a picture: bytes, a data URL, or a path."),
    click.option("--vector", metavar="COLUMN", help="Column with a list of numbers, an embedding of the item."),
    click.option(
        "--date-format", "date_formats", multiple=True, help="Format of the dates, such as %d/%m/%Y; may be repeated."
    ),
    click.option("--no-date", is_flag=True, help="Ignore dates; the rows are in order of time."),
    click.option("--encoding", help="Encoding of CSV and TSV files, such as windows-1251."),
    click.option("--delimiter", help="Delimiter of CSV and TSV files; `tab` for a tab."),
)
_TASK = (
    click.option("--kind", type=click.Choice(["label", "rating", "text", "chat"]), help="Kind of the answers."),
    click.option("--label", "labels", metavar="TEXT", multiple=True, help="A possible answer; repeat for each answer."),
    click.option("--prompt", help='Template of the prompt: "… {question column}".'),
    click.option("--name", help="Name of the task.  [default: the name of the file]"),
)


def log_options(*, declares_task: bool) -> Callable[[Command], Command]:
    """Add the fields of LogOptions as options to a command.

    Args:
        declares_task: also add the options that declare a task.
    """

    def decorate(command: Command) -> Command:
        for option in reversed((*_COLUMNS, *(_TASK if declares_task else ()))):
            command = option(command)
        return command

    return decorate


def are_conversations(files: Sequence[Path], options: LogOptions, *, format: str | None) -> bool:
    """Return whether the files hold conversations; refuse a mixture, and log options for conversations."""
    from personaplug.data.conversations import holds_conversations
    from personaplug.data.logs.options import LogOptions

    if format == "log":
        return False
    kinds = {True} if format else {holds_conversations(path) for path in files}
    if len(kinds) > 1:
        raise ConfigError(
            "Some files hold conversations, others rows of a log. Import conversations and logs into separate folders."
        )
    if kinds == {True} and options != LogOptions():
        raise ConfigError(
            "The files hold conversations, but options for columns, encoding and task apply only to logs. Remove them."
        )
    return kinds == {True}
