"""Pages of the reference, made from the code when the site is built: commands, settings, HTTP routes, Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from inspect import getdoc
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

_MARKDOWN = re.compile(r"([\\*_\[\]|#])")
_SCHEMA_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for uri, render in PAGES.items():
        files.append(File.generated(config, uri, content=render()))
    return files


def cli_page() -> str:
    """Return the page of all commands, from their definitions in click."""
    from personaplug.cli.main import main

    with click.Context(main, info_name="personaplug") as context:
        parts = ["# Commands", _prose(main.help or ""), _options_table(main, context)]
        for command, of_command in _commands(main, context):
            parts += [f"## {of_command.command_path}", f"`{_usage(command, of_command)}`"]
            parts += [*_help_of(command), _options_table(command, of_command)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    for name, command in group.commands.items():
        with click.Context(command, info_name=name, parent=context) as inner:
            if isinstance(command, click.Group):
                yield from _commands(command, inner)
            else:
                yield command, inner


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def _help_of(command: click.Command) -> list[str]:
    """Return the help of a command as paragraphs; the settings become links to their page."""
    from personaplug.config import SECTIONS

    text, _, settings = (command.help or "").partition("\n\n\b\n")
    sections = [section for section in SECTIONS if re.search(rf"^{section}: ", settings, flags=re.MULTILINE)]
    links = ", ".join(f"[{section}](settings.md#{section})" for section in sections)
    return [_prose(text), f"Sections of settings: {links}." if links else ""]


def _options_table(command: click.Command, context: click.Context) -> str:
    records = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    return _table(("option", "meaning"), ((f"`{names}`", _prose(text)) for names, text in records))


def settings_page() -> str:
    """Return the page of all settings, from the schema of a config file."""
    from personaplug.config import PRESETS, SECTIONS
    from personaplug.config_parsing import json_schema

    schema = json_schema()
    parts = [
        "# Settings",
        "Give settings as words (`learning_rate=3e-4 persona_tokens=4`) or in a YAML file (`--config FILE`). The words "
        "win. Because no two sections share a key, a key may be written without its section. "
        "`personaplug schema` prints the same as a JSON schema, which editors use to check a file.",
    ]
    for section, settings in SECTIONS.items():
        values = schema["$defs"][settings.__name__]["properties"]
        rows = (
            (f"`{name}`", f"`{_as_word(value['default'])}`", _values_of(value), _prose(value["description"]))
            for name, value in values.items()
        )
        parts += [
            f"## {section}",
            _prose(getdoc(settings) or ""),
            _table(("key", "default", "values", "meaning"), rows),
        ]
    default = asdict(PRESETS["default"])
    parts += ["## Presets", "A preset sets several keys at once (`preset=paper`). Other words change it further."]
    for preset, config in PRESETS.items():
        changes = [
            (f"`{section}.{key}`", f"`{_as_word(value)}`")
            for section, values in asdict(config).items()
            for key, value in values.items()
            if value != default[section][key]
        ]
        parts += [f"### preset={preset}", _table(("key", "value"), changes) if changes else "The defaults above."]
    return "\n\n".join(parts) + "\n"


def _values_of(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_values_of(schema['items'])}"
    bounds = [f"{word} {schema[name]:,}" for name, word in _SCHEMA_BOUNDS.items() if name in schema]
    return " ".join([str(schema["type"]), *bounds])


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def http_page() -> str:
    """Return the page of all HTTP routes, from the server's OpenAPI document."""
    from personaplug.serving.app import documented_app
    from personaplug.serving.routes.pages import describe_routes

    routes = describe_routes(documented_app())
    parts = [
        "# HTTP routes",
        f"{_prose(routes['info']['description'])} A running server has the same page at `/docs`, and the OpenAPI "
        "document at `/openapi.json`. What the routes do: [Serve live users](../serving.md).",
    ]
    for operation in routes["operations"]:
        parts += [f"## `{operation['method']} {operation['path']}`", f"{_prose(operation['summary'])}."]
        parts += [_prose(operation.get("description", "")), _parameters_table(operation)]
        parts += [f"Body: {_schema_link(operation['body'], routes['schemas'])}." if operation["body"] else ""]
    parts.append("## Bodies")
    for name, fields in routes["schemas"].items():
        rows = (
            (
                f"`{field['name']}`",
                _schema_link(field["type"], routes["schemas"]),
                _required(field["is_required"]),
                _prose(field["description"]),
            )
            for field in fields
        )
        parts += [f"### {name}", _table(("field", "type", "", "meaning"), rows)] if fields else []
    return "\n\n".join(filter(None, parts)) + "\n"


def _parameters_table(operation: dict[str, Any]) -> str:
    rows = [
        (f"`{each['name']}`", each["in"], _required(each.get("required", False)), _prose(each.get("description", "")))
        for each in operation.get("parameters", ())
        if each["name"] != "authorization"  # the key of an API; every route has it
    ]
    return _table(("parameter", "in", "", "meaning"), rows) if rows else ""


def _required(is_required: bool) -> str:
    return "required" if is_required else ""


def _schema_link(name: str, schemas: dict[str, Any]) -> str:
    return re.sub(r"\w+", lambda word: f"[{word[0]}](#{word[0].lower()})" if schemas.get(word[0]) else word[0], name)


def python_page() -> str:
    """Return the page of the public names, for mkdocstrings to fill in from their docstrings."""
    import personaplug

    homes = sorted((str(getattr(personaplug, name).__module__), name) for name in personaplug.__all__)
    parts = ["# Python", "The names that `from personaplug import …` gives, by the room of the package they live in."]
    for room, names in groupby(homes, key=lambda home: home[0].split(".")[1]):
        parts.append(f"## {room}")
        parts += [f"::: {module}.{name}" for module, name in names]
    return "\n\n".join(parts) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = tuple(head)
    lines: list[Iterable[str]] = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _prose(text: str) -> str:
    """Return a text whose characters Markdown would read as markup are escaped, but for `code`; lines are joined."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return "\n\n".join(_escaped(paragraph) for paragraph in paragraphs)


def _escaped(text: str) -> str:
    pieces = text.split("`")
    pieces[::2] = [_MARKDOWN.sub(r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2]]
    return "`".join(pieces)


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/settings.md": settings_page,
    "reference/http.md": http_page,
    "reference/python.md": python_page,
}
