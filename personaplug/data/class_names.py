"""The class names of a Hugging Face data set, whose columns of the type ClassLabel hold numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

ClassNames = Mapping[str, Sequence[str]]
"""The names of the classes of each column, in the order of their numbers."""


def names_in_features(features: object) -> ClassNames:
    """Return the class names in `Dataset.features`; none for another object."""
    if not isinstance(features, Mapping):
        return {}
    return _checked({column: getattr(feature, "names", None) for column, feature in features.items()})


def names_in_metadata(metadata: Mapping[bytes, bytes] | None) -> ClassNames:
    """Return the class names in the metadata of an Arrow schema, which `Dataset.to_parquet` writes."""
    try:
        features: Any = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return _checked(names)


def name_classes(records: Iterable[object], names: ClassNames) -> Iterator[object]:
    """Yield the records with the names of classes in place of their numbers."""
    for record in records:
        if isinstance(record, Mapping):
            found = names.keys() & record.keys()
            record = {**record, **{column: _name(record[column], names[column]) for column in found}}
        yield record


def _checked(names: Mapping[str, object]) -> ClassNames:
    """Return the entries that are lists of names."""
    return {
        column: each
        for column, each in names.items()
        if isinstance(each, list | tuple) and all(isinstance(name, str) for name in each)
    }


def _name(value: object, names: Sequence[str]) -> object:
    """Return the name of a class; None for -1, which stands for a missing label. Other values stay unchanged."""
    number = value.item() if hasattr(value, "item") else value  # of NumPy, or of torch
    if not isinstance(number, int) or isinstance(number, bool):
        return value
    return names[number] if 0 <= number < len(names) else None
