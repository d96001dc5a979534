"""Parse a Config from YAML and `key=value` words; write it as YAML, help text and JSON schema.

Keys may be full (`training.learning_rate`) or bare (`learning_rate`), because key names are unique across sections.
`preset` selects the config that the other settings change.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from personaplug.config import PRESETS, SECTIONS, Config
from personaplug.errors import ConfigError, MissingData, nearest

_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_BOUNDS = {"ge": "from", "gt": "above", "le": "to"}
_LISTS = ("training.seeds",)
_PRESET = "preset"


def load_config(
    path: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    base: Config | None = None,
    ignored: Collection[str] = (),
) -> Config:
    """Build a Config from a YAML file and `key=value` words. Words override the file; later words override earlier.

    Args:
        path: a YAML file of sections (`training: {epochs: 3}`) or bare keys (`epochs: 3`).
        overrides: `key=value` words of a command line.
        base: the config to change; None = the defaults.
        ignored: settings that are skipped in the file, with their section.
    Raises:
        MissingData: if the file does not exist.
        ConfigError: for an unknown key, or a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update({key: value for key, value in flatten(read_yaml(Path(path))).items() if key not in ignored})
        _check_given_once(values, path)
    return with_values(base or Config(), values | parse_words(overrides))


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """Return the values of `key=value` words by key; later words override earlier ones.

    Raises:
        ConfigError: for a word without an equals sign, or a value that is not valid YAML.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"Settings must have the form key=value; found {word!r}.")
        values[key.strip()] = _parse_yaml(text, source=f"the value of {key.strip()}")
    return values


def _check_given_once(values: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a setting that a file gives twice, with and without its section."""
    keys = [".".join(_locate(key)) for key in values if key != _PRESET]
    if duplicates := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{path} gives {duplicates[0]} twice. Give it once.")


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with some settings replaced and validated. A `preset` replaces plug and training settings first.

    Raises:
        ConfigError: for an unknown key, or a value of the wrong type or out of range.
    """
    settings = dict(values)
    if _PRESET in settings:
        preset = _preset(settings.pop(_PRESET))
        config = replace(config, plug=preset.plug, training=preset.training)
    changes: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, name = _locate(key)
        changes.setdefault(section, {})[name] = _converted(value, key=f"{section}.{name}")
    return replace(config, **{section: _replaced(config, section, new) for section, new in changes.items()})


def to_yaml(config: Config, *sections: str) -> str:
    """Return a config, or some sections of it, as YAML that `load_config` parses to an equal config."""
    tree = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in asdict(config).items()
        if not sections or section in sections
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def changed_settings(config: Config, *sections: str) -> str:
    """Return the settings that differ from the nearest preset, in some or all sections, as command-line words."""
    candidates: list[list[str]] = []
    for name, preset in PRESETS.items():
        base = asdict(preset)
        words = [
            f"{key}={shlex.quote(_as_word(value))}"
            for section, values in asdict(config).items()
            for key, value in values.items()
            if (not sections or section in sections) and value != base[section][key]
        ]
        candidates.append(words if name == "default" else [f"{_PRESET}={name}", *words])
    shortest = min(candidates, key=len)
    return " ".join(shortest) or "the defaults"


def describe(sections: Sequence[str]) -> str:
    """Return the help text of some sections: each key with its default, meaning and range."""
    lines = [f"preset={' | '.join(PRESETS)}: initial values of plug and training"] if "plug" in sections else []
    for section in sections:
        lines.append(f"{section}: {(SECTIONS[section].__doc__ or '').strip()}")
        for name, field in settings_of(section).items():
            lines.append(f"  {name}={_as_word(getattr(SECTIONS[section](), name))}")
            lines.append(f"      {field.description}{_range_text(field)}")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file with sections: keys, types, ranges and descriptions."""
    schema = TypeAdapter(Config).json_schema()
    schema["properties"] = {_PRESET: {"enum": list(PRESETS)}, **schema["properties"]}
    return schema


def settings_of(section: str) -> dict[str, FieldInfo]:
    """Return the settings of a section by name, with their types, ranges and descriptions."""
    fields: dict[str, FieldInfo] = SECTIONS[section].__pydantic_fields__
    return fields


def _preset(name: object) -> Config:
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; found {name!r}.")
    return PRESETS[name]


def _locate(key: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    pairs = [(each_section, each_name) for each_section in SECTIONS for each_name in settings_of(each_section)]
    for each_section, each_name in pairs:
        if each_name == name and section in ("", each_section):
            return each_section, each_name
    names = {_PRESET, *(n for _, n in pairs), *(f"{s}.{n}" for s, n in pairs if section)}
    raise ConfigError(f"There is no setting {key!r}; {nearest(key, names)}")


def _converted(value: Any, *, key: str) -> Any:
    """Convert a YAML value to the setting's type if its form is another valid one, such as `1e-3` for a number."""
    if key in _LISTS:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if not items:
            raise ConfigError(f"{key} needs at least one value, found none.")
        numbers = tuple(_parse_yaml(str(item), source=key) for item in items)
        if any(number in numbers[:index] for index, number in enumerate(numbers)):
            raise ConfigError(f"{key} contains a value twice: {_as_word(numbers)}. Give each value once.")
        return numbers
    expected = _type_of(key)
    if expected is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 parses 1e-3 as a string, because it has no dot
        except ValueError:
            return value
    if expected is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _type_of(key: str) -> Any:
    section, _, name = key.partition(".")
    return settings_of(section)[name].annotation


def _replaced(config: Config, section: str, changes: Mapping[str, Any]) -> Any:
    try:
        return replace(getattr(config, section), **changes)
    except ValidationError as error:
        raise ConfigError(_sentence(error, section)) from None


def _sentence(error: ValidationError, section: str) -> str:
    """Return an error message for the first invalid setting."""
    first = error.errors(include_url=False)[0]
    name, value = str(first["loc"][0]), first["input"]
    field = settings_of(section)[name]
    if get_origin(field.annotation) is Literal:
        return f"{section}.{name} must be one of {', '.join(get_args(field.annotation))}; found {value!r}."
    if first["type"] in ("greater_than", "greater_than_equal", "less_than_equal"):
        return f"{section}.{name} must be a number{_range_text(field)}; found {value}."
    expected = int if f"{section}.{name}" in _LISTS else field.annotation
    return f"{section}.{name} must be {_TYPE_NAMES[expected]}; found {value!r}."


def _range_text(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return f" [{' | '.join(get_args(field.annotation))}]"
    bounds = list(field.metadata)
    if not bounds and get_origin(field.annotation) is tuple:
        bounds = list(get_args(field.annotation)[0].__metadata__[0].metadata)
    limits = {name: getattr(bound, name) for bound in bounds for name in _BOUNDS if hasattr(bound, name)}
    parts = [f"{word} {limits[name]}" for name, word in _BOUNDS.items() if name in limits]
    return f" [{' '.join(parts)}]" if parts else ""


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_yaml(path: Path) -> Any:
    """Return the parsed content of a YAML file.

    Raises:
        MissingData: if the file does not exist.
        ConfigError: if it is not valid YAML.
    """
    if not path.is_file():
        raise MissingData(f"The config file {path} does not exist.")
    try:
        return _parse_yaml(path.read_text(encoding="utf-8-sig"), source=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys; the YAML library would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if duplicates := [key for index, key in enumerate(keys) if key in keys[:index]]:
            raise yaml.YAMLError(f"the key {duplicates[0]!r} is given twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader) if text else text  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, a number with too many digits
        raise ConfigError(f"{source} is not valid YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply. Use fewer levels.") from None


def flatten(tree: Any) -> dict[str, Any]:
    """Convert sections (`training: {epochs: 3}`) and bare settings to a flat mapping for `with_values`.

    Raises:
        ConfigError: if `tree` is not a mapping.
    """
    if tree in (None, ""):
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("A config file must contain `section: {key: value}` or `key: value`; found something else.")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS and (value is None or isinstance(value, dict)):
            flat.update({f"{key}.{name}": inner for name, inner in (value or {}).items()})
        else:
            flat[str(key)] = value
    return flat
