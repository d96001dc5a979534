"""A GGUF file in llama.cpp answers concurrent users like single ones, and like the embedded engine."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from gguf_model import SMOLLM, needs_llamacpp, open_gguf, run_engine, spelled
from live_server import engine_request

from personaplug.errors import EngineFailure, RequestError
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import Slot
from personaplug.llm.loading import load_hf
from personaplug.llm.prompt_tokenizer import TokenizedPrompt
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines import llamacpp_model
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.llamacpp import LlamaCppEngine
from personaplug.serving.engines.llamacpp_batch import LlamaBatch
from personaplug.serving.engines.llamacpp_model import LlamaModel, Span

pytestmark = needs_llamacpp

QUESTION = "Which score would this user give? film: A western"
LABELS = ("1", "2", "10 stars", "very good", "very bad indeed")
TEXTS = ["", "Paris", " two  spaces\n\nlines", "naïve 你好 🙂 don't 12,345", "<|im_end|> <|im_start|>user", "a" * 300]


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaModel]:
    model = open_gguf()
    yield model
    model.close()


@pytest.fixture(scope="module")
def smollm() -> CausalLM:
    llm = load_hf(SMOLLM, dtype="float32")
    assert isinstance(llm, CausalLM)
    return llm


def _chat(text: str, soft: SoftPrompt | None = None, **fields: Any) -> EngineRequest:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0} | fields
    choices = body.pop("choices", ())
    return engine_request("chat", body, soft, choices, id="r1")


def _body(reply: EngineReply) -> dict[str, Any]:
    assert isinstance(reply.body, bytes)
    body: dict[str, Any] = json.loads(reply.body)
    return body


def _texts(reply: EngineReply) -> list[str]:
    return [str(choice["message"]["content"]) for choice in _body(reply)["choices"]]


def _asked(model: LlamaModel, llm: CausalLM, *requests: EngineRequest) -> list[EngineReply]:
    """Return the replies to concurrent requests."""

    async def ask(engine: LlamaCppEngine) -> list[EngineReply]:
        return list(await asyncio.gather(*map(engine.respond, requests)))

    return run_engine(model, llm, ask)


def _slot(prompt: TokenizedPrompt, soft: SoftPrompt | None = None) -> Slot:
    return Slot(prompt, soft, GenerationConfig(max_new_tokens=2), top_logprobs=5)


def _noise(llm: CausalLM, seed: int) -> SoftPrompt:
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, 4, llm.identity.width, generator=draw) * llm.embedding_scale
    return SoftPrompt(vectors, placement=("suffix", "prefix")[seed % 2])


def test_tokens_of_texts_are_those_of_llama_cpp(model: LlamaModel, smollm: CausalLM) -> None:
    for text in TEXTS:
        assert smollm.prompt_tokenizer.texts.encode(text, inside=True) == model.tokenize(text)


def test_chat_template_and_end_tokens_are_those_of_the_file(model: LlamaModel, smollm: CausalLM) -> None:
    assert model.chat_template == smollm.prompt_tokenizer.tokenizer.chat_template
    assert set(smollm.end_ids) <= set(model.end_ids)


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_embedded_words_have_the_logits_of_the_words(model: LlamaModel, smollm: CausalLM, placement: str) -> None:
    prompt, words = smollm.prompt_tokenizer.encode_prompt(QUESTION), " I like it very much"
    at = prompt.soft_position if placement == "prefix" else len(prompt.ids)
    parts = [prompt.ids[:at], model.tokenize(words), prompt.ids[at:]]
    whole = TokenizedPrompt(tuple(chain.from_iterable(parts)), 0, truncated=False)
    slots = [_slot(prompt, spelled(model, words, placement=placement)), _slot(whole), _slot(prompt)]
    for slot in slots:
        LlamaBatch(model, end_ids=[], scale=1.0, rows=1).add([slot])
    embedded, spelled_out, without = [dict(slot.logprobs[0].top) for slot in slots]
    assert embedded == pytest.approx(spelled_out, abs=1e-3)
    assert without != pytest.approx(spelled_out, abs=0.1)


def test_labels_have_nearly_the_probabilities_of_the_embedded_engine(model: LlamaModel, smollm: CausalLM) -> None:
    for seed in range(2):
        drawn = _noise(smollm, seed)
        soft = SoftPrompt(drawn.vectors, drawn.placement, label_bias=torch.tensor([[0.0, 3.0, 0.0, -1.0, 0.5]]))
        expected = smollm.score(PromptBatch([QUESTION], soft), LABELS)[0].softmax(-1)
        request = _chat(QUESTION, soft, choices=LABELS, personaplug={"probabilities": True})
        (reply,) = _asked(model, smollm, request)
        found = _body(reply)["personaplug"]["probabilities"]
        assert found == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=0.1)
        assert _texts(reply) == [max(found, key=found.__getitem__)]


def test_label_bias_decides_the_answer(model: LlamaModel, smollm: CausalLM) -> None:
    vectors = _noise(smollm, 0).vectors
    softs = [SoftPrompt(vectors, "suffix", label_bias=50 * row[None]) for row in torch.eye(len(LABELS))]
    replies = _asked(model, smollm, *(_chat(QUESTION, soft, choices=LABELS) for soft in softs))
    assert [_texts(reply) for reply in replies] == [[label] for label in LABELS]


@pytest.mark.slow
def test_many_labels_are_scored_in_groups(model: LlamaModel, smollm: CausalLM) -> None:
    labels = tuple(f"number {n}" if n % 3 else f"a strange answer {n}" for n in range(20))
    expected = smollm.score(PromptBatch([QUESTION]), labels)[0].log_softmax(-1).tolist()
    (reply,) = _asked(model, smollm, _chat(QUESTION, choices=labels, personaplug={"probabilities": True}))
    found = _body(reply)["personaplug"]["probabilities"]
    assert [math.log(found[label]) for label in labels] == pytest.approx(expected, abs=1)
    assert max(expected) - min(expected) > 4


def test_concurrent_users_get_the_same_answers_as_single_ones(model: LlamaModel, smollm: CausalLM) -> None:
    words = ["The capital of France is", "The opposite of black is", "One, two, three,"]
    requests = [_chat(QUESTION, spelled(model, text), max_tokens=1 + n) for n, text in enumerate(words)]
    alone = [_texts(_asked(model, smollm, request)[0])[0] for request in requests]
    assert [_texts(reply)[0] for reply in _asked(model, smollm, *requests)] == alone
    assert [text.split()[0].strip(".,") for text in alone] == ["Paris", "white", "four"]


def test_soft_tokens_of_other_users_change_nothing(model: LlamaModel, smollm: CausalLM) -> None:
    prompt = smollm.prompt_tokenizer.encode_prompt(QUESTION)
    mine = _noise(smollm, 0)
    found = []
    for seed in (2, 4):  # the shapes are the same, so the results are the same numbers
        slots = [_slot(prompt, mine), *(_slot(prompt, _noise(smollm, seed + 10 * n)) for n in range(3))]
        batch = LlamaBatch(model, end_ids=[], scale=1.0, rows=4)
        batch.add(slots)
        batch.step()
        found.append([[each.top for each in slot.logprobs] for slot in slots])
    assert found[0][0] == found[1][0]
    assert all(first != second for first, second in zip(found[0][1:], found[1][1:], strict=True))


@pytest.mark.slow
def test_answer_is_that_of_the_embedded_engine(model: LlamaModel, smollm: CausalLM) -> None:
    ids = smollm.prompt_tokenizer.texts.encode("The capital of France is", inside=True)
    soft = SoftPrompt(smollm.embed(torch.tensor([ids])), placement="suffix")
    expected = smollm.generate(PromptBatch(["Tell me something."], soft), GenerationConfig(max_new_tokens=2))[0]
    (reply,) = _asked(model, smollm, _chat("Tell me something.", soft, max_tokens=2))
    assert _texts(reply)[0].strip() == expected.text
    assert "Paris" in expected.text


@pytest.mark.slow
def test_several_answers_share_the_prompt_and_follow_their_seeds(model: LlamaModel, smollm: CausalLM) -> None:
    request = _chat(QUESTION, _noise(smollm, 0), n=2, seed=5, temperature=1.0, top_p=0.9)
    first, second = (_asked(model, smollm, request)[0] for _ in range(2))
    assert _texts(first) == _texts(second)
    assert len(set(_texts(first))) == 2
    (alone,) = _asked(model, smollm, _chat(QUESTION, _noise(smollm, 0), seed=5, temperature=1.0, top_p=0.9))
    assert _texts(alone) == _texts(first)[:1]


def test_stream_equals_the_whole_reply_and_ends_at_a_stop_text(model: LlamaModel, smollm: CausalLM) -> None:
    async def ask(engine: LlamaCppEngine) -> tuple[str, str, str]:
        soft = spelled(model, "One, two, three,")
        free = _texts(await engine.respond(_chat("Count.", soft, max_tokens=12)))[0]
        whole = _texts(await engine.respond(_chat("Count.", soft, max_tokens=12, stop="five")))[0]
        reply = await engine.respond(_chat("Count.", soft, max_tokens=12, stop="five", stream=True))
        assert not isinstance(reply.body, bytes)
        events = [chunk.decode().removeprefix("data: ") async for chunk in reply.body]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
        return free, whole, "".join(delta.get("content", "") for delta in deltas)

    free, whole, streamed = run_engine(model, smollm, ask)
    assert whole == streamed == free[: free.index("five")]


@pytest.mark.slow
def test_options_of_free_text_change_the_answer(model: LlamaModel, smollm: CausalLM) -> None:
    soft = spelled(model, "The capital of France is")
    paris = smollm.prompt_tokenizer.texts.encode(" Paris", inside=True)[0]
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"enum": ["Rome", "Oslo"]}}}
    replies = _asked(
        model,
        smollm,
        _chat("Tell me.", soft, logit_bias={str(paris): -100}),
        _chat("Tell me.", soft, response_format=schema, max_tokens=20),
        _chat("Tell me.", soft, logprobs=True, top_logprobs=2),
    )
    assert "Paris" not in _texts(replies[0])[0]
    assert json.loads(_texts(replies[1])[0]) in ("Rome", "Oslo")
    positions = _body(replies[2])["choices"][0]["logprobs"]["content"]
    assert positions[0]["token"] == " Paris"
    assert len(positions) == 6
    assert all(len(position["top_logprobs"]) == 2 for position in positions)


@pytest.mark.slow
def test_cancelled_answer_frees_its_row(model: LlamaModel, smollm: CausalLM) -> None:
    async def ask(engine: LlamaCppEngine) -> list[str]:
        reply = await engine.respond(_chat("Tell me a long story.", max_tokens=64, stream=True))
        assert not isinstance(reply.body, bytes)
        await anext(reply.body)
        await reply.body.aclose()
        return _texts(await engine.respond(_chat("Say yes.", max_tokens=2)))

    assert run_engine(model, smollm, ask, max_rows=1) == _texts(
        _asked(model, smollm, _chat("Say yes.", max_tokens=2))[0]
    )


def test_prompt_that_is_too_long_is_refused(model: LlamaModel, smollm: CausalLM) -> None:
    async def ask(engine: LlamaCppEngine) -> None:
        for text in ("word " * 300, "x" * 100_000):
            with pytest.raises(RequestError, match="256 tokens") as refused:
                await engine.respond(_chat(text))
            assert refused.value.http_status == 400
        with pytest.raises(RequestError, match="does not support 'tools'"):
            await engine.respond(_chat("hi", tools=[{"type": "function"}]))

    run_engine(model, smollm, ask, max_tokens=256)


def test_failure_of_llama_cpp_ends_only_the_running_requests(
    model: LlamaModel, smollm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(engine: LlamaCppEngine) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(model, "decode", _failing)
            with pytest.raises(EngineFailure):
                await engine.respond(_chat("Say yes.", max_tokens=2))
        return _texts(await engine.respond(_chat("Say yes.", max_tokens=2)))

    def _failing(spans: Sequence[Any]) -> list[torch.Tensor]:
        raise RuntimeError("llama_decode returned 1")

    assert run_engine(model, smollm, ask) == _texts(_asked(model, smollm, _chat("Say yes.", max_tokens=2))[0])


def test_long_prompts_are_run_in_parts(model: LlamaModel, smollm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_model, "_BATCH_TOKENS", 16)
    ids = tuple(smollm.prompt_tokenizer.texts.encode("The weather was fine. " * 9)[:40])
    slot = _slot(TokenizedPrompt(ids, 0, truncated=False))
    LlamaBatch(model, end_ids=[], scale=1.0, rows=1).add([slot])
    model.clear()
    for start in (0, 16, 32):
        (expected,) = model.decode([Span(0, start, ids=ids[start : start + 16])])[0].log_softmax(-1)
    assert slot.logprobs[0].top == [(int(token), float(expected[token])) for token in expected.topk(5).indices]
