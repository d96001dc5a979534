"""The options that say what the columns of a log are, for `import` and `load`."""

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
    click.option("--user", metavar="COLUMN", help="Whose row it is."),
    click.option("--question", "questions", metavar="COLUMN", multiple=True, help="What was asked; may be repeated."),
    click.option("--answer", metavar="COLUMN", help="The user's answer, rating or text."),
    click.option("--date", metavar="COLUMN", help="When it was."),
    click.option("--id", metavar="COLUMN", help="A name of the row that no other row has."),
    click.option(
        "--date-format", "date_formats", multiple=True, help="Format of the dates, such as %d/%m/%Y; may be repeated."
    ),
    click.option("--no-date", is_flag=True, help="The rows are in time order; ignore their dates."),
    click.option("--encoding", help="Encoding of a file like CSV, such as windows-1251."),
    click.option("--delimiter", help="Delimiter of a file like CSV; tab for a tab."),
)
_TASK = (
    click.option("--kind", type=click.Choice(["label", "rating", "text", "chat"]), help="What the answers are."),
    click.option("--label", "labels", metavar="TEXT", multiple=True, help="One of the possible answers; repeated."),
    click.option("--prompt", help='Wording of the prompt: "… {question column}".'),
    click.option("--name", help="Name of the task.  [default: the file's]"),
)


def log_options(*, declares_task: bool) -> Callable[[Command], Command]:
    """Give a command the options of LogOptions, with those that declare a task or without."""

    def decorate(command: Command) -> Command:
        for option in reversed((*_COLUMNS, *(_TASK if declares_task else ()))):
            command = option(command)
        return command

    return decorate


def are_conversations(files: Sequence[Path], options: LogOptions, *, format: str | None) -> bool:
    """Return True for conversations, False for a log; refuse a mixture, and options of a log for conversations."""
    from personaplug.data.conversations import holds_conversations
    from personaplug.data.logs.options import LogOptions

    if format == "log":
        return False
    kinds = {True} if format else {holds_conversations(path) for path in files}
    if len(kinds) > 1:
        raise ConfigError(
            "Some files hold conversations, others rows of a log. Import each kind into a folder of its own."
        )
    if kinds == {True} and options != LogOptions():
        raise ConfigError("Options about columns, encoding and task are for logs; these files hold conversations.")
    return kinds == {True}
