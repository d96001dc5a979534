"""Errors: messages, the list of classes, and pickling."""

from __future__ import annotations

import pickle

import pytest

from personaplug import errors

EXAMPLES = [
    errors.ConfigError("x"),
    errors.RecordError("f.json", "question 3", reason="no id"),
    errors.MissingModel("owner/model", tried=["a folder", "the hub"]),
    errors.MissingExtra("Parquet", extra="parquet"),
    errors.EncoderMismatch("This plug", expected="A", found="B"),
    errors.LLMMismatch(trained_for="A", given="B"),
    errors.TrainingDiverged("x"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_keeps_its_message_after_pickling(error: errors.PersonaPlugError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_docstring_lists_all_error_classes() -> None:
    names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert all(name in (errors.__doc__ or "") for name in names)


def test_message_says_what_was_expected_found_and_to_do() -> None:
    assert str(EXAMPLES[4]) == (
        "This plug was made with the encoder A, but the given encoder is B. "
        "Load the first encoder, or encode and train again with the given one in a new folder."
    )
