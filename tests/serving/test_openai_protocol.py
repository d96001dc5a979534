"""Request models: validation, accepted fields, and fields that an engine gets."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from personaplug.errors import RequestError
from personaplug.serving.engines.sampling import NEUTRAL, Sampling
from personaplug.serving.openai_protocol import HARMLESS, ChatRequest, CompletionRequest, Kind, check_json

TURN = {"role": "user", "content": "hello"}


def _chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [TURN], **fields})


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_to_openai_keeps_the_callers_fields_without_those_of_personaplug() -> None:
    fields = {"messages": [TURN | {"name": "ann"}], "top_k": 7, "stream": None}
    left_out = {"personaplug": {"free": True}, "user": "ann", "metadata": {"x": 1}, "store": True}
    assert ChatRequest.model_validate(fields | left_out).to_openai() == fields


@pytest.mark.parametrize("prompt", ["a", ["a"]])
def test_completion_accepts_a_prompt_or_a_list_of_one(prompt: Any) -> None:
    request = CompletionRequest.model_validate({"prompt": prompt})
    assert request.prompt_text == "a"
    assert request.to_openai() == {"prompt": "a"}


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [["a"]], 1, None])
def test_completion_refuses_other_prompts(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": prompt})


def test_prompt_text_is_the_last_user_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    turns = [TURN, {"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    assert ChatRequest.model_validate({"messages": turns}).prompt_text == "a\nb"
    assert ChatRequest.model_validate({"messages": turns[2:]}).prompt_text == "c"


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "\ud800", {"\udfff": 1}, [{"a": [float("nan")]}]])
def test_value_that_json_cannot_represent_is_refused_in_any_field(value: Any) -> None:
    for fields in (
        {"top_p": value},
        {"tools": [{"x": value}]},
        {"messages": [TURN | {"name": value}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "x": value}]}]},
    ):
        with pytest.raises(RequestError) as refused:
            _chat(**fields)
        assert (refused.value.http_status, refused.value.code) == (400, "invalid_value")


def test_nesting_is_limited() -> None:
    assert check_json(_nested(99)) == _nested(99)
    assert _chat(x=_nested(98)).to_openai()["x"] == _nested(98)
    for depth in (100, 10_000):
        with pytest.raises(RequestError, match="nested"):
            _chat(x=_nested(depth))


def test_sampling_reads_the_undeclared_fields() -> None:
    sampling = Sampling.from_fields(_chat(max_tokens=3, temperature=0.5, stop=["", "x"], store=True).model_extra)
    assert (sampling.max_tokens, sampling.temperature, sampling.stop_texts) == (3, 0.5, ("x",))
    assert Sampling.from_fields(None).max_tokens is None


@pytest.mark.parametrize("name", [*NEUTRAL, "guided_choice", "chat_template", "max_new_tokens", "prompt_embeds", "x"])
def test_unsupported_field_is_refused_by_name(name: str) -> None:
    for value in (None, *NEUTRAL.get(name, ())):
        Sampling.from_fields({name: value})
    with pytest.raises(RequestError, match=repr(name)) as refused:
        Sampling.from_fields({name: "something"})
    assert (refused.value.http_status, refused.value.code) == (400, "unsupported")


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_field_is_accepted(name: str) -> None:
    Sampling.from_fields({name: "something"})


def test_message_has_the_name_of_a_refused_field_only_if_it_is_short() -> None:
    with pytest.raises(RequestError) as refused:
        Sampling.from_fields({"a secret text " * 10: 1})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "fields", "count"),
    [
        ("chat", {}, None),
        ("chat", {"logprobs": False, "top_logprobs": 0}, None),
        ("chat", {"logprobs": True}, 0),
        ("chat", {"logprobs": True, "top_logprobs": 3}, 3),
        ("completion", {"logprobs": False}, None),
        ("completion", {"logprobs": 0}, 0),
        ("completion", {"logprobs": 5}, 5),
    ],
)
def test_logprobs_have_the_form_of_each_route(kind: Kind, fields: dict[str, Any], count: int | None) -> None:
    assert Sampling.from_fields(fields, kind=kind).logprob_count(kind) == count


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("chat", {"logprobs": 3}),
        ("chat", {"top_logprobs": 3}),
        ("chat", {"logprobs": True, "top_logprobs": 21}),
        ("completion", {"logprobs": True}),
        ("completion", {"logprobs": -1}),
        ("completion", {"logprobs": 21}),
        ("completion", {"logprobs": 1, "top_logprobs": 3}),
    ],
)
def test_logprobs_in_another_form_are_refused(kind: Kind, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        Sampling.from_fields(fields, kind=kind)
    assert refused.value.code == "invalid_value"


NAMED: dict[str, dict[str, Any]] = {
    "personaplug.user": {"personaplug": {"user": "ann"}},
    "user": {"user": "ann"},
    "safety_identifier": {"safety_identifier": "ann"},
    "metadata.user_id": {"metadata": {"user_id": "ann", "trace": 3}},
}


@pytest.mark.parametrize("source", NAMED)
def test_user_can_be_named_in_any_documented_field(source: str) -> None:
    request = _chat(**NAMED[source])
    assert request.named_user(None) == "ann"
    assert request.named_user("ann") == "ann"
    with pytest.raises(RequestError, match=f"X-Personaplug-User and {source}") as refused:
        request.named_user("bob")
    assert (refused.value.http_status, refused.value.code) == (400, "user")
    assert "ann" not in str(refused.value)


def test_fields_that_name_different_users_are_refused() -> None:
    both = NAMED["user"] | {"metadata": {"user_id": "bob"}}
    with pytest.raises(RequestError, match=r"user and metadata\.user_id"):
        _chat(**both).named_user(None)
    assert _chat(**NAMED["user"] | NAMED["metadata.user_id"]).named_user(None) == "ann"


@pytest.mark.parametrize(
    ("header", "user"),
    [
        ("ann", "ann"),
        ("ann@example.org", "ann@example.org"),
        ("J%C3%BCrgen", "J\N{LATIN SMALL LETTER U WITH DIAERESIS}rgen"),
        ("J\N{LATIN SMALL LETTER U WITH DIAERESIS}rgen".encode().decode("latin-1"), "J\xfcrgen"),
        ("user 1", "user 1"),
        ("100%25", "100%"),
    ],
)
def test_user_header_is_utf8_with_or_without_percent_encoding(header: str, user: str) -> None:
    assert _chat().named_user(header) == user


@pytest.mark.parametrize("header", ["", "J\xfcrgen", "J%FCrgen", "..", "a%00b", "x" * 300])
def test_invalid_id_in_the_user_header_is_refused(header: str) -> None:
    with pytest.raises(RequestError, match="X-Personaplug-User") as refused:
        _chat().named_user(header)
    assert refused.value.http_status == 422


@pytest.mark.parametrize("user", ["", [], True, {"a": 1}, 1.5, "a\x00b"])
def test_invalid_user_id_in_metadata_is_refused(user: Any) -> None:
    with pytest.raises(RequestError, match=r"metadata\.user_id"):
        _chat(metadata={"user_id": user}).named_user(None)
    assert _chat(metadata={"user_id": 17}).named_user(None) == "17"
    assert _chat(metadata={"user_id": None}).named_user(None) is None
