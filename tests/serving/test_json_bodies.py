"""Limits of JSON bodies, checked before they are parsed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import open_service, served
from pydantic import TypeAdapter

from personaplug.errors import RequestError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving import json_bodies
from personaplug.serving.json_bodies import MAX_VALUES, check_size, parse_body
from personaplug.serving.openai_protocol import MAX_DEPTH

LARGE = [
    b"[" + b"[]," * 1_000_000 + b"[]]",
    b"[" * 4_000_000,
    b"]" * 4_000_000,
    b'"' * 4_000_000,
    b'{"a":' * 700_000,
    b'["' + b'","' * 1_000_000 + b'"]',
    b"[" + b"1," * 2_000_000 + b"1]",
]


@pytest.mark.parametrize("body", LARGE, ids=lambda body: body[:8].decode())
def test_body_with_too_many_values_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        check_size(body)
    assert refused.value.http_status in (400, 413)


@pytest.mark.parametrize("text", ["\\" * 1_000_000, '"' * 1_000_000, "[{,:" * 250_000, "é,[" * 300_000])
def test_characters_in_strings_do_not_count_as_values(text: str) -> None:
    check_size(json.dumps({"messages": [{"content": text}], "user": "a"}).encode())


def test_nesting_depth_is_limited() -> None:
    check_size(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(RequestError, match="nested"):
        check_size(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("body", [b'{"user":"ann","user":"bob"}', b'[{"a":{"b":1,"\\u0062":1}}]'])
def test_duplicate_key_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="duplicate key") as refusal:
        parse_body(body, TypeAdapter(Any))
    assert (refusal.value.http_status, refusal.value.code) == (422, "invalid_json")
    assert parse_body(b'{"a":1,"b":{"a":1}}', TypeAdapter(Any)) == {"a": 1, "b": {"a": 1}}


def _size(value: Any) -> int:
    """Count the commas, colons and brackets outside of strings."""
    if isinstance(value, dict):
        return 2 + max(0, len(value) - 1) + len(value) + sum(map(_size, value.values()))
    if isinstance(value, list):
        return 2 + max(0, len(value) - 1) + sum(map(_size, value))
    return 0


values = st.recursive(
    st.text(alphabet='a\\",[{:', max_size=12) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(alphabet='a\\",[', max_size=5), inner, max_size=5)
    ),
)


@given(value=values, block=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_value_count_does_not_depend_on_the_block_size(value: Any, block: int) -> None:
    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bodies, "_BLOCK_BYTES", block)
        structures = list(json_bodies._blocks(body))
    structure = b"".join(piece for _, piece in structures)
    assert sum(map(structure.count, (b",", b":", b"[", b"]", b"{", b"}"))) == _size(value)
    assert sum(quotes for quotes, _ in structures) % 2 == 0


def test_history_of_a_thousand_items_fits(toy: CausalLM, tmp_path: Path) -> None:
    items = [{"id": str(n), "text": "one, two: [three]", "score": "4", "date": "2024-01-01"} for n in range(1000)]
    assert 6 * len(items) < MAX_VALUES
    with served(open_service(toy, tmp_path)) as url:
        start = time.monotonic()
        reply = httpx.post(f"{url}/v1/users/a/history", json={"items": items}, timeout=60)
        assert reply.json()["new"] == 1000
        listed = httpx.get(f"{url}/v1/users/a/history", params={"latest": 150}).json()
        assert (listed["count"], [item["id"] for item in listed["items"]]) == (1000, [str(n) for n in range(850, 1000)])
        for body in LARGE:
            reply = httpx.post(
                f"{url}/v1/users/a/history", content=body, headers={"content-type": "application/json"}, timeout=60
            )
            assert reply.status_code in (400, 413)
        too_long = httpx.post(f"{url}/v1/users/a/history", json={"id": "1", "text": "x" * 100_001, "score": "1"})
        assert too_long.status_code == 422
        assert time.monotonic() - start < 60
