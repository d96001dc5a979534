"""What a caller says of a log instead of leaving it to be found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LogOptions:
    """Each option that is given replaces what the log itself shows.

    Attributes:
        questions: columns of what was asked, in the order of the prompt.
        date_formats: formats of `strptime`, tried before the forms that are known.
        no_date: the rows are in order of time, whatever dates they have.
        kind: label, rating, text or chat.
        labels: the closed set of answers.
        prompt: the wording, with the names of `questions` in braces.
        name: of the task.
    """

    user: str | None = None
    questions: tuple[str, ...] = ()
    answer: str | None = None
    date: str | None = None
    id: str | None = None
    date_formats: tuple[str, ...] = ()
    no_date: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    kind: str | None = None
    labels: tuple[str, ...] = ()
    prompt: str | None = None
    name: str | None = None

    @property
    def named_columns(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.user, *self.questions, self.answer, self.date, self.id)))
