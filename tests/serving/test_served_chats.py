"""Chats through OpenAI's client: every user message gets a persona, and feedback takes effect immediately."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from click.testing import CliRunner
from live_server import CONFIG, open_service, running, served
from plugs import head_of
from vllm_stand_in import WIDTH, StandIn, read_embeds

from personaplug.cli.main import main
from personaplug.data.records import Chat, HistoryItem
from personaplug.data.task_registry import CHAT
from personaplug.inference import respond
from personaplug.llm.base import PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run, open_models
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.engines.in_process import InProcessEngine
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.service import Service
from personaplug.serving.setup import open_service as open_run

STYLE = replace(CONFIG, answer_channel="style", label_prior="none")
QUESTIONS = ["What is tea?", "And coffee?", "In one sentence, please.", "Thank you!"]
USERS = {"ann": "tea!!! yay", "bob": "A drink, Sir.", "carl": "it is leaves in water"}


def open_chats(toy: CausalLM, folder: Path, *, engine: Engine | None = None, **settings: Any) -> Service:
    """Open a service with a chat plug that distinguishes the kinds of items."""
    service = open_service(toy, folder, task=CHAT, config=STYLE, engine=engine, **settings)
    torch.nn.init.normal_(_kinds_of(service.personas.plug), generator=torch.Generator().manual_seed(0))
    return service


def _kinds_of(plug: PersonaPlug) -> torch.nn.Parameter:
    kinds = head_of(plug).projector.kind
    assert isinstance(kinds, torch.nn.Parameter)
    return kinds


@dataclass
class Chats:
    """A served chat plug, on one of the engines.

    Attributes:
        soft: the soft tokens of each request, in order; None for the plain model.
        prompts: the prompt of each request that the engine read, as text.
    """

    url: str
    service: Service
    stand_in: StandIn | None = None
    soft: list[torch.Tensor | None] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def ask(self, user: str, *questions: str, **fields: Any) -> Any:
        """Send a chat in which the answers to earlier questions are "well"; return the raw reply."""
        turns: list[Any] = [{"role": "system", "content": "Be kind."}]
        for question in questions:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "well"}]
        client: Any = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        options = {"model": self.service.engine.models[0], "max_tokens": 6, "temperature": 0} | fields
        return client.chat.completions.with_raw_response.create(messages=turns[:-1], user=user, **options)

    def persona(self, user: str, question: str = QUESTIONS[0]) -> torch.Tensor:
        """Return the current soft tokens for a question of a user."""
        self.ask(user, question)
        soft = self.soft[-1]
        assert soft is not None
        return soft

    def post(self, user: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/users/{user}/history", json=body)

    def items(self, user: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = httpx.get(f"{self.url}/v1/users/{user}/history").json()["items"]
        return items


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on chats that all begin with the same words."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    (folder / "data" / "task.json").write_text(json.dumps({"name": "Chats", "kind": "chat"}))
    for split in ("train", "dev"):
        questions, golds = [], []
        for number in range(24):
            answer = {"id": "1", "question": "Hi?", "answer": "Hello" + "!" * (number % 3)}
            profile = [answer, {"id": "2", "question": "Hi?", "rejected": "Yo"}, {"id": "3", "preference": "Be brief."}]
            context = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
            sample = {"id": f"{split}{number}", "user_id": f"{split} {number % 6}", "input": f"Tell me of {number}"}
            questions.append(sample | {"profile": profile} | ({"context": context} if number % 2 else {}))
            golds.append({"id": f"{split}{number}", "output": f"well{'!' * (number % 3)}"})
        (folder / "data" / f"{split}_questions.json").write_text(json.dumps(questions))
        outputs = {"task": "Chats", "golds": golds}
        (folder / "data" / f"{split}_outputs.json").write_text(json.dumps(outputs))
    toy = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false"]
    words = ["train", "--data", str(folder / "data"), "--out", str(folder / "run"), *toy]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_trained_chat_run_serves_any_message(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="personaplug")
    run = Run.open(trained)
    assert run.wordings == ()
    service = open_run(run, ServingConfig(str(tmp_path / "h.db"), keep_text=True))
    assert "every user message of a chat" in caplog.text
    assert "wording" not in caplog.text
    assert service.personas.plug.known_items(np.array([0, 1, 2], dtype=np.int8)).tolist() == [0, 1, 2]
    with served(service) as url:
        chats = Chats(url, service)
        for user, answer in USERS.items():
            chats.post(user, question="Hi?", answer=answer)
        for prompt in ("Tell me of 5", "Rate this film from 1 to 5."):
            assert chats.ask("ann", "Hi.", prompt).headers["x-personaplug-persona"] == "user"


def test_respond_skips_item_kinds_that_training_did_not_have(trained: Path) -> None:
    run = Run.open(trained)
    models = open_models(run.config)
    plug = run.load_plug("plug", seed=run.config.training.seeds[0], models=models)
    answer = HistoryItem("1", (("question", "Hi?"), ("answer", "Hello!!")), "answer")
    items = [
        answer,
        replace(answer, id="2", kind="rejection"),
        HistoryItem("3", (("preference", "No."),), kind="preference"),
    ]
    counts = []

    class Counting(Personalizer):
        def encode(self, items: Any, *, encoder: Any) -> Any:
            history = super().encode(items, encoder=encoder)
            counts.append(len(history))
            return history

    for _ in range(2):
        respond("Tell me", items, run=run, models=models, personalizer=Counting(plug), config=run.config.evaluation)
        torch.nn.init.zeros_(_kinds_of(plug))
    assert counts == [3, 1]


def _record(chats: Chats, toy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = chats.service.engine
    respond = engine.respond

    async def recorded(request: EngineRequest) -> EngineReply:
        reply = await respond(request)
        chats.soft.append(None if request.soft is None else request.soft.vectors)
        prepared: Any = request.prepared
        if chats.stand_in:
            chats.prompts.append(json.dumps(chats.stand_in.bodies[-1]["messages"]))
        else:
            chats.prompts.append(toy.prompt_tokenizer.decode_raw(prepared.prompt.ids))
        return reply

    monkeypatch.setattr(engine, "respond", recorded)


@pytest.fixture(params=["embedded", "vllm"])
def chats(
    request: pytest.FixtureRequest, toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Chats]:
    if request.param == "embedded":
        service = open_chats(toy, tmp_path)
        with served(service) as url:
            chats = Chats(url, service)
            _record(chats, toy, monkeypatch)
            yield chats
        return
    stand_in = StandIn()
    with running(stand_in.app) as address:
        table = EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)
        engine = VLLMEngine(address, table=table, width=WIDTH, placement="suffix")
        service = open_chats(toy, tmp_path, engine=engine)
        with served(service) as url:
            chats = Chats(url, service, stand_in)
            _record(chats, toy, monkeypatch)
            yield chats


@pytest.fixture
def embedded(toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chats]:
    service = open_chats(toy, tmp_path)
    assert isinstance(service.engine, InProcessEngine)
    with served(service) as url:
        chats = Chats(url, service)
        _record(chats, toy, monkeypatch)
        yield chats


def test_chat_of_four_turns_with_three_users(chats: Chats) -> None:
    for user, answer in USERS.items():
        assert chats.post(user, question="Hi?", answer=answer).status_code == 200
    for turn in range(1, 5):
        soft = {}
        for user in USERS:
            raw = chats.ask(user, *QUESTIONS[:turn])
            assert raw.headers["x-personaplug-persona"] == "user"
            assert "x-personaplug-reason" not in raw.headers
            assert isinstance(raw.parse().choices[0].message.content, str)
            soft[user] = chats.soft[-1]
            assert all(text in chats.prompts[-1] for text in ("Be kind.", *QUESTIONS[:turn]))
            assert chats.prompts[-1].count("well") == turn - 1
        ann, bob, carl = soft.values()
        assert ann is not None
        assert bob is not None
        assert carl is not None
        assert not torch.equal(ann, bob)
        assert not torch.equal(bob, carl)
        assert not torch.equal(ann, carl)


def test_persona_is_computed_for_the_last_message(chats: Chats) -> None:
    for number in range(3):
        chats.post("ann", question=f"question {number}", answer=f"answer {number}!")
    chats.ask("ann", "another", "question 1")
    service = chats.service
    history = service.store.load_history("default", "ann")
    expected = service.personas.personalizer.persona("question 1", history).vectors
    assert chats.soft[-1] is not None
    torch.testing.assert_close(chats.soft[-1], expected)
    if chats.stand_in:
        (part,) = chats.stand_in.bodies[-1]["messages"][-1]["content"]
        torch.testing.assert_close(read_embeds(part["data"]), expected[0].bfloat16())


def test_thumbs_down_changes_the_next_answer(chats: Chats) -> None:
    chats.post("ann", question="Hi?", answer="Hello.")
    raw = chats.ask("ann", *QUESTIONS[:2])
    text, before = raw.parse().choices[0].message.content.strip(), chats.persona("ann")
    request = raw.headers["x-request-id"]
    assert chats.post("ann", request_id=request, rating="down").json() == {
        "new": 1,
        "replaced": 0,
        "same": 0,
        "removed": 0,
    }
    item = chats.items("ann")[-1]
    assert (item["kind"], item["question"], item["rejected"]) == ("rejection", QUESTIONS[1], text)
    after = chats.persona("ann")
    assert not torch.equal(before, after)
    assert chats.post("ann", request_id=request, rating="up").json()["removed"] == 1
    assert [(item["kind"], item.get("answer")) for item in chats.items("ann")] == [
        ("answer", "Hello."),
        ("answer", text),
    ]
    assert not torch.equal(after, chats.persona("ann"))


def test_preference_takes_effect_immediately_until_an_erasure(chats: Chats) -> None:
    plug = chats.service.personas.plug
    plug.cold_start = ColdStart(max_items=3)
    population, endpoint = chats.persona("ann"), f"{chats.url}/v1/users/ann/preferences"
    chats.post("ann", question="Hi?", answer="Hello.")
    raw = chats.ask("ann", QUESTIONS[0])
    assert (raw.headers["x-personaplug-persona"], raw.headers["x-personaplug-reason"]) == ("population", "few-items")
    assert httpx.put(endpoint, json={"preferences": ["Short answers, please."]}).json()["new"] == 1
    raw = chats.ask("ann", QUESTIONS[0])
    short = chats.soft[-1]
    assert (raw.headers["x-personaplug-persona"], raw.headers["x-personaplug-items"]) == ("user", "2")
    assert short is not None
    assert not torch.equal(short, population)
    assert httpx.put(endpoint, json={"preferences": ["Long answers with many examples"]}).json()["removed"] == 1
    assert not torch.equal(chats.persona("ann"), short)
    assert httpx.delete(f"{chats.url}/v1/users/ann").status_code == 200
    assert torch.equal(chats.persona("ann"), population)
    assert httpx.get(endpoint).json() == {"user": "ann", "count": 0, "preferences": []}


def test_streamed_chat_accepts_a_rating(chats: Chats) -> None:
    stream: Any = chats.ask("ann", QUESTIONS[0], stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in stream.parse())
    request = stream.headers["x-request-id"]
    assert chats.post("ann", request_id=request, rating="up").json()["new"] == 1
    assert chats.items("ann")[0]["answer"] == text.strip()


TOOLS = [{"type": "function", "function": {"name": "clock"}}]


@pytest.mark.parametrize(
    ("messages", "fields", "reason"),
    [
        ([("user", "x" * 200)], {}, None),
        ([("system", "Be kind."), ("user", "a"), ("user", "b")], {}, None),
        ([("developer", "Be kind."), ("user", "Rate this review: tea")], {}, None),
        ([("user", "a"), ("assistant", "I would")], {}, "off-task"),
        ([("system", "Tell a joke.")], {}, "off-task"),
        ([("user", "  ")], {}, "off-task"),
        ([("user", "a")], {"personaplug": {"persona_scale": 0}}, "persona-scale"),
    ],
)
def test_every_user_message_gets_a_persona(
    embedded: Chats, messages: list[tuple[str, str]], fields: dict[str, Any], reason: str | None
) -> None:
    embedded.post("ann", question="Hi?", answer="Hello.")
    turns = [{"role": role, "content": text} for role, text in messages]
    body = {"messages": turns, "user": "ann", "max_tokens": 4, **fields}
    reply = httpx.post(f"{embedded.url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get("x-personaplug-reason") == reason
    assert (embedded.soft[-1] is None) == (reason is not None)


def test_chat_that_offers_tools_or_ends_with_their_result_is_plain(toy: CausalLM, tmp_path: Path) -> None:
    stand_in = StandIn()
    with running(stand_in.app) as address:
        table = EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)
        engine = VLLMEngine(address, table=table, width=WIDTH, placement="suffix")
        with served(open_chats(toy, tmp_path, engine=engine)) as url:
            httpx.post(f"{url}/v1/users/ann/history", json={"question": "Hi?", "answer": "Hello."})
            question: dict[str, Any] = {"role": "user", "content": "What time is it?"}
            result = {"role": "tool", "content": "noon", "tool_call_id": "1"}
            call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
            calling = {"role": "assistant", "content": None, "tool_calls": [call]}
            for messages, fields, persona in (
                ([question], {"tools": TOOLS}, "plain"),
                ([question], {"tools": TOOLS, "tool_choice": "none"}, "user"),
                ([question, calling, result], {"tools": TOOLS}, "plain"),
                ([question, calling, result], {}, "plain"),
                ([question, calling, result, question], {}, "user"),
            ):
                body = {"messages": messages, "user": "ann", **fields}
                reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
                assert reply.headers["x-personaplug-persona"] == persona, reply.text


def test_completion_gets_no_persona_from_a_chat_task(embedded: Chats) -> None:
    embedded.post("ann", question="Hi?", answer="Hello.")
    body = {"prompt": "Once upon a time", "user": "ann", "max_tokens": 4}
    reply = httpx.post(f"{embedded.url}/v1/completions", json=body, timeout=30)
    assert (reply.headers["x-personaplug-persona"], reply.headers["x-personaplug-reason"]) == ("plain", "off-task")
    refused = embedded.post("ann", request_id=reply.headers["x-request-id"], rating="up")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_the_task")
    embedded.service.apply_off_task = True
    reply = httpx.post(f"{embedded.url}/v1/completions", json=body, timeout=30)
    assert reply.headers["x-personaplug-persona"] == "user"


def test_task_route_describes_a_chat_task(embedded: Chats) -> None:
    about = httpx.get(f"{embedded.url}/v1/task").json()
    assert (about["kind"], about["wordings"], about["labels"]) == ("chat", ["{query}"], [])
    assert (about["item_fields"], about["answer_field"]) == (["question", "answer"], "answer")
    assert about["item_kinds"] == ["answer", "rejection", "preference"]


def test_explanation_covers_preferences_older_than_the_latest_items(embedded: Chats) -> None:
    limit = embedded.service.personas.plug.config.max_history
    old = {"preference": "Short answers.", "date": "2001-01-01"}
    many = [{"question": f"q {number}", "answer": "a", "date": "2020-01-01"} for number in range(limit + 5)]
    assert embedded.post("ann", items=[old, *many]).json()["new"] == limit + 6
    endpoint = f"{embedded.url}/v1/users/ann/explain"
    explanation = httpx.post(endpoint, json={"prompt": QUESTIONS[0], "most": limit}, timeout=60).json()
    assert explanation["items_used"] == limit
    items = {item["id"]: item for item in explanation["items"]}
    (stated,) = [item for item in items.values() if item["kind"] == "preference"]
    assert stated["preference"] == "Short answers."
    assert stated["weight"] == pytest.approx(0.5, abs=0.01), "untrained, it gets half of the weight"
    service = embedded.service
    history = service.store.load_history("default", "ann", latest=limit)
    assert len(history) == limit
    expected = service.personas.personalizer.persona(QUESTIONS[0], history).vectors
    torch.testing.assert_close(embedded.persona("ann"), expected)


def test_explanation_of_a_chat_uses_its_turns(embedded: Chats, toy: CausalLM) -> None:
    embedded.post("ann", items=[{"question": f"q {number}", "answer": "tea!" * number} for number in range(3)])
    turns = [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello."), ("user", "What is tea?")]
    messages = [{"role": role.replace("system", "developer"), "content": text} for role, text in turns]
    endpoint, answer = f"{embedded.url}/v1/users/ann/explain", "A drink."
    explanation = httpx.post(endpoint, json={"messages": messages, "answer": answer}, timeout=30).json()
    loss = toy.loss(PromptBatch([Chat(tuple(turns))], SoftPrompt(embedded.persona("ann"), "suffix")), [answer])[0]
    assert explanation["log_likelihood"]["with_persona"] == pytest.approx(-float(loss), abs=1e-3)
    alone = httpx.post(endpoint, json={"prompt": "What is tea?", "answer": answer}, timeout=30).json()
    assert [item["weight"] for item in alone["items"]] != []
    assert alone["log_likelihood"] != explanation["log_likelihood"]
    for body, code in (
        ({"messages": messages[:3]}, "not_the_task"),
        ({"messages": [*messages[:-1], {"role": "user", "content": "x" * 100_000}]}, "context_length_exceeded"),
        ({"messages": messages, "prompt": "What is tea?"}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({}, "invalid_value"),
    ):
        assert httpx.post(endpoint, json=body).json()["error"]["code"] == code


def test_rejections_count_only_if_the_plug_was_trained_with_some(embedded: Chats) -> None:
    embedded.post("ann", question="Hi?", answer="Hello.")
    before = embedded.persona("ann")
    embedded.post("ann", question="Hi?", rejected="Yo.")
    assert not torch.equal(embedded.persona("ann"), before)
    torch.nn.init.zeros_(_kinds_of(embedded.service.personas.plug))
    embedded.service.personas.forget("default", "ann")
    raw = embedded.ask("ann", QUESTIONS[0])
    assert raw.headers["x-personaplug-items"] == "1"
    assert embedded.soft[-1] is not None
    torch.testing.assert_close(embedded.soft[-1], before)
    explanation = httpx.post(f"{embedded.url}/v1/users/ann/explain", json={"prompt": "x"}).json()
    assert [item["kind"] for item in explanation["items"]] == ["answer"]
