"""A service of several tasks: the wording selects a prompt's task, and the fields select a record's task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from live_server import served

from personaplug.cli.main import main
from personaplug.data.records import HistoryItem
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.task import Task
from personaplug.data.task_prompts import TaskPrompts, find_task
from personaplug.data.wording import Wording
from personaplug.errors import RequestError
from personaplug.serving.config import ServingConfig
from personaplug.serving.feedback import items_of_records
from personaplug.serving.service import Service
from personaplug.serving.setup import log_tasks, open_service
from personaplug.shared_run import open_runs

FILM = (
    "Which score from 1 to 5 would this user give to the following film? just answer with 1, 2, 3, 4, or 5 without "
    "further explanation. film: A quiet western about a lost farmer."
)
LABELS = {"1", "2", "3", "4", "5"}
RATING = {"text": "A slow western.", "score": 5, "date": "2026-01-01"}
CHAT = {"question": "What is tea?", "answer": "tea!!! yay", "date": "2026-01-02"}
TOY = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, a run of ratings and chats, and a run of ratings and messages."""
    folder = tmp_path_factory.mktemp("shared")
    for kind in ("rating", "manners", "style"):
        simulation = SimulationConfig(task=kind, users=8, queries_per_user=2, dev_users=4, min_items=2, max_items=5)
        write_simulation(simulation, folder / kind)
    for name, kinds in (("chatty", ("manners", "rating")), ("written", ("rating", "style"))):
        words = [word for kind in kinds for word in ("--data", str(folder / kind))]
        done = _call("train", *words, "--out", folder / name, *TOY)
        assert done.exit_code == 0, done.output
    return folder


def _call(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def _open(run: Path, store: Path) -> Service:
    first, *others = open_runs(run)
    return open_service(first, ServingConfig(str(store), keep_text=True), others=others)


@pytest.fixture
def service(folder: Path, tmp_path: Path) -> Service:
    return _open(folder / "chatty", tmp_path / "h.db")


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service) as base_url:
        yield base_url


def _ask(url: str, prompt: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": prompt}], "user": "ann", "max_tokens": 6, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply


def _text(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"]).strip()


def _add(url: str, *records: dict[str, Any], user: str = "ann") -> httpx.Response:
    return httpx.post(f"{url}/v1/users/{user}/history", json={"items": list(records)}, timeout=60)


def test_wording_selects_the_task_of_a_prompt(url: str) -> None:
    assert _add(url, RATING, CHAT).json()["new"] == 2
    rated, chatted = _ask(url, FILM), _ask(url, "What is coffee?")
    assert _text(rated) in LABELS
    assert _text(chatted) not in LABELS
    for reply in (rated, chatted):
        assert reply.headers["x-personaplug-persona"] == "user"
        assert reply.headers["x-personaplug-items"] == "2"
    summary = _ask(url, "Sum up the plot of this film: A quiet western.")
    assert summary.headers["x-personaplug-persona"] == "user"
    assert _text(summary) not in LABELS


def test_each_task_uses_its_own_plug(url: str, service: Service) -> None:
    _add(url, RATING, CHAT)
    ticket = service.store.admit("default", "ann")
    instructions = []
    for task in service.plugs[0].tasks:
        soft = task.personas.persona(ticket, query="tea").soft
        assert soft is not None
        expected = task.personas.plug.instruction * task.personas.plug.spec.embedding_scale
        torch.testing.assert_close(soft.vectors[0, : len(expected)], expected)
        instructions.append(expected)
    assert not torch.equal(*instructions)
    assert {task.personas.store for task in service.plugs[0].tasks} == {service.store}


def test_without_a_chat_task_other_prompts_are_plain(folder: Path, tmp_path: Path) -> None:
    with served(_open(folder / "written", tmp_path / "h.db")) as url:
        _add(url, RATING)
        assert _text(_ask(url, FILM)) in LABELS
        other = _ask(url, "What is coffee?")
        assert other.headers["x-personaplug-persona"] == "plain"
        assert other.headers["x-personaplug-reason"] == "off-task"


def test_feedback_becomes_an_item_of_the_task_that_answered(url: str) -> None:
    for prompt, answer in ((FILM, "4"), ("What is coffee?", "A drink!")):
        request = _ask(url, prompt).headers["x-request-id"]
        done = httpx.post(f"{url}/v1/users/ann/history", json={"request_id": request, "answer": answer})
        assert done.status_code == 200, done.text
    items = httpx.get(f"{url}/v1/users/ann/history").json()["items"]
    fields = [{name: item[name] for name in item if name in ("text", "score", "question", "answer")} for item in items]
    assert fields == [
        {"text": "A quiet western about a lost farmer.", "score": "4"},
        {"question": "What is coffee?", "answer": "A drink!"},
    ]


def test_numeric_text_is_stored_without_a_label(url: str, service: Service) -> None:
    _add(url, RATING, CHAT | {"answer": "5"})
    request = _ask(url, "What is coffee?").headers["x-request-id"]
    assert httpx.post(f"{url}/v1/users/ann/history", json={"request_id": request, "answer": "1984"}).is_success
    items = service.store.list_items("default", "ann")
    assert [(item.answer, item.label_id) for item in items] == [("5", 4), ("5", -1), ("1984", -1)]
    assert [item.answer_labels for item in items] == [None, (), ()]  # so a copy of the store has no labels either


def test_erasure_drops_the_cached_personas_of_all_tasks(url: str, service: Service) -> None:
    _add(url, RATING, CHAT)
    for prompt in (FILM, "What is coffee?"):
        _ask(url, prompt)
    assert [task.personas.cached_users for task in service.plugs[0].tasks] == [1, 1]
    assert 'personaplug_cached_users{model="toy"} 2.0' in httpx.get(f"{url}/metrics").text
    assert httpx.delete(f"{url}/v1/users/ann").status_code == 200
    assert [task.personas.cached_users for task in service.plugs[0].tasks] == [0, 0]


def test_task_route_lists_all_tasks(url: str) -> None:
    tasks = httpx.get(f"{url}/v1/task").json()["tasks"]
    assert [(task["name"], task["kind"]) for task in tasks] == [("Manners", "chat"), ("Simulated_rating", "rating")]
    assert all("item_kinds" in task for task in tasks)


def test_record_of_no_task_is_refused_with_the_fields_of_all_tasks(url: str) -> None:
    reply = _add(url, {"title": "secret"})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert "item 1: its fields fit no task" in message
    assert "Manners: question, answer; Simulated_rating: text, score" in message
    assert "secret" not in message


def test_wording_selects_the_task_of_an_explanation(url: str, service: Service) -> None:
    _add(url, RATING, CHAT)
    for prompt, answer in ((FILM, "5"), ("What is coffee?", "A drink!")):
        reply = httpx.post(f"{url}/v1/users/ann/explain", json={"prompt": prompt, "answer": answer}, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.json()["items_used"] == 2


def test_rejected_answers_and_preferences_are_accepted_with_several_tasks(url: str) -> None:
    rejected = {"question": "What is tea?", "rejected": "A drink, Sir."}
    assert _add(url, rejected, {"preference": "Be brief."}).json()["new"] == 2
    kinds = [item["kind"] for item in httpx.get(f"{url}/v1/users/ann/history").json()["items"]]
    assert sorted(kinds) == ["preference", "rejection"]


TEXT = Task("Text", "text", ("text",), None, ("rouge_1",), query_after="text: ")
POST = Task("Post", "text", ("text",), "title", ("rouge_1",), query_after="post: ")
FILMS = Task("Films", "rating", ("text",), "score", ("mae",), labels=("1", "2"), query_after="film: ")
BOOKS = Task("Books", "rating", ("text",), "score", ("mae",), labels=("1", "2", "3"), query_after="book: ")


def _read(record: dict[str, Any], *tasks: Task) -> HistoryItem:
    return items_of_records(tasks, [record], content_id=lambda item: "x")[0]


def test_record_belongs_to_the_task_that_reads_most_of_its_fields() -> None:
    assert _read({"text": "a", "title": "b"}, TEXT, POST).answer == "b"
    assert _read({"text": "a"}, TEXT, POST).answer_name is None
    assert _read({"text": "a", "title": "b", "task": "Text"}, TEXT, POST).answer_name is None


def test_record_that_fits_several_tasks_must_name_its_task() -> None:
    with pytest.raises(RequestError, match=r"fit several tasks; name one as `task`.*Films: text, score; Books"):
        _read({"text": "a", "score": 2}, FILMS, BOOKS)
    assert _read({"text": "a", "score": 3, "task": "Books"}, FILMS, BOOKS).answer == "3"
    with pytest.raises(RequestError, match="no task"):
        _read({"text": "a", "score": 3, "task": "Songs"}, FILMS, BOOKS)


def test_task_without_a_distinct_wording_takes_no_prompts_from_others() -> None:
    greedy = TaskPrompts(Task("Any", "label", ("text",), "tag", ("accuracy",), labels=("a", "b")), [Wording()])
    films = TaskPrompts(FILMS, [Wording("Rate the film: ", "Rate the film: ", is_fixed=True)])
    chat = TaskPrompts(Task("Chats", "chat", ("question", "answer"), "answer", ("rouge_1",)))
    tasks = [greedy, chat, films]
    assert [find_task(tasks, text)[0] for text in ("Rate the film: tea", "Hi", "Sum up the film: tea")] == [2, 1, 1]
    assert find_task([greedy], "Hi")[1].is_on_task
    index, query = find_task([greedy, films], "Hi")
    assert (index, query.is_on_task) == (0, False)
    assert not find_task(tasks, "Hi", can_ask=lambda kind: kind != "chat")[1].is_on_task


@pytest.mark.parametrize("how", [{"query_after": " "}, {"query_pattern": "(.*)"}, {"query_pattern": r"(\w+)(.*)"}])
def test_marker_or_pattern_that_matches_any_text_forces_no_prompt_into_labels(how: dict[str, str]) -> None:
    any_text = Task("Any", "label", ("text",), "tag", ("accuracy",), labels=("a", "b"))
    greedy = TaskPrompts(replace(any_text, **how), [Wording()])  # type: ignore[arg-type]
    chat = TaskPrompts(Task("Chats", "chat", ("question", "answer"), "answer", ("rouge_1",)))
    assert greedy.parse("What is tea?").is_on_task
    assert find_task([greedy, chat], "What is tea?")[0] == 1


def test_second_chat_task_answers_no_prompts_and_a_warning_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tasks = [TaskPrompts(Task(name, "chat", ("question", "answer"), "answer", ("rouge_1",))) for name in ("One", "Two")]
    assert find_task(tasks, "What is tea?")[0] == 0
    with caplog.at_level("INFO"):
        log_tasks(tasks)
    assert "task One: uses a persona for every user message" in caplog.text
    assert "task Two: answers no prompts, because task One answers chats" in caplog.text
    assert "task Two: uses a persona" not in caplog.text


def test_preference_with_fields_of_a_task_is_refused() -> None:
    with pytest.raises(RequestError, match="and fields of an answer"):
        _read({"preference": "Be brief.", "text": "a", "title": "b"}, FILMS, POST)
    with pytest.raises(RequestError, match="and fields of an answer"):
        _read({"preference": "Be brief.", "title": "b"}, FILMS, POST)
    assert _read({"preference": "Be brief."}, FILMS, POST).kind == "preference"


def test_commands_find_the_run_by_the_data_and_by_the_prompt(folder: Path, tmp_path: Path) -> None:
    run = folder / "chatty"
    words = ("--methods", "plain,plug", "limit=2", "resamples=100", "num_beams=1", "max_new_tokens=2")
    for kind, name in (("rating", "Simulated_rating"), ("manners", "Manners")):
        done = _call("evaluate", "--run", run, "--data", folder / kind, *words)
        assert done.exit_code == 0, done.output
        results = json.loads((run / name / "evaluations" / "dev.json").read_text())
        assert [row["method"] for row in results["rows"]][:2] == ["plain", "plug"]
    other = _call("evaluate", "--run", run, "--data", folder / "style", *words)
    assert other.exit_code == 2
    assert "was trained on Manners, Simulated_rating; found data of Simulated_style" in other.output
    answered = _call("generate", "--run", run, "--prompt", FILM)
    assert answered.output.splitlines()[-1] in LABELS
    assert _call("generate", "--run", run, "--prompt", "Hi", "num_beams=1", "max_new_tokens=2").exit_code == 0
    refused = _call("generate", "--run", folder / "written", "--prompt", "Hi")
    assert refused.exit_code == 2
    assert "matches the wording of no task" in refused.output


def test_train_refuses_options_that_need_one_data_set(folder: Path, tmp_path: Path) -> None:
    both = ("--data", folder / "rating", "--data", folder / "manners", "--out", tmp_path / "run", *TOY)
    for more in (("--methods", "lora"), ("--task", "LaMP_3")):
        assert "need exactly one --data" in _call("train", *both, *more).output
    alone = _call("train", "--data", folder / "rating", "--weight", "2", "--out", tmp_path / "run", *TOY)
    assert "there is only one --data" in alone.output
    assert not (tmp_path / "run").exists()


def test_commands_set_preferences_and_explain(folder: Path, tmp_path: Path) -> None:
    run, store = folder / "chatty", tmp_path / "h.db"
    service = _open(run, store)
    asyncio.run(service.add_records("default", "ann", records=[RATING, CHAT]))
    asyncio.run(service.close())
    done = _call("set-preferences", "Be brief.", "--run", run, "--store", store, "--user", "ann")
    assert done.exit_code == 0, done.output
    result = _call("explain", "--run", run, "--store", store, "--user", "ann", "--prompt", FILM)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output[result.output.index("{") :])["items_used"] == 3  # including the preference
