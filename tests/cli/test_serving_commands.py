"""The server commands, end to end with toy models."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from free_ports import free_port
from live_server import served

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import LAMP_TASKS
from personaplug.data.records import HistoryItem
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError
from personaplug.llm.causal_lm import CausalLM
from personaplug.run import Run
from personaplug.serving import engines
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines import register_engine
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.listener import bind
from personaplug.serving.openai_protocol import Choice, ReplyFormatter, to_json
from personaplug.serving.setup import open_service
from personaplug.store.history_store import HistoryStore, StoreSettings
from personaplug.store.receipts import Receipt

TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false"]


def _call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a trained `run`."""
    folder = tmp_path_factory.mktemp("serving")
    write_simulation(
        SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=2, max_items=5), folder / "data"
    )
    result = _call("train", "--data", folder / "data", "--out", folder / "run", *TOY)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def question(folder: Path) -> dict[str, Any]:
    questions: list[dict[str, Any]] = json.loads((folder / "data" / "dev_questions.json").read_text())
    return max(questions, key=lambda sample: len(sample["profile"]))


@contextmanager
def _serving(folder: Path, *arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `personaplug serve` in a separate process."""
    port = free_port()
    words = ["serve", "--run", folder / "run", "--port", port, *arguments]
    command = [sys.executable, "-m", "personaplug", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # In a background job of a shell, the test process ignores SIGINT, and its children inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def test_spans_of_the_last_requests_are_exported_at_sigterm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.instrumentation.sqlalchemy", reason="needs the extra `traces`")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # ms; so only the end of the server exports
    with _serving(folder, "--store", tmp_path / "histories.db") as (url, process):
        httpx.get(f"{url}/v1/users/ann/history").raise_for_status()
        process.send_signal(signal.SIGTERM)
        spans, errors = process.communicate(timeout=60)
    assert "GET /v1/users/{user}/history" in spans, errors


def _chat(url: str, question: dict[str, Any], **headers: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": question["input"]}], "user": "ann"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def test_serve_answers_live_users_until_sigterm(folder: Path, question: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "histories.db"
    with _serving(folder, "--store", store, "--keep-text", "--model", "films") as (url, process):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "films"
        items = {"items": question["profile"]}
        count = httpx.post(f"{url}/v1/users/ann/history", json=items).json()["new"]
        assert count == len(question["profile"])
        answer = _chat(url, question)
        assert answer.headers["x-personaplug-items"] == str(count)
        assert answer.json()["choices"][0]["message"]["content"] in ("1", "2", "3", "4", "5")
        long = {"messages": [{"role": "user", "content": "long"}], "max_tokens": 150, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            begun = [next(lines) for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            events = [line for line in (*begun, *lines) if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) > 20  # the server finishes a stream that has started
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        message = process.stderr.read()
        assert "this machine only" in message
        assert "Traceback" not in message
    result = _call("explain", "--run", folder / "run", "--store", store, "--user", "ann", "--prompt", question["input"],
                 "--answer", "5", "--most", 2, "--since", "2000-01-01", "--until", "2100-01-01")  # fmt: skip
    assert result.exit_code == 0, result.output
    explanation = json.loads(result.stdout)
    for words in (("--prompt", question["input"] + "\udcff"), ("--prompt", question["input"], "--answer", "\udcff")):
        refused = _call("explain", "--run", folder / "run", "--store", store, "--user", "ann", *words)
        assert (refused.exit_code, "surrogate" in refused.output) == (2, True)
    assert len(explanation["items"]) == 2
    assert explanation["items"][0]["text"]
    assert "effect" in explanation["items"][0]
    assert (explanation["drift"]["items_before"], explanation["drift"]["items_after"]) == (0, count)
    receipt = _call("erase-user", "--store", store, "--user", "ann")
    assert receipt.exit_code == 0, receipt.output
    assert HistoryStore.open(store).has_issued(Receipt.from_dict(json.loads(receipt.stdout)), user="ann")
    again = _call("erase-user", "--store", store, "--user", "ann")
    assert (again.exit_code, "no such user" in again.output) == (2, True)


def test_serve_accepts_a_created_key_and_stops_on_ctrl_c(
    folder: Path, question: dict[str, Any], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    key = _call("create-key", "shop", "--keys", keys).stdout.strip()
    assert keys.stat().st_mode & 0o077 == 0
    with _serving(folder, "--store", tmp_path / "h.db", "--keys", keys, "--fallback", "plain") as (url, process):
        assert _chat(url, question).status_code == 401
        answer = _chat(url, question, Authorization=f"Bearer {key}")
        assert (answer.status_code, answer.headers["x-personaplug-persona"]) == (200, "plain")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip().endswith("stopped")
    assert "checkpoint" not in errors
    assert "Traceback" not in errors


def test_create_key_refuses_an_empty_tenant_name(tmp_path: Path) -> None:
    result = _call("create-key", "", "--keys", tmp_path / "keys.json")
    assert (result.exit_code, "name of a tenant" in result.output) == (2, True)
    assert not (tmp_path / "keys.json").exists()


def test_serve_refuses_a_public_address_without_keys(folder: Path, tmp_path: Path) -> None:
    result = _call("serve", "--run", folder / "run", "--store", tmp_path / "h.db", "--host", "0.0.0.0")
    assert (result.exit_code, "personaplug create-key" in result.output) == (2, True)
    assert not (tmp_path / "h.db").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nowhere"], "run.json is missing"),
        (["--run", "RUN", "--seed", "7"], "no finished training"),
        (["--run", "RUN", "--keys", "nowhere.json"], "personaplug create-key"),
        (["--run", "RUN", "--max-rows", "0"], "--max-rows"),
        (["--run", "RUN", "--max-requests", "0"], "--max-requests"),
        (["--run", "RUN", "--max-body-mb", "-1"], "--max-body-mb"),
        (["--run", "RUN", "--persona-scale", "-1"], "--persona-scale"),
        (["--run", "RUN", "--persona-scale", "nan"], "not a number"),
        (["--run", "RUN", "--copy-head"], "closed set of labels"),
        (["--run", "RUN", "--engine", "remote"], "Choose one of local, llamacpp, http, https"),
    ],
)
def test_serve_refuses_an_invalid_option(folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    arguments = [str(folder / "run") if word == "RUN" else word for word in words]
    result = _call("serve", *arguments, "--store", tmp_path / "h.db", "--port", "0")
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    "words",
    [
        ("--max-body-mb", "nan"),
        ("--persona-scale", "nan"),
        *(("--engine", address) for address in ("http://[::1", "http://a b", "http://a:99999", "http://", "http:a")),
    ],
)
def test_serve_refuses_nan_and_invalid_addresses(folder: Path, tmp_path: Path, words: tuple[str, str]) -> None:
    result = _call("serve", "--run", folder / "run", "--store", tmp_path / "h.db", "--port", "0", *words)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True)
    assert "not a number" in result.output or "such as http://127.0.0.1:8123" in result.output
    assert not (tmp_path / "h.db").exists()


def test_serve_refuses_a_used_port_before_models_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personaplug.serving.setup.open_service", lambda *_: pytest.fail("models were loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = _call("serve", "--run", folder / "run", "--store", tmp_path / "h.db", "--port", port)
    assert result.exit_code == 2, result.output
    assert f"Cannot listen on 127.0.0.1:{port}" in result.output
    assert not (tmp_path / "h.db").exists()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.1", "127.0.0.1.5", "x" * 300])
def test_bind_refuses_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(ConfigError, match="Cannot listen on"):
        bind(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_bind_reserves_a_free_port_without_listening(host: str) -> None:
    try:
        listener = bind(host, 0)
    except ConfigError:
        pytest.skip("this machine has no such address")
    with listener, socket.socket(listener.family) as caller, pytest.raises(ConnectionRefusedError):
        caller.connect(listener.getsockname())


def test_serve_refuses_a_copy_head_with_vllm(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", config=load_config(overrides=list(TOY)), task=LAMP_TASKS["LaMP_4"])
    given = ("--run", tmp_path / "run", "--store", tmp_path / "h.db", "--copy-head", "--engine", "http://127.0.0.1:9")
    result = _call("serve", *given)
    assert (result.exit_code, "Remove --copy-head" in result.output) == (2, True)
    assert not (tmp_path / "h.db").exists()


def test_serve_reports_an_unreachable_vllm_server(
    folder: Path, tmp_path: Path, toy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)
    monkeypatch.setattr(EmbeddingTable, "of_folder", lambda _: table)  # the toy model has no folder
    monkeypatch.setattr("personaplug.serving.engines.vllm.find_model", Path)
    with closing(logging.FileHandler(tmp_path / "log")) as handler:  # like the log file of a host application
        result = _call("serve", "--run", folder / "run", "--store", tmp_path / "h.db", "--engine", "http://127.0.0.1:9")
        assert handler.stream is not None, "a server closes nobody's log"
    assert (result.exit_code, "Cannot reach a vLLM server at http://127.0.0.1:9" in result.output) == (1, True)


class _CountingEngine(Engine):
    """A plugin engine that answers with the number of soft tokens."""

    models = ("counting",)

    async def respond(self, request: EngineRequest) -> EngineReply:
        formatter = ReplyFormatter(request.body.kind, model="counting", request_id=request.id)
        text = str(request.soft.tokens if request.soft else 0)
        return EngineReply(to_json(formatter.whole([Choice(text, "stop")], usage={})))


@pytest.mark.parametrize("name", ["counting", "counting://somewhere:7"])
def test_registered_engine_answers_requests(
    folder: Path, question: dict[str, Any], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_ENGINES", dict(engines._ENGINES))
    register_engine("counting", lambda model, config, load_plug: (_CountingEngine(), load_plug(None)))
    service = open_service(Run.open(folder / "run"), ServingConfig(str(tmp_path / "h.db"), engine=name))
    with served(service) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
        answer = _chat(url, question)
        assert httpx.post(f"{url}/v1/users/ann/history", json={"items": question["profile"]}).status_code == 200
        explained = httpx.post(f"{url}/v1/users/ann/explain", json={"prompt": question["input"], "answer": "5"})
    assert (answer.headers["x-personaplug-persona"], answer.json()["model"]) == ("population", "counting")
    assert int(answer.json()["choices"][0]["message"]["content"]) == service.personas.plug.config.soft_tokens
    assert (explained.status_code, explained.json()["error"]["code"]) == (400, "unsupported")


def test_serve_refuses_a_store_of_another_encoder(folder: Path, tmp_path: Path) -> None:
    HistoryStore.open(tmp_path / "h.db", HashEncoder(64)).close()
    done = _call("serve", "--run", folder / "run", "--store", tmp_path / "h.db")
    assert done.exit_code == 2
    assert "encoder" in done.output


def test_refill_store_copies_histories_for_another_run(folder: Path, question: dict[str, Any], tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    store = HistoryStore.open(old, HashEncoder(64), settings=StoreSettings(keep_text=True, shards=2))
    store.add(store.admit("default", "ann"), [HistoryItem("1", (("text", "a film"),))])
    words = ("refill-store", "--from", old, "--to", new, "--run", folder / "run")
    for output in ("1 users copied", "0 users copied"):
        done = _call(*words)
        assert (done.exit_code, output in done.output) == (0, True), done.output
    copy = HistoryStore.open(new)
    assert copy.identity.width == 32
    assert copy.list_items("default", "ann")[0].fields == (("text", "a film"),)
    done = _call("serve", "--run", folder / "run", "--store", old)
    assert (done.exit_code, "encoder" in done.output) == (2, True)


def test_refill_store_refuses_a_store_without_texts(folder: Path, tmp_path: Path) -> None:
    HistoryStore.open(tmp_path / "old.db", HashEncoder(64)).close()
    done = _call("refill-store", "--from", tmp_path / "old.db", "--to", tmp_path / "new.db", "--run", folder / "run")
    assert (done.exit_code, "keeps no texts" in done.output) == (2, True)


def test_verify_receipt_accepts_only_the_stores_own_receipts(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", HashEncoder(64), settings=StoreSettings(shards=2))
    store.add(store.admit("default", "ann"), [HistoryItem("1", (("text", "a film"),))])
    receipt = store.erase_user("default", "ann").to_dict()
    for name, values in {"own": receipt, "changed": receipt | {"items": 7}, "other": {"tenant": "default"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)

    def verify(name: str, *words: str) -> tuple[int, str]:
        done = _call("verify-receipt", tmp_path / f"{name}.json", "--store", tmp_path / "h.db", *words)
        return done.exit_code, done.output

    assert verify("own") == (0, "valid\n")
    assert verify("own", "--tenant", "default", "--user", "ann") == (0, "valid\n")
    assert verify("own", "--user", "bob")[0] == 1
    assert verify("changed")[0] == 1
    assert verify("other")[0] == verify("broken")[0] == verify("deep")[0] == 2
