"""Declare the task of a log, with a wording of its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.data.event_log import as_literal
from personaplug.data.logs.answers import AnswerKind
from personaplug.data.records import PREFERENCE, REJECTED
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT, parse_task
from personaplug.errors import ConfigError

_MAX_LISTED = 300  # characters of labels in a prompt
_RESERVED = {"id", "date", PREFERENCE, REJECTED}
_REQUESTS = {"question", "prompt", "query", "instruction", "input", "request", "message", "frage", "pregunta"}


@dataclass(frozen=True)
class Declaration:
    """A task, the column of each of its item fields except the answer, and the prompt with these fields in braces."""

    task: Task
    fields: dict[str, str]
    prompt: str


def declare(
    name: str,
    *,
    questions: Sequence[str],
    answer: str,
    answers: AnswerKind,
    image: str | None = None,
    vector: str | None = None,
    prompt: str | None = None,
) -> Declaration:
    """Declare the task of a log.

    In a chat, the request itself is the prompt. Any other task gets a wording that ends with the fields, so the first
    field's name is the marker of the query.

    Args:
        questions, answer, image, vector: columns.
        prompt: a wording in place of the default one.
    """
    parts = {"image_field": image and field_name(image), "vector_field": vector and field_name(vector)}
    if answers.kind == "chat":
        field, _ = CHAT.item_fields
        task = parse_task({"name": name, "kind": "chat", **parts})
        return Declaration(task, {field: questions[0]}, prompt or f"{{{field}}}")
    fields = {field_name(column): column for column in questions}
    answer_field = field_name(answer)
    if prompt is None:
        prompt = _wording(list(fields), answer_field, answers)
    elif not any(f"{{{field}" in prompt for field in fields):
        raise ConfigError(f"The prompt does not show what is asked. Write {{{next(iter(fields))}}} where it belongs.")
    marker = _marker(prompt)
    declared: dict[str, Any] = {
        "name": name,
        "kind": answers.kind,
        "item_fields": list(fields),
        "answer_field": answer_field,
        "query_after": marker,
        **parts,
    }
    if answers.labels:
        declared["labels"] = list(answers.labels)
    return Declaration(parse_task(declared), fields, prompt)


def declare_for(task: Task, *, questions: Sequence[str]) -> Declaration:
    """Declare a run's task for the columns of a log.

    The prompt holds the query alone, because it serves to read histories, not to ask.
    """
    names = [name for name in task.field_names if name != task.answer_field]
    if task.answer_field is None or task.query_pattern or len(names) != len(questions):
        raise ConfigError(
            f"Items of {task.name} have the fields {', '.join(task.field_names)}, and the log gives "
            f"{len(questions)} columns for them. Name a column for each field by --question, in this order. For items "
            f"of another form, write a data folder in Python and give it by --data."
        )
    prompt = f"{as_literal(task.query_after)}{{{names[0]}}}"
    return Declaration(task, dict(zip(names, questions, strict=True)), prompt)


def field_name(column: str) -> str:
    """Return the name of an item's field for a column, without characters that placeholders cannot hold."""
    name = " ".join(re.sub(r"[{}\[\]:!.]", " ", column).split()) or "field"
    return f"{name} column" if name in _RESERVED else name


def is_request(questions: Sequence[str]) -> bool:
    """Return True if one column holds requests, as its name says."""
    return len(questions) == 1 and bool(_REQUESTS & set(re.findall(r"[^\W_]+", questions[0].casefold())))


def _wording(fields: Sequence[str], answer: str, answers: AnswerKind) -> str:
    shown = " ".join(f"{field}: {{{field}}}" for field in fields)
    opening = _request(answer, answers)
    if f"{fields[0]}: " in opening:  # the query starts after the first occurrence of this marker
        opening = _request(answer, answers, is_listed=False)
    return f"{opening} {shown}"


def _request(answer: str, answers: AnswerKind, *, is_listed: bool = True) -> str:
    labels = answers.labels
    if answers.kind == "rating":
        return f"Which {answer} from {labels[0]} to {labels[-1]} would this user give? Answer with the number alone."
    if answers.kind == "text":
        return f"Write the {answer} as this user would write it."
    listed = as_literal(", ".join(labels))
    if not is_listed or len(listed) > _MAX_LISTED:
        return f"Which {answer} would this user choose? Answer with it alone."
    return f"Which {answer} would this user choose? Answer with one of: {listed}."


def _marker(prompt: str) -> str:
    """Return the last sentence before the first placeholder, or the whole text before it if that sentence recurs."""
    before = re.split(r"(?<!\{)\{(?!\{)", prompt, maxsplit=1)[0].replace("{{", "{").replace("}}", "}")
    sentence = re.split(r"[.?!\n]", before)[-1].lstrip()
    return sentence if sentence.strip() and before.count(sentence) == 1 else before
