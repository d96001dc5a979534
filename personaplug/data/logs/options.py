"""Options for reading a log."""

from __future__ import annotations

from dataclasses import dataclass

_ARGUMENTS = {"label": "labels=", "no-date": "date=None"}


@dataclass(frozen=True)
class LogOptions:
    """Options for reading a log. Each one replaces what the log itself shows.

    Attributes:
        questions: columns of what was asked, in the order of the prompt.
        image, vector: columns of pictures and of lists of numbers.
        detects_parts: also look for pictures and vectors in columns that the options do not name.
        date_formats: formats of `strptime`; they are tried before the known forms.
        no_date: the rows are in time order, whatever dates they have.
        kind: label, rating, text or chat.
        labels: the closed set of answers.
        prompt: the wording, with the names of `questions` in braces.
        name: of the task.
        in_python: messages name the arguments of `Plug.train`, not the options of a command.
    """

    user: str | None = None
    questions: tuple[str, ...] = ()
    answer: str | None = None
    date: str | None = None
    id: str | None = None
    image: str | None = None
    vector: str | None = None
    detects_parts: bool = True
    date_formats: tuple[str, ...] = ()
    no_date: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    kind: str | None = None
    labels: tuple[object, ...] = ()
    prompt: str | None = None
    name: str | None = None
    in_python: bool = False

    @property
    def named_columns(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.user, *self.questions, self.answer, self.date, self.id, *self.named_parts)))

    @property
    def named_parts(self) -> tuple[str, ...]:
        """The named columns of pictures and vectors."""
        return tuple(filter(None, (self.image, self.vector)))

    def option(self, name: str, value: str = "") -> str:
        """Return an option as its caller writes it: `--date-format` in a command, `date_format=` in Python."""
        if not self.in_python:
            return f"--{name} {value}".rstrip()
        argument = _ARGUMENTS.get(name, f"{name.replace('-', '_')}=")
        return f"{argument}{value!r}" if value else argument
