"""Request models: what is validated, what passes, what an engine gets."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from personaplug.errors import RequestError
from personaplug.serving.engines.sampling import UNSUPPORTED, Sampling
from personaplug.serving.openai_protocol import ChatRequest, CompletionRequest, check_json

TURN = {"role": "user", "content": "hello"}


def _chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [TURN], **fields})


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_to_openai_gives_the_fields_of_the_caller_without_those_of_personaplug() -> None:
    fields = {"messages": [TURN | {"name": "ann"}], "top_k": 7, "user": "ann", "stream": None}
    assert ChatRequest.model_validate(fields | {"personaplug": {"free": True}}).to_openai() == fields


@pytest.mark.parametrize("prompt", ["a", ["a"]])
def test_completion_takes_a_prompt_or_a_list_of_one(prompt: Any) -> None:
    request = CompletionRequest.model_validate({"prompt": prompt})
    assert request.prompt_text == "a"
    assert request.to_openai() == {"prompt": "a"}


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [["a"]], 1, None])
def test_completion_refuses_other_prompts(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": prompt})


def test_prompt_text_is_that_of_the_last_user() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    turns = [TURN, {"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    assert ChatRequest.model_validate({"messages": turns}).prompt_text == "a\nb"
    assert ChatRequest.model_validate({"messages": turns[2:]}).prompt_text == "c"


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "\ud800", {"\udfff": 1}, [{"a": [float("nan")]}]])
def test_value_that_json_cannot_represent_is_refused_wherever_it_stands(value: Any) -> None:
    for fields in (
        {"top_p": value},
        {"tools": [{"x": value}]},
        {"messages": [TURN | {"name": value}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "x": value}]}]},
    ):
        with pytest.raises(RequestError) as refused:
            _chat(**fields)
        assert (refused.value.http_status, refused.value.code) == (400, "invalid_value")


def test_nesting_is_bounded() -> None:
    assert check_json(_nested(99)) == _nested(99)
    assert _chat(x=_nested(98)).to_openai()["x"] == _nested(98)
    for depth in (100, 10_000):
        with pytest.raises(RequestError, match="nested"):
            _chat(x=_nested(depth))


def test_sampling_is_a_view_on_undeclared_fields() -> None:
    sampling = Sampling.from_fields(_chat(max_tokens=3, temperature=0.5, stop=["", "x"], other=1).model_extra)
    assert (sampling.max_tokens, sampling.temperature, sampling.stop_texts) == (3, 0.5, ("x",))
    assert Sampling.from_fields(None).max_tokens is None


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_field_is_refused_unless_it_changes_nothing(name: str) -> None:
    for value in UNSUPPORTED[name]:
        Sampling.from_fields({name: value})
    with pytest.raises(RequestError) as refused:
        Sampling.from_fields({name: "something"})
    assert refused.value.code == "unsupported"
