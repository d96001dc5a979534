"""Results of a table, and their JSON file.

The file is one JSON object with the fields of `Provenance` and these fields:

    rows       for each row: method (its name) and the other fields of `MethodInfo`; n, seeds, metrics, intervals,
               per_user (metrics averaged over users), decoding; the fields of `Diagnostics` (costs in an object
               `costs`); with several seeds, per_seed and seed_spread
    pairs      for each comparison: a, b, metric, difference (positive if a is better), low, high, p; p_holm (corrected
               within a family of comparisons); for accuracies, mcnemar_p (one per seed); in a personal gain, b is the
               control
    subgroups  for each part of the samples: name, samples, rows, pairs
    checksum   of all other fields; the last field, optional

Required fields: `rows`; `method` of a row; `a`, `b`, `metric` and `difference` of a pair; `name` of a subgroup. Unknown
fields are ignored. A null metric, interval end or p stands for NaN, which JSON lacks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.trials import Diagnostics, Provenance, known_fields, without_empty
from personaplug.errors import MissingData, RecordError
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import KEY, check_json

_COSTS = ("extra_prompt_tokens", "bytes_per_user", "seconds_per_user")

T = TypeVar("T")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class ResultRow:
    """One method's scores on n samples."""

    method: MethodInfo
    n: int | None = None
    seeds: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    per_user: dict[str, float] = field(default_factory=dict)
    invalid_rate: float | None = None
    decoding: str = ""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    per_seed: list[dict[str, float]] = field(default_factory=list)
    seed_spread: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Return a metric's interval if both ends are finite."""
        low, high = self.intervals.get(metric) or (math.nan, math.nan)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def to_json(self) -> dict[str, object]:
        """Return the row's object in a results file."""
        values = without_empty(asdict(self), ["per_seed", "seed_spread"])
        method, diagnostics = values.pop("method"), without_empty(values.pop("diagnostics"), ["fit_seconds"])
        costs = {name: diagnostics.pop(name) for name in _COSTS}
        return {"method": method.pop("name"), **method, **values, **diagnostics, "costs": costs}

    @classmethod
    def from_json(cls, record: Record) -> ResultRow:
        """Reverse `to_json`; raise KeyError if the `method` is missing, TypeError for a value of another type."""
        costs = record.get("costs") or {}
        for name, value, kinds, expected in (
            ("costs", costs, dict, "an object"),
            ("method", record["method"], str, "a text"),
            ("parents", record.get("parents") or [], (list, tuple), "a list"),
        ):
            if not isinstance(value, kinds):
                raise TypeError(f"the field {name!r} has the wrong type: expected {expected}")
        record = {**record, **costs, "name": record["method"]}
        values = known_fields(cls, record)
        values["method"] = MethodInfo.from_json(known_fields(MethodInfo, record))
        values["diagnostics"] = Diagnostics(**known_fields(Diagnostics, record))
        return _checked(cls(**_null_as_nan(values)))


@dataclass(frozen=True)
class Comparison:
    """How much better a is than b on the same samples."""

    a: str
    b: str
    metric: str
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    mcnemar_p: list[float] = field(default_factory=list)

    @property
    def deciding_p(self) -> float | None:
        """Holm's corrected p if the results have it, else p."""
        return self.p if self.p_holm is None else self.p_holm

    @property
    def is_significant(self) -> bool:
        """Whether the deciding p is below .05."""
        return self.deciding_p is not None and self.deciding_p < 0.05

    def reversed(self) -> Comparison:
        """Return the same comparison as b's advantage over a."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return replace(self, a=self.b, b=self.a, difference=-self.difference, low=low, high=high)

    def to_json(self) -> dict[str, object]:
        """Return the comparison's object in a results file."""
        return without_empty(asdict(self), ["p_holm", "mcnemar_p"])

    @classmethod
    def from_json(cls, record: Record) -> Comparison:
        """Reverse `to_json`; raise KeyError if a required field is missing."""
        values = known_fields(cls, record) | {name: record[name] for name in ("a", "b", "metric", "difference")}
        values |= {name: record[name] for name in ("low", "high", "p") if name in record}
        return _checked(cls(**_null_as_nan(values)))


@dataclass(frozen=True)
class ResultPart:
    """Rows and their comparisons on the same samples."""

    rows: list[ResultRow]
    pairs: list[Comparison]

    @cached_property
    def by_name(self) -> dict[str, ResultRow]:
        """The rows by their methods' names."""
        return {row.name: row for row in self.rows}

    @property
    def metric_names(self) -> list[str]:
        """The names of all metrics, in the order of the columns."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    @property
    def leading_metric(self) -> str:
        """The first metric of the rows; "" if they have no metric."""
        return next(iter(self.metric_names), "")

    def to_json(self) -> dict[str, object]:
        """Return the fields of the part in a results file."""
        return {"rows": [row.to_json() for row in self.rows], "pairs": [pair.to_json() for pair in self.pairs]}

    def is_personal_gain(self, a: str, b: str) -> bool:
        """Return whether b is a's control with another user's history."""
        return b in self.by_name and self.by_name[b].method.gain_of == a

    def comparison(self, a: str, b: str, metric: str) -> Comparison | None:
        """Return a's advantage over b in one metric; None if the results do not compare a with b."""
        for pair in self.pairs:
            if pair.metric == metric and {pair.a, pair.b} == {a, b}:
                return pair if pair.a == a else pair.reversed()
        return None

    def personal_gains(self, metric: str) -> dict[str, Comparison]:
        """Return each method's comparison with its wrong-user control in one metric, by the method's name."""
        return {p.a: p for p in self.pairs if p.metric == metric and self.is_personal_gain(p.a, p.b)}


@dataclass(frozen=True)
class Subgroup(ResultPart):
    """The rows on part of the samples, or under another setting."""

    name: str
    samples: int | None = None

    def to_json(self) -> dict[str, object]:
        size = {} if self.samples is None else {"samples": self.samples}
        return {"name": self.name} | size | super().to_json()


@dataclass(frozen=True)
class Results(ResultPart):
    """A whole table."""

    about: Provenance = field(default_factory=Provenance)
    subgroups: list[Subgroup] = field(default_factory=list)

    def __str__(self) -> str:
        from personaplug.analysis.terminal import terminal_text  # a circular import at the top

        return terminal_text(self)

    def to_json(self) -> dict[str, object]:
        subgroups = [subgroup.to_json() for subgroup in self.subgroups]
        return self.about.to_json() | super().to_json() | ({"subgroups": subgroups} if subgroups else {})

    @classmethod
    def from_json(cls, record: object, *, file: str | Path = "the results") -> Results:
        """Parse the object of a results file; raise RecordError if a required field is missing."""
        if not isinstance(record, dict) or "rows" not in record:
            reason = "expected an object with a list of `rows`, as `personaplug evaluate --json FILE` writes it"
            raise RecordError(file, "the whole file", reason=reason)

        def part_of(part: Record) -> tuple[list[ResultRow], list[Comparison]]:
            rows = _parsed(part, "rows", ResultRow.from_json, file=file)
            names = [row.name for row in rows]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise RecordError(file, "'rows'", reason=f"expected each row once; found {twice[0]!r} more than once")
            return rows, _parsed(part, "pairs", Comparison.from_json, file=file)

        def subgroup_of(part: Record) -> Subgroup:
            return _checked(Subgroup(*part_of(part), part["name"], samples=part.get("samples")))

        subgroups = _parsed(record, "subgroups", subgroup_of, file=file)
        return cls(*part_of(record), Provenance.from_json(record), subgroups)


def load_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        MissingData: if the file does not exist (DamagedFile: if its checksum does not match).
        RecordError: if it is not a results file.
    """
    if not path.is_file():
        raise MissingData(f"There is no results file {path}; `personaplug evaluate --json FILE` writes one.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        results = Results.from_json(record, file=path)
    except UnicodeDecodeError as error:
        raise RecordError(path, f"byte {error.start}", reason="expected UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise RecordError(path, f"line {error.lineno}", reason=f"expected JSON ({error.msg}).") from None
    except (ValueError, RecursionError):
        reason = "expected a results file; found a number with too many digits, or lists that are nested too deep."
        raise RecordError(path, "the whole file", reason=reason) from None
    if KEY in record:
        check_json(record, path, remedy="Restore it, or evaluate again.")
    return results


def write_results(path: Path, results: Results) -> None:
    """Write a results file with its checksum."""
    write_checked_json(path, results.to_json())


def _parsed(record: Record, key: str, parse: Callable[[Record], T], *, file: str | Path) -> list[T]:
    items = record.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RecordError(file, f"the field {key!r}", reason="expected a list of objects")
    parsed = []
    for number, item in enumerate(items, start=1):
        try:
            parsed.append(parse(item))
        except KeyError as error:
            raise RecordError(file, f"entry {number} of {key!r}", reason=f"the field {error} is missing") from None
        except TypeError as error:
            raise RecordError(file, f"entry {number} of {key!r}", reason=str(error)) from None
    return parsed


@cache
def _field_types(kind: Any) -> dict[str, TypeAdapter[Any]]:
    # A file of a later version may have a method family that this version lacks, so a Literal may be any text.
    hints = {name: str if get_origin(hint) is Literal else hint for name, hint in get_type_hints(kind).items()}
    return {name: TypeAdapter(hint) for name, hint in hints.items()}


def _checked(part: T) -> T:
    """Return a row, a comparison or a subgroup; raise TypeError if one of its fields has the wrong type."""
    values: list[Any] = [part, getattr(part, "method", None), getattr(part, "diagnostics", None)]
    for value in values:
        kind: Any = type(value)
        for name, adapter in _field_types(kind).items() if value is not None else ():
            try:
                adapter.validate_python(getattr(value, name), strict=True)
            except ValidationError as error:
                reason = error.errors(include_url=False, include_input=False)[0]["msg"]
                raise TypeError(f"the field {name!r} has the wrong type: {reason}") from None
    return part


def _null_as_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _null_as_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_null_as_nan(part) for part in value]
    return math.nan if value is None else value
