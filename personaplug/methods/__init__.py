"""Rows of a results table: one class for each kind, and the registry that finds them by name."""

from personaplug.methods import rows  # registers the rows of this package
from personaplug.methods.base import Method, ModelInputs
from personaplug.methods.registry import (
    default_rows,
    find_method,
    needed_parts,
    parse_methods,
    register_extension,
    register_method,
)

__all__ = [
    "Method",
    "ModelInputs",
    "default_rows",
    "find_method",
    "needed_parts",
    "parse_methods",
    "register_extension",
    "register_method",
    "rows",
]
