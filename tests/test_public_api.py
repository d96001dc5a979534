"""The public names exist, are documented, and load no heavy packages before their first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import personaplug


def test_all_is_sorted_and_complete() -> None:
    assert personaplug.__all__ == sorted(personaplug.__all__)
    assert set(personaplug.__all__) == set(personaplug._HOME)
    assert set(dir(personaplug)) == set(personaplug.__all__)


@pytest.mark.parametrize("name", personaplug.__all__)
def test_a_public_name_exists_and_is_documented(name: str) -> None:
    assert (getattr(personaplug, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        personaplug.nonsense  # noqa: B018


@pytest.mark.parametrize("statement", ["import personaplug", "import personaplug.cli.main"])
def test_importing_loads_neither_torch_nor_transformers(statement: str) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'sentence_transformers', 'numpy', 'rich') if m in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
