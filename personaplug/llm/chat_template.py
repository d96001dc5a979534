"""The chat template of a tokenizer, as tokens around the texts of messages.

A template is rendered with placeholders and checked once. It must print a message's text unchanged, or without outer
white space. A template that prints today's date prints a recorded date instead.
"""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from personaplug.errors import ConfigError
from personaplug.llm.text_tokenizer import TextTokenizer, is_mistral_common

PLACEHOLDER = "personaplugplaceofthetext"
_PROBE = ' \n\tI\tdon\'t know: <b>"5 > 3"</b> & {{ x }},  naïve 你好 🙂\n\n<think>a</think> tail \n'
_FORMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
_MAX_SHOWN_ROLES = 10  # in an error message
_DATE_CALL = "strftime_now"  # the template function for today's date


@dataclass(frozen=True)
class Frame:
    """Tokens around M texts.

    Attributes:
        parts: tokens before the first text and after each (M + 1).
        leads: text that is tokenized together with each message (M): the template's space before it, or nothing.
    """

    parts: list[list[int]]
    leads: list[str]


class ChatTemplate(ABC):
    """Tokens around messages. Create one with `of`.

    Attributes:
        writes_date: True if the template prints a date.
        form: maps the text of a message to the text that the template prints, which may be stripped.
    """

    writes_date = False
    form: Callable[[str], str] = str

    @staticmethod
    def of(tokenizer: Any, texts: TextTokenizer, *, day: str) -> ChatTemplate | None:
        """Return a tokenizer's template, or None if it has none; `day` is the ISO date that the template prints.

        Raises:
            ConfigError: if the template changes or repeats a user's text.
        """
        if is_mistral_common(tokenizer):
            return _MistralTemplate(tokenizer, texts)
        return _JinjaTemplate(tokenizer, texts, day=day) if getattr(tokenizer, "chat_template", None) else None

    @abstractmethod
    def frame(self, roles: Sequence[str]) -> Frame:
        """Return the tokens before the first message and after each.

        Raises:
            ConfigError: if the template rejects these roles, or does not print the messages one by one in order.
        """


class _JinjaTemplate(ChatTemplate):
    def __init__(self, tokenizer: Any, texts: TextTokenizer, *, day: str) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        source = tokenizer.get_chat_template()
        self.writes_date = _DATE_CALL in source
        self._source = dated_template(source, day) if self.writes_date else source
        self.form = self._form()

    def frame(self, roles: Sequence[str]) -> Frame:
        parts = self._parts(roles)
        leads = [" " if part.endswith(" ") else "" for part in parts[:-1]]
        bare = [part.removesuffix(lead) for part, lead in zip(parts, [*leads, ""], strict=True)]
        encode = self._texts.encode_template
        return Frame([encode(part, inside=index > 0) for index, part in enumerate(bare)], leads)

    def _parts(self, roles: Sequence[str]) -> list[str]:
        texts = [f"{PLACEHOLDER}{index:05d}" for index in range(len(roles))]
        parts = re.split(f"{PLACEHOLDER}(\\d{{5}})", self._render(roles, texts))
        _check_order([int(index) for index in parts[1::2]], len(roles))
        return parts[::2]

    def _render(self, roles: Sequence[str], texts: Sequence[str]) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        options = {"add_generation_prompt": True, "enable_thinking": False, "chat_template": self._source}
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template is a program that may raise any error
            raise _rejected(roles) from error

    def _form(self) -> Callable[[str], str]:
        head, tail = self._parts(["user"])
        texts = [_PROBE, _PROBE * 50]
        rendered = [self._render(["user"], [text]) for text in texts]
        for form in _FORMS:
            if rendered == [head + form(text) + tail for text in texts]:
                return form
        raise _changes_text()


class _MistralTemplate(ChatTemplate):
    """The template of mistral-common, which returns only tokens; the tokens of the texts are located in them."""

    def __init__(self, tokenizer: Any, texts: TextTokenizer) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        head, tail = self.frame(["user"]).parts
        ids = self._ids(["user"], [_PROBE])
        for form in _FORMS:
            if ids == [*head, *texts.encode(form(_PROBE)), *tail]:
                self.form = form
                return
        raise _changes_text()

    def frame(self, roles: Sequence[str]) -> Frame:
        texts = [f"{PLACEHOLDER}{index:05d}" for index in range(len(roles))]
        rest, parts = self._ids(roles, texts), []
        for ids in self._texts.encode_many(texts):
            start = find_sequence(rest, ids)
            if start is None:
                raise _not_in_order()
            parts.append(rest[:start])
            rest = rest[start + len(ids) :]
        return Frame([*parts, rest], [""] * len(roles))

    def _ids(self, roles: Sequence[str], texts: Sequence[str]) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            return list(self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        except Exception as error:  # mistral-common raises errors of several types
            raise _rejected(roles) from error


def dated_template(source: str, day: str) -> str:
    """Return the template with a fixed day in place of today's date."""
    template_date = date.fromisoformat(day)
    values = {
        f"%{flag}{sign}": template_date.strftime(f"%{flag}{sign}")
        for flag in ("", "-")
        for sign in string.ascii_letters
    }
    quoted = {directive: value.replace("'", "\\'") for directive, value in values.items() if value != directive}
    filters = "".join(f" | replace('{directive}', '{value}')" for directive, value in quoted.items())
    return f"{{%- macro {_DATE_CALL}(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{source}"


def find_sequence(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Return the index at which `part` begins in `ids`, or None."""
    return next((start for start in range(len(ids)) if list(ids[start : start + len(part)]) == list(part)), None)


def _check_order(order: Sequence[int], count: int) -> None:
    if list(order) != list(range(count)):
        raise _not_in_order()


def _not_in_order() -> ConfigError:
    return ConfigError(
        "The model's chat template does not print these messages one by one in order. Use other roles, or a model "
        "whose template supports them."
    )


def _rejected(roles: Sequence[str]) -> ConfigError:
    names = ", ".join([*roles[:_MAX_SHOWN_ROLES], *(["…"] if len(roles) > _MAX_SHOWN_ROLES else [])])
    return ConfigError(
        f"The model's chat template rejects messages with the roles {names} in this order. Use roles that it supports, "
        f"for example user, assistant, user."
    )


def _changes_text() -> ConfigError:
    return ConfigError(
        "The model's chat template must print a user's text once and unchanged, but it changes or repeats the text. "
        "Put a chat_template.jinja that prints {{ message.content }} into the model's folder."
    )
