"""A Config in text: from a YAML file and `key=value` words, to YAML, to the help of the command line.

Keys are written in full (`training.learning_rate`) or, since no two sections share one, bare (`learning_rate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from personaplug.config import SECTIONS, Config
from personaplug.errors import ConfigError, MissingData, nearest

_IN_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def load_config(path: str | Path | None = None, *, overrides: Iterable[str] = (), base: Config | None = None) -> Config:
    """Build a Config from a YAML file and `key=value` words; later ones win.

    Args:
        path: a YAML file of sections (`training: {epochs: 3}`) or bare keys (`epochs: 3`).
        overrides: words as typed on a command line.
        base: what to start from; the defaults otherwise.
    Raises:
        MissingData: if the file does not exist.
        ConfigError: for an unknown key, a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(flatten(read_yaml(Path(path))))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"Settings are written key=value; found {word!r}.")
        values[key.strip()] = _parse_yaml(text, source=f"the value of {key.strip()}")
    return with_values(base or Config(), values)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with some settings replaced, each checked.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type or out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = _locate(key)
        changes.setdefault(section, {})[name] = _checked(section, name, value)
    return replace(config, **{s: replace(getattr(config, s), **new) for s, new in changes.items()})


def to_yaml(config: Config) -> str:
    """The whole of a config as YAML that `load_config` reads back to an equal one."""
    plain = {
        s: {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()} for s, part in asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def describe(sections: Sequence[str]) -> str:
    """The help text of some sections: each key with its default, meaning and range."""
    lines = []
    for section in sections:
        lines.append(f"{section}: {(SECTIONS[section].__doc__ or '').strip()}")
        for option in fields(SECTIONS[section]):
            lines.append(f"  {option.name}={_shown(_default(option))}")
            lines.append(f"      {option.metadata['help']}{_range_text(option)}")
    return "\n".join(lines)


def _default(option: Field[Any]) -> Any:
    return getattr(Config(), _locate(option.name)[0]).__getattribute__(option.name)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _range_text(option: Field[Any]) -> str:
    meta = option.metadata
    if meta["choices"]:
        return f" [{' | '.join(meta['choices'])}]"
    parts = [
        f"{word} {meta[key]}"
        for key, word in (("low", "from"), ("above", "above"), ("high", "to"))
        if meta[key] is not None
    ]
    return f" [{' '.join(parts)}]" if parts else ""


def _locate(key: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    known = {(s, f.name) for s, kind in SECTIONS.items() for f in fields(kind)}
    for found in known:
        if found == (section, name) or (not section and found[1] == name):
            return found
    names = {n for _, n in known} | {f"{s}.{n}" for s, n in known if section}
    raise ConfigError(f"There is no setting {key!r}; {nearest(key, names)}")


def _checked(section: str, name: str, value: Any) -> Any:
    option = next(f for f in fields(SECTIONS[section]) if f.name == name)
    wanted = get_type_hints(SECTIONS[section])[name]
    converted = _convert(value, wanted, key=f"{section}.{name}")
    several = converted if isinstance(converted, tuple) else (converted,)
    if len(set(several)) < len(several):
        raise ConfigError(f"{section}.{name} names a value twice: {_shown(converted)}. Name each once.")
    for single in several:
        _check_range(single, option, key=f"{section}.{name}")
    return converted


def _convert(value: Any, wanted: Any, *, key: str) -> Any:
    if wanted == tuple[int, ...]:
        several = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if not several:
            raise ConfigError(f"{key} needs at least one value, found none.")
        return tuple(_convert(_parse_yaml(str(v), source=key), int, key=key) for v in several)
    if wanted is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string, for want of a dot.
        try:
            return float(value)
        except ValueError:
            pass
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} must be {_IN_WORDS.get(wanted, wanted.__name__)}; found {value!r}.")


def _check_range(value: Any, option: Field[Any], *, key: str) -> None:
    meta = option.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{key} must be one of {', '.join(meta['choices'])}; found {value!r}.")
    if not isinstance(value, int | float):
        return
    too_low = meta["low"] is not None and not value >= meta["low"]
    not_above = meta["above"] is not None and not value > meta["above"]
    too_high = meta["high"] is not None and not value <= meta["high"]
    # The comparisons are negated so that NaN fails them too.
    if too_low or not_above or too_high:
        raise ConfigError(f"{key} must be a number{_range_text(option)}; found {value}.")


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        MissingData: if it is not there.
        ConfigError: if it is not valid YAML.
    """
    if not path.is_file():
        raise MissingData(f"The config file {path} does not exist.")
    try:
        return _parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {str(error).splitlines()[0]}.") from None


def flatten(tree: Any) -> dict[str, Any]:
    """Sections of settings (`training: {epochs: 3}`) or bare ones as a flat mapping that `with_values` takes.

    Raises:
        ConfigError: if it is no mapping.
    """
    if tree in (None, ""):
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("A config file holds `section: {key: value}` or `key: value`; found something else.")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS and (value is None or isinstance(value, dict)):
            flat.update({f"{key}.{name}": inner for name, inner in (value or {}).items()})
        else:
            flat[str(key)] = value
    return flat
