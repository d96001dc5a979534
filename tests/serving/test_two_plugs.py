"""Several plugs behind one server: each request gets the plug of its model, and one model and one store serve all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import live_server
import numpy as np
import pytest
import torch
from browser import open_browser, open_page
from click.testing import CliRunner
from live_server import served

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError, MissingData
from personaplug.inference import generate
from personaplug.llm.causal_lm import CausalLM
from personaplug.plug.attribution import item_weights
from personaplug.run import Models, Run, open_models
from personaplug.serving import engines
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines import register_engine
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.served_task import ServedPlug, ServedTask
from personaplug.serving.service import Service
from personaplug.serving.setup import open_service
from personaplug.training.copy_head_part import COPY_HEAD as COPY_HEAD_PART
from personaplug.training.parts import PLUG, train

TOY = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false")
PROMPT = "Write the following message as this user would write it. message: a rainy day"
QUERY = "a rainy day"
USERS = {"ann": "tea!!! yay", "bob": "A drink, Sir.", "eve": "zebra zebra"}
TOKENS = 12


def _train(folder: Path, data: Path, *settings: str, copies: bool = False) -> Run:
    config = load_config(overrides=[*TOY, *settings])
    run = Run.create(folder, config=config, task=load_task(data))
    parts = [PLUG, COPY_HEAD_PART] if copies else [PLUG]
    train(run, open_dataset(data, "train"), models=open_models(config), parts=parts)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated data sets of messages and of chats."""
    folder = tmp_path_factory.mktemp("plugs")
    for kind in ("style", "manners"):
        write_simulation(
            SimulationConfig(task=kind, users=8, queries_per_user=2, dev_users=2, min_items=2, max_items=5),
            folder / kind,
        )
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    """A run, the run that replaces it, both with a copy head, and a run of another task."""
    return {
        "old": _train(folder / "old", folder / "style", copies=True),
        "new": _train(folder / "new", folder / "style", "seeds=1", "instruction_start=random", copies=True),
        "chats": _train(folder / "chats", folder / "manners"),
    }


@pytest.fixture(scope="module")
def models(runs: dict[str, Run]) -> Models:
    return open_models(runs["old"].config)


def _open(runs: dict[str, Run], folder: Path, *names: str, **settings: Any) -> Service:
    config = ServingConfig(str(folder / "histories.db"), model="old", keep_text=True, **settings)
    return open_service(runs["old"], config, plugs={name: [runs[name]] for name in names})


@pytest.fixture
def service(runs: dict[str, Run], tmp_path: Path) -> Service:
    return _open(runs, tmp_path, "new", "chats")


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service) as base_url:
        yield base_url


def _items(user: str) -> list[dict[str, Any]]:
    days = [f"2026-01-{number + 1:02d}" for number in range(6)]
    return [{"id": f"{user} {day}", "text": f"{USERS[user]} {day}", "date": day} for day in days]


def _add(url: str, *users: str) -> None:
    for user in users:
        httpx.post(f"{url}/v1/users/{user}/history", json={"items": _items(user)}, timeout=60).raise_for_status()


def _ask(url: str, model: str | None, user: str | None, prompt: str = PROMPT) -> httpx.Response:
    named = {} if model is None else {"model": model}
    turns = [{"role": "user", "content": prompt}]
    body = {"messages": turns, "max_tokens": TOKENS, "temperature": 0, "user": user} | named
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()


def _text(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"]).strip()


def _expected(run: Run, models: Models, user: str, *, copies: bool = False) -> str:
    """Return the answer of one call, without a server."""
    config = replace(run.config.evaluation, max_new_tokens=TOKENS, num_beams=1)
    history = [HistoryItem(item["id"], (("text", item["text"]),), "text") for item in _items(user)]
    head = run.load_copy_head(models.llm, seed=run.config.training.seeds[0]) if copies else None
    return str(generate(run, PROMPT, history=history, models=models, copy_head=head, config=config))


@pytest.mark.parametrize("copies", [False, True])
def test_concurrent_requests_get_the_answer_of_their_users_and_their_models_plug(
    runs: dict[str, Run], models: Models, tmp_path: Path, copies: bool
) -> None:
    pairs = list(itertools.product(("old", "new"), USERS))
    expected = {(name, user): _expected(runs[name], models, user, copies=copies) for name, user in pairs}
    for user in USERS:
        assert expected["old", user] != expected["new", user]
    with served(_open(runs, tmp_path, "new", copy_head=copies)) as url, ThreadPoolExecutor(8) as pool:
        _add(url, *USERS)
        asked = pairs * 4  # the first round fills the caches
        replies = list(pool.map(lambda pair: _ask(url, *pair), asked))
    for pair, reply in zip(asked, replies, strict=True):
        assert (pair, _text(reply)) == (pair, expected[pair])
        assert reply.json()["model"] == pair[0]
        assert reply.headers["x-personaplug-persona"] == "user"
        assert reply.headers.get("x-personaplug-copy-head") == ("true" if copies else None)


def test_each_plug_has_its_own_cached_personas(service: Service, url: str) -> None:
    _add(url, "ann")
    _ask(url, "old", "ann")
    assert [plug.personas.cached_users for plug in service.plugs] == [1, 0, 0]
    _ask(url, "new", "ann")
    ticket = service.store.admit("default", "ann")
    history = service.store.load_history("default", "ann")
    softs = []
    for plug in service.plugs[:2]:
        persona = plug.personas.persona(ticket, query=QUERY)
        assert persona.cached
        assert persona.soft is not None
        torch.testing.assert_close(persona.soft.vectors, plug.personas.personalizer.persona(QUERY, history).vectors)
        softs.append(persona.soft.vectors)
    assert not torch.allclose(softs[0], softs[1], atol=1e-3)
    httpx.delete(f"{url}/v1/users/ann").raise_for_status()
    assert [plug.personas.cached_users for plug in service.plugs] == [0, 0, 0]


def test_all_plugs_are_listed_and_an_unknown_model_is_refused(url: str) -> None:
    names = ["old", "new", "chats"]
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == names
    assert httpx.get(f"{url}/v1/models/new").json()["id"] == "new"
    assert _ask(url, None, None).json()["model"] == "old"
    body = {"model": "newer", "messages": [{"role": "user", "content": PROMPT}]}
    for refused in (
        httpx.get(f"{url}/v1/models/newer"),
        httpx.post(f"{url}/v1/chat/completions", json=body),
        httpx.get(f"{url}/v1/task?model=newer"),
        httpx.post(f"{url}/v1/users/ann/history?model=newer", json={"items": _items("ann")}),
        httpx.post(f"{url}/v1/users/ann/explain?model=newer", json={"prompt": PROMPT}),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "Use one of old, new, chats." in refused.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/users/ann/history").json()["count"] == 0


def test_explanation_drift_and_map_are_of_the_named_plug(service: Service, url: str) -> None:
    _add(url, *USERS)
    history = service.store.load_history("default", "ann")
    found, drifts, maps = [], [], []
    for plug in service.plugs[:2]:
        query = {"model": service.name_of(plug)}
        explained = httpx.post(f"{url}/v1/users/ann/explain", params=query, json={"prompt": PROMPT, "answer": "tea"})
        by_id = {item["id"]: item["weight"] for item in explained.raise_for_status().json()["items"]}
        weights = item_weights(plug.personas.personalizer, QUERY, history)
        np.testing.assert_allclose([by_id[item["id"]] for item in _items("ann")], weights, rtol=1e-4)
        found.append(explained.json()["log_likelihood"]["with_persona"])
        days = query | {"since": "2026-01-02", "until": "2026-01-06"}
        drifts.append(httpx.get(f"{url}/v1/users/ann/drift", params=days).raise_for_status().json())
        maps.append(httpx.get(f"{url}/v1/personas", params=query).raise_for_status().json()["users"])
    for first, second in (found, drifts, maps):
        assert first != second


def test_items_and_feedback_have_the_fields_of_the_plug_that_answered(url: str) -> None:
    chat = {"question": "What is tea?", "answer": "tea!!! yay"}
    refused = httpx.post(f"{url}/v1/users/ann/history", json={"items": [chat]})
    assert refused.status_code == 400
    added = httpx.post(f"{url}/v1/users/ann/history?model=chats", json={"items": [chat]})
    assert added.json()["new"] == 1
    for model, prompt in (("new", PROMPT), ("chats", "And coffee?")):
        request = _ask(url, model, "ann", prompt).headers["x-request-id"]
        feedback = {"request_id": request, "answer": f"by {model}"}
        httpx.post(f"{url}/v1/users/ann/history", json=feedback).raise_for_status()
    items = httpx.get(f"{url}/v1/users/ann/history").json()["items"]
    fields = [{name: item[name] for name in item if name in ("text", "question", "answer")} for item in items]
    assert fields == [chat, {"text": "by new"}, {"question": "And coffee?", "answer": "by chats"}]


def test_rating_without_its_text_has_the_field_of_the_plug_that_has_the_label(toy: CausalLM, tmp_path: Path) -> None:
    """The first plug's task is to write messages; the store keeps no texts, so an item is its label."""
    films = live_server.open_service(toy, tmp_path, keep_text=False)
    messages = replace(live_server.TASK, name="Messages", kind="text", answer_field="written", labels=())
    plugs = [ServedPlug((ServedTask.of(live_server.TASK, films.personas),), "films")]
    with served(Service(films.personas, films.engine, task=messages, plugs=plugs)) as url:
        body = {"items": [{"text": "tea", "score": "4"}]}
        httpx.post(f"{url}/v1/users/ann/history?model=films", json=body).raise_for_status()
        (item,) = httpx.get(f"{url}/v1/users/ann/history").json()["items"]
    assert (item.get("score"), item.get("written")) == ("4", None)


def test_task_and_preferences_describe_the_named_plug(service: Service, url: str) -> None:
    tasks = [httpx.get(f"{url}/v1/task", params=query).json()["name"] for query in ({}, {"model": "chats"})]
    assert tasks == ["Simulated_style", "Manners"]
    kinds = service.plugs[2].personas.plug.persona
    assert kinds is not None
    assert kinds.projector.kind is not None
    torch.nn.init.ones_(kinds.projector.kind)  # as after a training with preferences and rejections
    for query, used in (({}, False), ({"model": "chats"}, True)):
        body = {"preferences": ["Be brief."]}
        assert httpx.put(f"{url}/v1/users/ann/preferences", params=query, json=body).json()["used"] is used


def test_metrics_count_each_model_alone(url: str) -> None:
    _add(url, "ann")
    for model, user in (("old", None), ("new", "ann"), ("new", "ann")):
        _ask(url, model, user)
    refused = {"model": "new", "messages": [{"role": "user", "content": PROMPT}], "tools": [{}]}
    assert httpx.post(f"{url}/v1/chat/completions", json=refused).status_code == 400
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    route = 'route="/v1/chat/completions"'
    for line in (
        f'personaplug_requests_total{{model="old",{route},status="200"}} 1.0',
        f'personaplug_requests_total{{model="new",{route},status="200"}} 2.0',
        f'personaplug_requests_total{{model="new",{route},status="400"}} 1.0',
        f'personaplug_request_seconds_count{{model="new",{route}}} 3.0',
        'personaplug_personas_total{applied="population",cached="true",model="old"} 1.0',
        'personaplug_personas_total{applied="user",cached="false",model="new"} 1.0',
        'personaplug_personas_total{applied="user",cached="true",model="new"} 1.0',
        'personaplug_cached_users{model="old"} 0.0',
        'personaplug_cached_users{model="new"} 1.0',
    ):
        assert line in lines


def test_plugs_of_other_models_or_without_a_copy_head_are_refused(
    runs: dict[str, Run], folder: Path, tmp_path: Path
) -> None:
    others = {
        "encoder": _train(tmp_path / "encoder", folder / "style", "encoder=hash:48"),
        "llm": _train(tmp_path / "llm", folder / "style", "llm=toy:1"),
    }
    known = runs | others
    for name, message in (
        ("encoder", "--run-for encoder: its plug was trained with another encoder"),
        ("llm", "--run-for llm: its plug was trained with another language model"),
    ):
        with pytest.raises(ConfigError, match=message):
            _open(known, tmp_path, name)
    with pytest.raises(MissingData, match=r"chats/plug.copy-head/seed-0 contains no finished training"):
        _open(runs, tmp_path, "chats", copy_head=True)
    assert not (tmp_path / "histories.db").exists()


class _RemoteEngine(Engine):
    """An engine that checks the model and the placement of soft tokens when it starts, as vLLM's does."""

    models = ("old",)
    is_remote = True

    async def respond(self, request: EngineRequest) -> EngineReply:
        raise NotImplementedError


def test_remote_engine_needs_plugs_of_one_placement(
    runs: dict[str, Run], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_ENGINES", dict(engines._ENGINES))
    register_engine("remote", lambda model, config, load_plug: (_RemoteEngine(), load_plug(None)))
    other = _train(tmp_path / "prefix", folder / "style", "placement=prefix")
    with pytest.raises(ConfigError, match="--run-for prefix: with vLLM, its plug needs the same placement"):
        _open(runs | {"prefix": other}, tmp_path, "prefix", engine="remote")
    assert _open(runs, tmp_path, "new", engine="remote").models == ("old", "new")


def test_serve_opens_the_named_runs_and_refuses_bad_names(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Service] = []
    monkeypatch.setattr("personaplug.serving.app.serve", lambda service, **_: opened.append(service))
    options = ["serve", "--run", str(runs["old"].folder), "--store", str(tmp_path / "h.db"), "--port", "0"]

    def call(*words: str) -> Any:
        return CliRunner().invoke(main, [*options, *words])

    new = f"v2={runs['new'].folder}"
    assert call("--model", "v1", "--run-for", new).exit_code == 0
    assert opened[0].models == ("v1", "v2")
    for words, message in (
        (["--run-for", "runs/new"], "is not NAME=RUN"),
        (["--run-for", "=runs/new"], "is not NAME=RUN"),
        (["--run-for", new, "--run-for", new], "occurs twice"),
        (["--run-for", "v2=nowhere"], "run.json is missing"),
    ):
        done = call(*words)
        assert (done.exit_code, message in done.output) == (2, True), done.output


def test_plug_with_the_name_of_the_model_is_refused_at_start(runs: dict[str, Run], tmp_path: Path) -> None:
    options = ("--run", runs["old"].folder, "--store", tmp_path / "h.db", "--port", 0, "--model", "v1")
    words = ["serve", *options, "--run-for", f"v1={runs['new'].folder}"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert (done.exit_code, "needs its own name in requests; found v1, v1" in done.output) == (2, True), done.output


@pytest.mark.slow
def test_playground_asks_and_explains_with_the_chosen_model(runs: dict[str, Run], tmp_path: Path) -> None:
    with served(_open(runs, tmp_path, "new"), has_playground=True) as url:
        _add(url, *USERS)
        with open_browser() as browser, open_page(browser, f"{url}/") as page:
            page.locator("#map svg").wait_for()
            page.get_by_label("Model", exact=True).select_option("new")
            asked: list[str] = []
            page.on("request", lambda request: asked.append(f"{request.url} {request.post_data}"))
            page.locator("#model").filter(has_text="Model: new.").wait_for()
            assert page.get_by_label("Model", exact=True).input_value() == "new"
            page.locator(".column.first").get_by_text("History (6 items)").wait_for()
            page.get_by_label("Question", exact=True).fill(QUERY)
            page.get_by_role("button", name="Ask all three").click()
            why = page.locator(".column.first").get_by_role("button", name="Why this answer?")
            why.click()
            page.locator(".column.first .effects li").first.wait_for()
    sent = [request for request in asked if "/completions" in request]
    assert len(sent) == 3
    assert all('"model":"new"' in request for request in sent)
    others = [request for request in asked if any(name in request for name in ("/explain", "/personas", "/task"))]
    assert all("model=new" in request.partition(" ")[0] for request in others)
