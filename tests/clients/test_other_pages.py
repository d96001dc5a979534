"""The Python blocks of docs/serving.md and of the page for app engineers run unchanged against a server."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from markdown_code import code_in
from recording_server import RecordingServer, recording

from personaplug.llm.causal_lm import CausalLM

DOCS = Path(__file__).resolve().parents[2] / "docs"
SERVER = "http://127.0.0.1:8000"


def _run(page: str, server: RecordingServer, *, after: str) -> str:
    """Run the Python blocks of a page after a heading; return what they print."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {after}\n")[2]
    code = "\n".join(code_in(text, "python"))
    assert SERVER in code
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code.replace(SERVER, server.url), {})
    return output.getvalue()


def test_serving_page_adds_an_item_and_answers_with_the_persona(toy: CausalLM, tmp_path: Path) -> None:
    with recording(toy, tmp_path, users=()) as server:
        persona, _, answer = _run("serving.md", server, after="The shortest way").partition(" ")
        (item,) = server.get("/v1/users/ann/history").json()["items"]
        assert item["question"] == "How do I start a garden?"
        assert persona == "user"
        assert answer.strip()  # the page's request has no temperature, so the answer is drawn


def test_page_for_app_engineers_sends_feedback_and_erases(
    toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: list[httpx.Response] = []

    def recorded(method: str, url: str, **options: Any) -> httpx.Response:
        replies.append(httpx.request(method, url, **options))
        return replies[-1]

    for method in ("post", "put", "delete"):
        monkeypatch.setattr(httpx, method, partial(recorded, method))
    with recording(toy, tmp_path, users=()) as server:
        answer = _run("getting-started/app-engineer.md", server, after="4. Serve")
        assert answer.strip()
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert [str(reply.request.url).rpartition("/users/")[2] for reply in replies] == [
        "user%201/history",
        "user%201/preferences",
        "user%201",
    ]
    assert replies[-1].json()["items"] == 2
