"""The embedded engine answers concurrent requests like single ones."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from live_server import engine_request, run_engine

from personaplug.errors import EngineFailure, RequestError
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.in_process import InProcessEngine

Scenario = Callable[[InProcessEngine], Coroutine[Any, Any, Any]]


def _soft(toy: CausalLM, seed: int) -> SoftPrompt:
    draw = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(1, 2, toy.identity.width, generator=draw) * toy.embedding_scale, placement="suffix")


def _chat(text: str, soft: SoftPrompt | None = None, **fields: Any) -> EngineRequest:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0} | fields
    choices = body.pop("choices", ())
    return engine_request("chat", body, soft, choices, id="r1")


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


def test_concurrent_requests_get_the_same_answers_as_single_ones(toy: CausalLM) -> None:
    questions = [_chat(f"question {n}", _soft(toy, n) if n % 3 else None, max_tokens=3 + n % 7) for n in range(40)]

    async def synchronized(engine: InProcessEngine) -> list[str]:
        return [_text(reply) for reply in await asyncio.gather(*map(engine.respond, questions))]

    answers = run_engine(toy, synchronized, max_rows=8)
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        config = GenerationConfig(max_new_tokens=(question.body.model_extra or {})["max_tokens"])
        expected = toy.generate(PromptBatch([f"question {number}"], question.soft), config)[0]
        assert answer.strip() == expected.text


def test_stream_equals_the_whole_reply(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> tuple[str, str]:
        question = _chat("hello", _soft(toy, 1), max_tokens=20)
        streamed = await engine.respond(_chat("hello", _soft(toy, 1), max_tokens=20, stream=True))
        return _text(await engine.respond(question)), await _streamed(streamed)

    whole, streamed = run_engine(toy, ask)
    assert whole == streamed
    assert whole


def test_usage_and_finish_reason_are_reported(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> tuple[EngineReply, list[dict[str, Any]]]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return await engine.respond(_chat("hey", _soft(toy, 1))), await _events(
            await engine.respond(_chat("hey", _soft(toy, 1), **options))
        )

    whole, events = run_engine(toy, ask)
    body = json.loads(whole.body)
    prompt_tokens = len(toy.prompt_tokenizer.encode_prompt("hey").ids) + 2
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": prompt_tokens + 8,
    }
    assert body["choices"][0]["finish_reason"] == "length"
    assert (events[-1]["usage"], events[-1]["choices"]) == (body["usage"], [])
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_stop_text_ends_the_answer_and_is_never_sent(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> tuple[str, str, str]:
        free = _text(await engine.respond(_chat("hello", max_tokens=30)))
        stop = free[4:7]
        whole = _text(await engine.respond(_chat("hello", max_tokens=30, stop=["never there", stop])))
        streamed = await _streamed(await engine.respond(_chat("hello", max_tokens=30, stop=stop, stream=True)))
        return free[: free.index(stop)], whole, streamed

    cut, whole, streamed = run_engine(toy, ask)
    assert whole == streamed == cut


def test_answer_is_one_of_the_choices(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> set[str]:
        requests = [_chat(f"rate {n}", _soft(toy, n), choices=("1", "2", "10 stars"), max_tokens=1) for n in range(20)]
        return {_text(reply) for reply in await asyncio.gather(*map(engine.respond, requests))}

    assert run_engine(toy, ask) <= {"1", "2", "10 stars"}


def test_completion_does_not_use_the_chat_template(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> dict[str, Any]:
        reply = await engine.respond(
            engine_request("completion", {"prompt": "abc", "max_tokens": 4, "temperature": 0}, None)
        )
        assert isinstance(reply.body, bytes)
        body: dict[str, Any] = json.loads(reply.body)
        return body

    body = run_engine(toy, ask)
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == 3
    assert isinstance(body["choices"][0]["text"], str)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"n": 9}, "invalid_value"),
        ({"presence_penalty": 3}, "invalid_value"),
        ({"frequency_penalty": "1"}, "invalid_value"),
        ({"logit_bias": {"5": 101}}, "invalid_value"),
        ({"logit_bias": {"257": 1}}, "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "invalid_value"),
        ({"logit_bias": {"long long": 1}}, "invalid_value"),
        ({"logit_bias": {"long long " * 9: "x"}}, "invalid_value"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "invalid_value"),
        ({"top_logprobs": 3}, "invalid_value"),
        ({"tools": [{"type": "function"}]}, "unsupported"),
        ({"response_format": {"type": "json_object"}, "stop": "}"}, "invalid_value"),
        ({"response_format": {"type": "grammar"}}, "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value"),
        ({"personaplug": {"probabilities": True}}, "unsupported"),
        ({"choices": ("1", "2"), "presence_penalty": 1}, "unsupported"),
        ({"choices": ("1", "2"), "logit_bias": {"5": 1}}, "unsupported"),
        ({"choices": ("1", "2"), "response_format": {"type": "json_object"}}, "unsupported"),
        ({"temperature": -1}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": "8"}, "invalid_value"),
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
def test_unsupported_request_is_refused(toy: CausalLM, fields: dict[str, Any], code: str) -> None:
    async def ask(engine: InProcessEngine) -> Any:
        with pytest.raises(RequestError) as refused:
            await engine.respond(_chat("hello", **fields))
        return refused.value

    error = run_engine(toy, ask)
    assert (error.code, error.http_status) == (code, 400)
    assert "long long" not in str(error)


def test_neutral_fields_are_accepted(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> str:
        fields: dict[str, Any] = {
            "n": 1,
            "tools": [],
            "frequency_penalty": 0,
            "logit_bias": None,
            "service_tier": "auto",
        }
        return _text(await engine.respond(_chat("hello", **fields)))

    assert run_engine(toy, ask)


@pytest.mark.parametrize("read", [0, 1, 3])
def test_closed_stream_frees_its_row(toy: CausalLM, read: int) -> None:
    async def ask(engine: InProcessEngine) -> str:
        for _ in range(5):
            reply = await engine.respond(_chat("endless", max_tokens=4000, stream=True))
            assert not isinstance(reply.body, bytes)
            events = aiter(reply.body)
            for _ in range(read):
                await anext(events)
            await reply.body.aclose()
        # With a single row, this is answered in time only if the closed streams have freed it.
        return _text(await asyncio.wait_for(engine.respond(_chat("hello")), 5))

    assert run_engine(toy, ask, max_rows=1, max_new_tokens=4000)


def test_cancelled_request_frees_its_row(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> str:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.respond(_chat("endless", max_tokens=4000)), 0.05)
        return _text(await asyncio.wait_for(engine.respond(_chat("hello")), 5))

    assert run_engine(toy, ask, max_rows=1, max_new_tokens=4000)


def test_stop_texts_do_not_affect_concurrent_requests(toy: CausalLM) -> None:
    """The model continues until a stop text is found. No request fails, and token counts are constant."""

    async def ask(engine: InProcessEngine) -> list[set[tuple[str, int]]]:
        free = [_text(await engine.respond(_chat(f"question {n}", max_tokens=40))) for n in range(8)]
        results: list[set[tuple[str, int]]] = [set() for _ in free]
        for _ in range(12):
            requests = [_chat(f"question {n}", max_tokens=40, stop=text[5 + n]) for n, text in enumerate(free)]
            for number, reply in enumerate(await asyncio.gather(*map(engine.respond, requests))):
                assert isinstance(reply.body, bytes)
                results[number].add((_text(reply), json.loads(reply.body)["usage"]["completion_tokens"]))
        return results

    assert all(len(answers) == 1 for answers in run_engine(toy, ask))


@pytest.mark.parametrize("odd", [{"temperature": 1e-40}, {"top_p": 1e-50, "temperature": 1}, {"top_p": 0}])
def test_extreme_sampling_values_take_the_likeliest_token(toy: CausalLM, odd: dict[str, Any]) -> None:
    async def ask(engine: InProcessEngine) -> list[str]:
        requests = [_chat("hello", max_tokens=30), _chat("hello", max_tokens=30, **odd), _chat("you", max_tokens=30)]
        return [_text(reply) for reply in await asyncio.gather(*map(engine.respond, requests))]

    greedy, extreme, _ = run_engine(toy, ask)
    assert extreme == greedy


def test_persona_with_nan_is_refused_and_does_not_affect_other_requests(toy: CausalLM) -> None:
    soft = _soft(toy, 1)
    nan_soft = SoftPrompt(soft.vectors * float("nan"), placement="suffix")

    async def ask(engine: InProcessEngine) -> str:
        with pytest.raises(EngineFailure, match="not finite"):
            await engine.respond(_chat("hello", nan_soft))
        return _text(await engine.respond(_chat("hello", soft)))

    assert run_engine(toy, ask)


def test_new_requests_do_not_delay_running_ones(toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, logits, calls = toy.prefill, toy.cached_prefix.logits, list[str]()
    are_submitted = threading.Event()

    def recorded_prefill(*args: Any, **kwargs: Any) -> Any:
        calls.append("p")
        return prefill(*args, **kwargs)

    def recorded_step(*args: Any, **kwargs: Any) -> Any:
        are_submitted.wait(timeout=60)
        calls.append("s")
        return logits(*args, **kwargs)

    monkeypatch.setattr(toy, "prefill", recorded_prefill)
    monkeypatch.setattr(toy.cached_prefix, "logits", recorded_step)

    async def ask(engine: InProcessEngine) -> None:
        long = asyncio.create_task(engine.respond(_chat("long", max_tokens=100)))
        while not calls:
            await asyncio.sleep(0.001)
        shorts = [asyncio.create_task(engine.respond(_chat(f"short {n}", max_tokens=1))) for n in range(60)]
        while len(engine._scheduler._waiting) < len(shorts) - 1:  # one may run already
            await asyncio.sleep(0.001)
        are_submitted.set()
        await asyncio.gather(long, *shorts)

    run_engine(toy, ask, max_rows=2)
    order = "".join(calls)
    assert order.count("s") == 99
    assert order.count("p") > 30
    assert "pp" not in order[1 : order.rindex("s")]  # the long answer gets a token between any two prefills


def test_chosen_label_equals_that_of_an_evaluation(toy: CausalLM) -> None:
    labels = ("politics", "pop", "sports news", "science", "7")
    softs = [_soft(toy, seed) for seed in range(30)]

    async def ask(engine: InProcessEngine) -> list[str]:
        turns = [[{"role": "user", "content": f"which {n}"}] for n in range(len(softs))]
        requests = [
            engine_request("chat", {"messages": turn}, soft, labels) for turn, soft in zip(turns, softs, strict=True)
        ]
        return [_text(reply) for reply in await asyncio.gather(*map(engine.respond, requests))]

    for number, (soft, answer) in enumerate(zip(softs, run_engine(toy, ask), strict=True)):
        scores = toy.score(PromptBatch([f"which {number}"], soft), labels)[0]
        assert answer == labels[int(scores.argmax())]


def test_close_finishes_running_requests(toy: CausalLM) -> None:
    async def ask() -> tuple[str, str]:
        engine = InProcessEngine(toy, name="toy")
        await engine.start()
        running = asyncio.create_task(engine.respond(_chat("hello", max_tokens=40)))
        await asyncio.sleep(0.05)
        await engine.close()
        assert not await engine.is_ready()
        with pytest.raises(EngineFailure):
            await engine.respond(_chat("hello"))
        return _text(await running), toy.generate(PromptBatch(["hello"]), GenerationConfig(max_new_tokens=40))[0].text

    answer, expected = asyncio.run(ask())
    assert answer.strip() == expected


def test_model_failure_does_not_affect_later_requests(
    toy: CausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("with the user's secret in it")

    async def ask(engine: InProcessEngine) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(toy, "prefill", broken)
            with pytest.raises(EngineFailure) as failed:
                await engine.respond(_chat("hello"))
            assert "secret" not in str(failed.value)
        return _text(await engine.respond(_chat("hello")))

    assert run_engine(toy, ask)
    assert "secret" not in caplog.text


def test_log_likelihoods_equal_those_of_the_model(toy: CausalLM) -> None:
    softs = [_soft(toy, seed) for seed in range(40)]

    async def ask(engine: InProcessEngine) -> list[float]:
        values, _ = await asyncio.gather(
            engine.log_likelihoods("hello", "5", softs=softs), engine.respond(_chat("meanwhile"))
        )
        return values

    values = run_engine(toy, ask)
    for soft, value in zip(softs[::7], values[::7], strict=True):
        assert value == pytest.approx(-float(toy.loss(PromptBatch(["hello"], soft), ["5"])[0]), abs=1e-4)


def test_rows_continue_while_threads_use_the_model(toy: CausalLM) -> None:
    lengths: list[int] = []

    async def ask(engine: InProcessEngine) -> str:
        answer = asyncio.create_task(engine.respond(_chat("hello", max_tokens=40)))

        def keep_busy() -> None:
            while not answer.done():
                engine._scheduler.run_and_wait(
                    lambda: lengths.extend(len(job.row.ids) for job in engine._scheduler._running)
                )

        await asyncio.gather(*(asyncio.to_thread(keep_busy) for _ in range(4)))
        return _text(await answer)

    async def ask_alone(engine: InProcessEngine) -> str:
        return _text(await engine.respond(_chat("hello", max_tokens=40)))

    assert run_engine(toy, ask) == run_engine(toy, ask_alone)
    assert len(set(lengths)) > 10, "the threads take turns with the rows"
