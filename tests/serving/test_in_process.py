"""The embedded engine: many requests at once, each answered as if alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from personaplug.errors import EngineFailure, RequestError
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.in_process import InProcessEngine

Doing = Callable[[InProcessEngine], Coroutine[Any, Any, Any]]


def _run(toy: CausalLM, doing: Doing, **settings: Any) -> Any:
    async def whole() -> Any:
        engine = InProcessEngine(toy, name="toy", **settings)
        await engine.start()
        try:
            return await doing(engine)
        finally:
            await engine.close()

    return asyncio.run(whole())


def _soft(toy: CausalLM, seed: int) -> SoftPrompt:
    draw = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(1, 2, toy.identity.width, generator=draw) * toy.embedding_scale, placement="suffix")


def _chat(text: str, soft: SoftPrompt | None = None, **fields: Any) -> EngineRequest:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0} | fields
    choices = body.pop("choices", ())
    return EngineRequest("chat", body, soft, choices, id="r1")


def _text(reply: EngineReply) -> str:
    assert isinstance(reply.body, bytes)
    return str(json.loads(reply.body)["choices"][0]["message"]["content"])


async def _events(reply: EngineReply) -> list[dict[str, Any]]:
    assert not isinstance(reply.body, bytes)
    events = [chunk.decode() async for chunk in reply.body]
    assert events.pop() == "data: [DONE]\n\n"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def _streamed(reply: EngineReply) -> str:
    events = await _events(reply)
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def test_requests_at_once_get_the_answers_they_get_alone(toy: CausalLM) -> None:
    questions = [_chat(f"question {n}", _soft(toy, n) if n % 3 else None, max_tokens=3 + n % 7) for n in range(40)]

    async def synchronized(engine: InProcessEngine) -> list[str]:
        return [_text(reply) for reply in await asyncio.gather(*map(engine.answer, questions))]

    answers = _run(toy, synchronized, max_rows=8)
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        config = GenerationConfig(max_new_tokens=question.body["max_tokens"])
        alone = toy.generate(PromptBatch([f"question {number}"], question.soft), config)[0]
        assert answer.strip() == alone.text


def test_a_stream_says_what_the_whole_says(toy: CausalLM) -> None:
    async def both(engine: InProcessEngine) -> tuple[str, str]:
        question = _chat("hello", _soft(toy, 1), max_tokens=20)
        streamed = await engine.answer(_chat("hello", _soft(toy, 1), max_tokens=20, stream=True))
        return _text(await engine.answer(question)), await _streamed(streamed)

    whole, streamed = _run(toy, both)
    assert whole == streamed
    assert whole


def test_usage_and_reason(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> tuple[EngineReply, list[dict[str, Any]]]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return await engine.answer(_chat("hey", _soft(toy, 1))), await _events(
            await engine.answer(_chat("hey", _soft(toy, 1), **options))
        )

    whole, events = _run(toy, ask)
    body = json.loads(whole.body)
    read = len(toy.prompt_tokenizer.encode_prompt("hey").ids) + 2
    assert body["usage"] == {"prompt_tokens": read, "completion_tokens": 8, "total_tokens": read + 8}
    assert body["choices"][0]["finish_reason"] == "length"
    assert (events[-1]["usage"], events[-1]["choices"]) == (body["usage"], [])
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_a_stop_text_ends_the_answer_and_is_never_sent(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> tuple[str, str, str]:
        free = _text(await engine.answer(_chat("hello", max_tokens=30)))
        stop = free[4:7]
        whole = _text(await engine.answer(_chat("hello", max_tokens=30, stop=["never there", stop])))
        streamed = await _streamed(await engine.answer(_chat("hello", max_tokens=30, stop=stop, stream=True)))
        return free[: free.index(stop)], whole, streamed

    cut, whole, streamed = _run(toy, ask)
    assert whole == streamed == cut


def test_an_answer_from_a_closed_set(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> set[str]:
        asked = [_chat(f"rate {n}", _soft(toy, n), choices=("1", "2", "10 stars"), max_tokens=1) for n in range(20)]
        return {_text(reply) for reply in await asyncio.gather(*map(engine.answer, asked))}

    assert _run(toy, ask) <= {"1", "2", "10 stars"}


def test_a_completion_has_no_template(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> dict[str, Any]:
        reply = await engine.answer(
            EngineRequest("completion", {"prompt": "abc", "max_tokens": 4, "temperature": 0}, None)
        )
        assert isinstance(reply.body, bytes)
        found: dict[str, Any] = json.loads(reply.body)
        return found

    body = _run(toy, ask)
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == 3
    assert isinstance(body["choices"][0]["text"], str)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"n": 2}, "unsupported"),
        ({"tools": [{"type": "function"}]}, "unsupported"),
        ({"response_format": {"type": "json_object"}}, "unsupported"),
        ({"temperature": -1}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": "8"}, "invalid_value"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"stop": 3}, "invalid_value"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user<|end|>", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value"),
        ({"top_k": 5}, "unsupported"),
        ({"structured_outputs": {"choice": ["a"]}}, "unsupported"),
    ],
)
def test_what_it_cannot_do_is_refused(toy: CausalLM, fields: dict[str, Any], code: str) -> None:
    async def ask(engine: InProcessEngine) -> Any:
        with pytest.raises(RequestError) as refused:
            await engine.answer(_chat("hello", **fields))
        return refused.value

    error = _run(toy, ask)
    assert (error.code, error.status) == (code, 400)
    assert "long long" not in str(error)


def test_fields_that_ask_for_nothing_are_taken(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> str:
        fields: dict[str, Any] = {
            "n": 1,
            "tools": [],
            "frequency_penalty": 0,
            "logit_bias": None,
            "service_tier": "auto",
        }
        return _text(await engine.answer(_chat("hello", **fields)))

    assert _run(toy, ask)


@pytest.mark.parametrize("read", [0, 1, 3])
def test_a_listener_who_leaves_frees_the_place(toy: CausalLM, read: int) -> None:
    async def ask(engine: InProcessEngine) -> str:
        for _ in range(5):
            reply = await engine.answer(_chat("endless", max_tokens=4000, stream=True))
            assert not isinstance(reply.body, bytes)
            events = aiter(reply.body)
            for _ in range(read):
                await anext(events)
            await reply.body.aclose()
        # With one place, this is answered in time only if the others are gone.
        return _text(await asyncio.wait_for(engine.answer(_chat("hello")), 5))

    assert _run(toy, ask, max_rows=1, max_new_tokens=4000)


def test_one_who_no_longer_waits_for_a_whole_answer_frees_the_place(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> str:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.answer(_chat("endless", max_tokens=4000)), 0.05)
        return _text(await asyncio.wait_for(engine.answer(_chat("hello")), 5))

    assert _run(toy, ask, max_rows=1, max_new_tokens=4000)


def test_answers_that_stop_early_harm_no_others(toy: CausalLM) -> None:
    """Stop texts are found while the model goes on: in bursts, none fails, and each counts the same tokens always."""

    async def ask(engine: InProcessEngine) -> list[set[tuple[str, int]]]:
        free = [_text(await engine.answer(_chat(f"question {n}", max_tokens=40))) for n in range(8)]
        found: list[set[tuple[str, int]]] = [set() for _ in free]
        for _ in range(12):
            asked = [_chat(f"question {n}", max_tokens=40, stop=text[5 + n]) for n, text in enumerate(free)]
            for number, reply in enumerate(await asyncio.gather(*map(engine.answer, asked))):
                assert isinstance(reply.body, bytes)
                found[number].add((_text(reply), json.loads(reply.body)["usage"]["completion_tokens"]))
        return found

    assert all(len(answers) == 1 for answers in _run(toy, ask))


@pytest.mark.parametrize("odd", [{"temperature": 1e-40}, {"top_p": 1e-50, "temperature": 1}, {"top_p": 0}])
def test_odd_numbers_are_answered_and_fail_nobody(toy: CausalLM, odd: dict[str, Any]) -> None:
    async def ask(engine: InProcessEngine) -> list[str]:
        asked = [_chat("hello", max_tokens=30), _chat("hello", max_tokens=30, **odd), _chat("you", max_tokens=30)]
        return [_text(reply) for reply in await asyncio.gather(*map(engine.answer, asked))]

    plain, strange, _ = _run(toy, ask)
    assert strange == plain  # all of these take the likeliest token


def test_a_persona_that_is_no_number_is_refused_and_fails_nobody(toy: CausalLM) -> None:
    soft = _soft(toy, 1)
    spoiled = SoftPrompt(soft.vectors * float("nan"), placement="suffix")

    async def ask(engine: InProcessEngine) -> str:
        with pytest.raises(EngineFailure, match="no numbers"):
            await engine.answer(_chat("hello", spoiled))
        return _text(await engine.answer(_chat("hello", soft)))

    assert _run(toy, ask)


def test_newcomers_do_not_keep_others_waiting(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read, behind, done = toy.prefill, toy.cached_prefix.logits, list[str]()

    def reading(*given: Any, **named: Any) -> Any:
        done.append("r")
        return read(*given, **named)

    def stepping(*given: Any, **named: Any) -> Any:
        done.append("s")
        return behind(*given, **named)

    monkeypatch.setattr(toy, "prefill", reading)
    monkeypatch.setattr(toy.cached_prefix, "logits", stepping)

    async def ask(engine: InProcessEngine) -> None:
        long = asyncio.create_task(engine.answer(_chat("long", max_tokens=100)))
        await asyncio.gather(*(engine.answer(_chat(f"short {n}", max_tokens=1)) for n in range(60)))
        await long

    _run(toy, ask, max_rows=2)
    course = "".join(done)
    assert course.count("s") == 99
    assert course.count("r") > 30
    assert "rr" not in course[1 : course.rindex("s")]  # between any two readings, the long answer gets a token


def test_the_likeliest_of_a_closed_set_is_that_of_an_evaluation(toy: CausalLM) -> None:
    labels = ("politics", "pop", "sports news", "science", "7")
    softs = [_soft(toy, seed) for seed in range(30)]

    async def ask(engine: InProcessEngine) -> list[str]:
        asked = [_chat(f"which {n}", soft, choices=labels) for n, soft in enumerate(softs)]
        asked = [
            EngineRequest(q.kind, {k: v for k, v in q.body.items() if k != "temperature"}, q.soft, labels)
            for q in asked
        ]
        return [_text(reply) for reply in await asyncio.gather(*map(engine.answer, asked))]

    for number, (soft, answer) in enumerate(zip(softs, _run(toy, ask), strict=True)):
        scores = toy.score(PromptBatch([f"which {number}"], soft), labels)[0]
        assert answer == labels[int(scores.argmax())]


def test_closing_finishes_what_was_begun(toy: CausalLM) -> None:
    async def ask() -> tuple[str, str]:
        engine = InProcessEngine(toy, name="toy")
        await engine.start()
        begun = asyncio.create_task(engine.answer(_chat("hello", max_tokens=40)))
        await asyncio.sleep(0.05)
        await engine.close()
        assert not await engine.ready()
        with pytest.raises(EngineFailure):
            await engine.answer(_chat("hello"))
        return _text(await begun), toy.generate(PromptBatch(["hello"]), GenerationConfig(max_new_tokens=40))[0].text

    one, other = asyncio.run(ask())
    assert one.strip() == other


def test_a_model_that_fails_fails_those_it_was_at_and_serves_the_next(
    toy: CausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("with the user's secret in it")

    async def ask(engine: InProcessEngine) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(toy, "prefill", broken)
            with pytest.raises(EngineFailure) as failed:
                await engine.answer(_chat("hello"))
            assert "secret" not in str(failed.value)
        return _text(await engine.answer(_chat("hello")))

    assert _run(toy, ask)
    assert "secret" not in caplog.text


def test_likelihoods_are_the_backends(toy: CausalLM) -> None:
    softs = [_soft(toy, seed) for seed in range(40)]

    async def ask(engine: InProcessEngine) -> list[float]:
        found, _ = await asyncio.gather(
            engine.likelihoods("hello", "5", softs=softs), engine.answer(_chat("meanwhile"))
        )
        return found

    found = _run(toy, ask)
    for soft, value in zip(softs[::7], found[::7], strict=True):
        assert value == pytest.approx(-float(toy.loss(PromptBatch(["hello"], soft), ["5"])[0]), abs=1e-4)
