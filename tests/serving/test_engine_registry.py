"""Engines are opened by name, and one from outside the package answers requests."""

from __future__ import annotations

import httpx
import pytest
from live_server import open_service, served

from personaplug.config import Config
from personaplug.errors import ConfigError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines import find_engine, register_engine
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.openai_protocol import ReplyFormatter, to_json


class CountingEngine(Engine):
    """An engine that answers with the number of soft tokens."""

    models = ("counting",)

    async def respond(self, request: EngineRequest) -> EngineReply:
        formatter = ReplyFormatter(request.body.kind, model="counting", request_id=request.id)
        text = f"{request.soft.tokens if request.soft else 0} soft tokens"
        return EngineReply(to_json(formatter.whole(text, reason="stop", usage={})))


@pytest.mark.parametrize("name", ["counting", "counting://somewhere:7"])
def test_engine_from_outside_answers_a_request(
    toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = open_service(toy, tmp_path)
    monkeypatch.setattr("personaplug.serving.engines._ENGINES", {})
    register_engine("counting", lambda model, config, load_plug: (CountingEngine(), load_plug(None)))
    opened = find_engine(name).open(Config().model, ServingConfig("h.db", engine=name), lambda _: service.personas.plug)
    service.engine = opened[0]
    body = {"messages": [{"role": "user", "content": "review: a film"}]}
    with served(service) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
        reply = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        explained = httpx.post(f"{url}/v1/users/ann/explain", json={"prompt": "review: a film", "answer": "5"})
    assert reply["choices"][0]["message"]["content"] == f"{service.personas.plug.config.soft_tokens} soft tokens"
    assert explained.status_code == 404
