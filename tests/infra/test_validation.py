"""Messages for pydantic's validation errors."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from personaplug.infra.validation import first_error


class Settings(BaseModel, extra="forbid", strict=True):
    name: str = Field(min_length=1)
    kind: Literal["a", "b"] = "a"
    counts: tuple[int, ...] = Field(default=(), strict=False)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "bad":
            raise ValueError("the name is taken")
        return name


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "the key 'name' is missing"),
        ({"name": "x", "nmae": 1}, "the key 'nmae' is unknown"),
        ({"name": 3}, "'name' should be a valid string, found 3"),
        ({"name": ""}, "'name': string should have at least 1 character"),
        ({"name": "bad"}, "'name': the name is taken"),
        ({"name": "x", "kind": "c"}, "'kind' should be 'a' or 'b', found 'c'"),
        ({"name": "x", "counts": 1}, "'counts' should be a list, found 1"),
        ({"name": "x", "counts": [1, "y" * 99]}, f"'counts.1' should be a valid integer, found '{'y' * 59}… (str)"),
    ],
)
def test_first_error_names_key_expected_and_found(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    assert first_error(caught.value).startswith(sentence)
