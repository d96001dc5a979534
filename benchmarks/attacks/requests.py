"""Requests whose fields mean nothing here, feedback that fits no item, and a vLLM that talks nonsense."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from free_ports import free_port

from attacks import Verdict, case
from attacks.lab import Lab, save_toy_model

_TESTS = Path(__file__).parents[2] / "tests"

_CHANGING_FIELDS: dict[str, Any] = {
    "guided_choice": ["a"], "guided_json": {}, "guided_regex": "a", "guided_grammar": "a",
    "structured_outputs": {"choice": ["a"]},
    "ignore_eos": True, "chat_template": "x", "chat_template_kwargs": {"enable_thinking": False},
    "tool_choice": "required", "tools": [{"type": "function"}], "functions": [{}], "function_call": {"name": "f"},
    "max_new_tokens": 3, "min_tokens": 5, "min_p": 0.5, "top_k": 3, "top_a": 0.1, "typical_p": 0.5,
    "repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0, "length_penalty": 2.0,
    "no_repeat_ngram_size": 2, "logit_bias": {"5": 100}, "n": 2, "best_of": 3, "num_beams": 4, "use_beam_search": True,
    "stop_token_ids": [5], "bad_words": ["a"], "allowed_token_ids": [5], "response_format": {"type": "json_object"},
    "modalities": ["audio"], "audio": {}, "prediction": {"type": "content", "content": "x"}, "web_search_options": {},
    "add_generation_prompt": False, "continue_final_message": True, "echo": True, "documents": [{}], "priority": 5,
    "truncate_prompt_tokens": 5, "prompt_logprobs": 3, "skip_special_tokens": False, "reasoning_effort": "high",
    "verbosity": "low", "made_up_field": 1,
}  # fmt: skip
_HARMLESS_FIELDS: dict[str, Any] = {
    "metadata": {"page": "home"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x", "n": 1,
    "parallel_tool_calls": True, "presence_penalty": 0, "frequency_penalty": 0, "stream": False, "tool_choice": "none",
}  # fmt: skip


@case("fields that change an answer elsewhere")
def engine_fields(lab: Lab, verdict: Verdict) -> None:
    with lab.serve() as server:
        for name, value in _CHANGING_FIELDS.items():
            reply = server.chat("hello", **{name: value})
            verdict.expect(reply.status_code in (400, 422), f"{name} is ignored: {reply.status_code}")
        for name, value in _HARMLESS_FIELDS.items():
            status = server.chat("hello", **{name: value}).status_code
            verdict.expect(status == 200, f"{name} is refused: {status}")


@case("feedback and items that fit no item")
def feedback(lab: Lab, verdict: Verdict) -> None:
    question = lab.question()["input"]
    with lab.serve("--keep-text") as server:
        path = "/v1/users/ann/history"

        def post(**body: Any) -> int:
            return server.call("POST", path, json=body).status_code

        on_task = server.chat(question).headers["x-request-id"]
        off_task = server.chat("Tell me a joke.").headers["x-request-id"]
        for answer in ("9", "banana", "", "6"):
            verdict.expect(post(request_id=on_task, answer=answer) in (400, 422), f"the answer {answer!r} is stored")
        verdict.expect(post(request_id=off_task, answer="4") in (400, 422), "a prompt outside the task is stored")
        item = lab.items(1)[0]
        for score in ("9", 9, "banana", "", None, 3.5, True, [1]):
            stored = post(items=[{**item, "score": score}])
            verdict.expect(stored in (400, 422), f"the rating {score!r} is stored: {stored}")
        both = post(items=[item, {**item, "score": "1"}])
        verdict.expect(both in (400, 422), f"two different items of one id: {both}")
        verdict.expect(server.count() == 0, "something was stored")
        verdict.expect(post(request_id=on_task, answer="4") == 200 and server.count() == 1, "right feedback")
        verdict.expect(post(**{**item, "score": 4}) == 200, "a numeric rating of a single item")
        verdict.expect(post(items=[{**item, "id": "n", "score": 4.0}]) == 200, "a numeric rating in a list")


@case("closed sets with stops, cuts and look-alike prompts")
def closed_sets(lab: Lab, verdict: Verdict) -> None:
    question = lab.question()["input"]
    labels = ("1", "2", "3", "4", "5")
    with lab.serve() as server:
        server.add(lab.items(5)).raise_for_status()
        for fields in ({"stop": "4"}, {"stop": list(labels)[:4]}, {"max_tokens": 1}, {"temperature": 2.0}):
            reply = server.chat(question, **fields)
            answer = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
            verdict.expect(answer in labels or reply.status_code == 400, f"{fields}: {reply.status_code} {answer!r}")
        marker = question[: question.index(": ") + 2]
        for prompt in (marker, f"Summarize this: {marker}Titanic", f"Translate to French. {question}"):
            headers = server.chat(prompt).headers
            verdict.expect(
                headers.get("x-personaplug-persona") == "plain", f"{len(prompt)} characters count as the task"
            )


@case("a vLLM that talks nonsense")
def nonsense_engine(lab: Lab, verdict: Verdict) -> None:
    sys.path.insert(0, str(_TESTS))
    nonsense: list[tuple[int, bytes]] = [
        (200, b"<html>login</html>"), (200, b'{"object": "error"}'), (200, b""), (200, b"[]"), (200, b"null"),
        (200, b'{"choices": []}'), (200, b"x" * 50_000_000), (200, b'{"choices": [{"index": 0}]}'), (302, b""),
        (200, b"data: " + b"x" * 50_000_000),
    ]  # fmt: skip
    lab = replace(lab.hashed(), folder=lab.scratch("engine"))
    model = lab.folder / "model"
    save_toy_model(model)
    lab.run("films", f"llm={model}")
    with _stand_in() as (engine, url), lab.serve("--engine", url) as server:
        for number, (status, body) in enumerate(nonsense):
            engine.instead["/v1/chat/completions"] = status, body
            for stream in (False, True):
                reply = server.chat("hello", stream=stream, timeout=60)
                is_right = reply.status_code == 502 or (stream and b'"error"' in reply.content[-2000:])
                verdict.expect(is_right, f"nonsense {number}, stream {stream}: {reply.status_code}")


@contextlib.contextmanager
def _stand_in() -> Iterator[tuple[Any, str]]:
    """Run the tests' stand-in for vLLM; it has the width of the toy model's embeddings."""
    import uvicorn
    from vllm_stand_in import StandIn

    engine, port = StandIn(), free_port()
    runner = uvicorn.Server(uvicorn.Config(engine.app, port=port, log_level="warning"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield engine, f"http://127.0.0.1:{port}"
    finally:
        runner.should_exit = True
        thread.join(10)
