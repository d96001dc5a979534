"""Every code block of docs/clients.md runs unchanged, for two users with different personas."""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from client_page import blocks
from client_programs import run_program, running_program
from free_ports import free_port
from recording_server import QUESTIONS, USERS, RecordingServer, assert_persona, recording

from personaplug.cli.main import main
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.openai_protocol import ChatRequest

pytest_plugins = ["client_fixtures"]

BLOCKS = blocks()
SERVER, PROXY = "http://127.0.0.1:8000", "http://127.0.0.1:4000"
RUN_BY_TESTS = {
    "Clients": ["sh", "sh"],
    "curl": ["sh"],
    "openai (Python)": ["python"],
    "openai (JavaScript)": ["javascript"],
    "LiteLLM (SDK)": ["python"],
    "LiteLLM (proxy)": ["yaml", "sh", "python"],
    "LangChain": ["python"],
    "LangChain: structured output": ["python"],
    "openai: structured output": ["python"],
    "LlamaIndex": ["python"],
    "A key for each user": ["sh"],
}


def test_every_block_is_short_and_has_a_test() -> None:
    languages = {heading: [block.language for block in section] for heading, section in BLOCKS.items() if section}
    assert languages == RUN_BY_TESTS
    for section in BLOCKS.values():
        assert all(len([line for line in block.code.splitlines() if line]) <= 10 for block in section)


def _block(heading: str, language: str) -> str:
    (code,) = [block.code for block in BLOCKS[heading] if block.language == language]
    return code


def _check_recipe(
    server: RecordingServer, code: str, run: Callable[[str], str], *, first_answer: str | None = None
) -> None:
    """Check a recipe's two requests: persona, earlier turns, stream, and printed text.

    `first_answer` is the assistant message of the second request, if it differs from the reply to the first request.
    """
    printed, personas = {}, {}
    for user in USERS:
        own_code = code.replace('"ann"', f'"{user}"').replace(SERVER, server.url)
        printed[user], requests = server.asked(partial(run, own_code))
        assert [request.body.prompt_text for request in requests] == list(QUESTIONS)
        personas[user] = server.persona(user, QUESTIONS[1])
        assert_persona(requests[0], server.persona(user, QUESTIONS[0]))
        assert_persona(requests[1], personas[user])
        assert not requests[0].body.stream
        assert requests[1].body.stream
        answer = server.answer(user, QUESTIONS[0])
        earlier = first_answer or answer
        assert isinstance(requests[1].body, ChatRequest)
        assert [turn.text for turn in requests[1].body.messages] == [QUESTIONS[0], earlier, QUESTIONS[1]]
        assert printed[user] == f"{answer}\n{server.answer(user, QUESTIONS[0], earlier, QUESTIONS[1])}"
    assert not torch.equal(personas["ann"], personas["bob"])
    assert printed["ann"] != printed["bob"]


def _run_here(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "recipe", "exec", dont_inherit=True), {})
    return output.getvalue()


def test_openai_python(server: RecordingServer) -> None:
    _check_recipe(server, _block("openai (Python)", "python"), _run_here)


def _run_shell(code: str) -> str:
    """Run a curl block; return the texts of its reply and its stream in the form that other blocks print."""
    reply, _, stream = run_program(["bash", "-euc", code]).partition("data: ")
    events = [json.loads(event) for event in stream.removesuffix("data: [DONE]\n\n").split("data: ")]
    pieces = [choice["delta"].get("content", "") for event in events for choice in event["choices"]]
    return f"{json.loads(reply)['choices'][0]['message']['content']}\n{''.join(pieces)}"


def _needs_curl() -> None:
    version = run_program(["curl", "--version"]) if shutil.which("curl") else "curl 0.0"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (7, 82):
        pytest.skip("curl is not installed, or is older than 7.82, which has --json")


def test_curl(server: RecordingServer) -> None:
    _needs_curl()
    _check_recipe(server, _block("curl", "sh"), _run_shell, first_answer="A drink.")


def test_page_adds_the_histories(toy: CausalLM, tmp_path: Path) -> None:
    _needs_curl()
    with recording(toy, tmp_path, users=()) as server:
        run_program(["bash", "-euc", BLOCKS["Clients"][1].code.replace(SERVER, server.url)])
        for user, answer in USERS.items():
            (item,) = server.get(f"/v1/users/{user}/history").json()["items"]
            assert (item["question"], item["answer"]) == ("Hi?", answer)


def _personaplug(command: str) -> str:
    """Run a command of the package; return its output."""
    done = CliRunner().invoke(main, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_user_key(toy: CausalLM, tmp_path: Path) -> None:
    """A user key from the page's command is enough for a client that cannot name the user."""
    command = _block("A key for each user", "sh").replace("keys.json", str(tmp_path / "keys.json"))
    keys = {user: _personaplug(command.replace("ann", user)) for user in USERS}
    tenant_key = _personaplug(command.replace("--user ann", ""))
    code = _block("openai (Python)", "python").replace(', "user": "ann"', "")
    with recording(toy, tmp_path, api_keys=ApiKeys.load(tmp_path / "keys.json"), key=tenant_key) as server:
        softs = {}
        for user, key in keys.items():
            own_code = code.replace(SERVER, server.url).replace('"none"', f'"{key}"')
            _, requests = server.asked(partial(_run_here, own_code))
            assert_persona(requests[0], server.persona(user, QUESTIONS[0], tenant="shop"))
            softs[user] = requests[0].soft
        assert softs["ann"] is not None
        assert softs["bob"] is not None
        assert not torch.equal(softs["ann"].vectors, softs["bob"].vectors)


@pytest.mark.slow
def test_openai_javascript(server: RecordingServer, node_folder: Path) -> None:
    def run(code: str) -> str:
        (node_folder / "recipe.mjs").write_text(code)
        return run_program(["node", "recipe.mjs"], folder=node_folder)

    _check_recipe(server, _block("openai (JavaScript)", "javascript"), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "module"),
    [("LiteLLM (SDK)", "litellm"), ("LangChain", "langchain_openai"), ("LlamaIndex", "llama_index")],
)
def test_python_library(
    server: RecordingServer, client_python: Callable[[str], Path], heading: str, module: str
) -> None:
    python = client_python(module)
    _check_recipe(server, _block(heading, "python"), lambda code: run_program([python, "-c", code]))


def _check_structured(
    server: RecordingServer, code: str, run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine, "max_new_tokens", 60)
    for user in USERS:
        own_code = code.replace('"ann"', f'"{user}"').replace(SERVER, server.url)
        printed, (request,) = server.asked(partial(run, own_code))
        assert re.fullmatch(r"name='(tea|coffee)' hot=(True|False)\n", printed)
        assert_persona(request, server.persona(user, request.body.prompt_text))


def test_structured_output_of_openai(server: RecordingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_structured(server, _block("openai: structured output", "python"), _run_here, monkeypatch)


@pytest.mark.slow
def test_structured_output_of_langchain(
    server: RecordingServer, client_python: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    python, code = client_python("langchain_openai"), _block("LangChain: structured output", "python")
    _check_structured(server, code, lambda code: run_program([python, "-c", code]), monkeypatch)


@pytest.mark.slow
def test_litellm_proxy(
    server: RecordingServer,
    client_python: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LITELLM_MASTER_KEY", f"sk-{secrets.token_hex(24)}")
    programs, address = client_python("litellm").parent, f"http://127.0.0.1:{free_port()}"
    (tmp_path / "litellm.yaml").write_text(_block("LiteLLM (proxy)", "yaml").replace(SERVER, server.url))
    command = _block("LiteLLM (proxy)", "sh").replace("4000", address.rpartition(":")[2])
    command = command.replace("litellm.yaml", str(tmp_path / "litellm.yaml"))
    words, ready = [str(programs / "litellm"), *command.split()[1:]], f"{address}/health/liveliness"
    with running_program(words, output=tmp_path / "output.txt", ready_url=ready):
        code = _block("LiteLLM (proxy)", "python").replace(PROXY, address)
        _check_recipe(server, code, _run_here)


@pytest.mark.slow
def test_page_starts_a_server(tmp_path: Path) -> None:
    """Run the page's commands in order, with a trained run: `serve`, two histories, curl."""
    _needs_curl()
    run = _train(tmp_path)
    address = f"http://127.0.0.1:{free_port()}"
    serve, histories = (block.code for block in BLOCKS["Clients"])
    serve = serve.replace("RUN", str(run)).replace("histories.db", str(tmp_path / "histories.db"))
    words = [sys.executable, "-m", *serve.split(), "--port", address.rpartition(":")[2]]
    with running_program(words, output=tmp_path / "output.txt", ready_url=f"{address}/ready"):
        run_program(["bash", "-euc", histories.replace(SERVER, address)])
        code = _block("curl", "sh").replace(SERVER, address).replace("-sS", "-sSi")
        for user in USERS:
            output = run_program(["bash", "-euc", code.replace('"ann"', f'"{user}"')])
            assert output.count("x-personaplug-persona: user") == 2
            assert output.endswith("data: [DONE]\n\n")


def _train(folder: Path) -> Path:
    """Train a chat run briefly, with toy models."""
    data = folder / "data"
    data.mkdir()
    (data / "task.json").write_text(json.dumps({"name": "Chats", "kind": "chat"}))
    for split in ("train", "dev"):
        ids = [f"{split}{number}" for number in range(8)]
        profile = [{"id": "1", "question": "Hi?", "answer": "Hello!"}]
        questions = [{"id": i, "user_id": i, "input": f"Tell me of {i}", "profile": profile} for i in ids]
        golds = [{"id": i, "output": "well!"} for i in ids]
        (data / f"{split}_questions.json").write_text(json.dumps(questions))
        (data / f"{split}_outputs.json").write_text(json.dumps({"task": "Chats", "golds": golds}))
    settings = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false"]
    run = folder / "run"
    _personaplug(shlex.join(["personaplug", "train", "--data", str(data), "--out", str(run), *settings]))
    return run
