"""Served answers with a copy head: equal to those of one call, separate for each user, gone after an erasure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import served

from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError, EngineFailure, MissingData, StoreConflict
from personaplug.inference import generate
from personaplug.infra.training_facts import write_facts
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copied_answers import MAX_ANSWERS, MAX_TOKENS, ReadAnswer, read_answers
from personaplug.llm.copy_head import CopySource
from personaplug.run import COPY_HEAD, Models, Run, open_models
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.in_process import _groups_of_texts
from personaplug.serving.service import Service
from personaplug.serving.setup import open_service
from personaplug.training.copy_head_part import COPY_HEAD as PART
from personaplug.training.parts import PLUG, train

TOY = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false")
TOKENS = 12
PROMPT = "Write the following message as this user would write it. message: a rainy day"
HEADER = "x-personaplug-copy-head"
WORDS = {"ann": "Why Music, Part 2", "bob": "On tea", "eve": "zebra zebra", "joe": "Q 1 Q 1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a plug and a trained copy head."""
    folder = tmp_path_factory.mktemp("copying")
    write_simulation(SimulationConfig(task="style", users=10, dev_users=2), folder / "data")
    run = Run.create(folder / "run", config=load_config(overrides=list(TOY)), task=load_task(str(folder / "data")))
    train(run, open_dataset(folder / "data", "train"), models=open_models(run.config), parts=[PLUG, PART])
    return run


@pytest.fixture(scope="module")
def models(run: Run) -> Models:
    return open_models(run.config)


@pytest.fixture(scope="module")
def eager(run: Run, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with a head that mostly copies the user's answers."""
    copy = tmp_path_factory.mktemp("eager") / "run"
    shutil.copytree(run.folder, copy)
    eager, seed = Run.open(copy), 0
    head = eager.load_copy_head(models.llm, seed=seed)
    head.gate.bias.copy_(torch.tensor([0.0, -3.0, 12.0]))
    folder, facts = eager.check_trained(COPY_HEAD, seed=seed), eager.training_facts(COPY_HEAD, seed=seed)
    head.save(folder)
    write_facts(folder, facts or {}, owner=eager.owner(COPY_HEAD, seed=seed))
    return eager


def _open(run: Run, folder: Path, **settings: Any) -> Service:
    return open_service(run, ServingConfig(str(folder / "histories.db"), model="toy", copy_head=True, **settings))


def _items(text: str, count: int = 6) -> list[dict[str, Any]]:
    return [{"id": f"{text} {number}", "text": text} for number in range(count)]


def _post(url: str, user: str, items: Sequence[dict[str, Any]]) -> None:
    httpx.post(f"{url}/v1/users/{user}/history", json={"items": items}).raise_for_status()


def _ask(url: str, user: str | None, *, prompt: str = PROMPT, **fields: Any) -> tuple[str, httpx.Headers]:
    """Return the text and the headers of a streamed answer."""
    turns = [{"role": "user", "content": prompt}]
    body = {"model": "toy", "messages": turns, "max_tokens": TOKENS, "temperature": 0, "stream": True, "user": user}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=60).raise_for_status()
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events), reply.headers


def _expected(
    run: Run, models: Models, items: Sequence[dict[str, Any]], *, copies: bool = True, **settings: Any
) -> str:
    """Return the answer of one call for a user with these items."""
    config = replace(run.config.evaluation, max_new_tokens=TOKENS, num_beams=1, **settings)
    head = run.load_copy_head(models.llm, seed=0) if copies else None
    history = [HistoryItem(item["id"], (("text", item["text"]),), "text") for item in items]
    return str(generate(run, PROMPT, history=history, models=models, copy_head=head, config=config))


def _source(service: Service, user: str) -> CopySource:
    copying = service.personas.persona(service.store.admit("default", user), query="a rainy day").copying
    assert copying is not None
    return copying.own[0]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_answer_equals_that_of_one_call(run: Run, models: Models, tmp_path: Path, temperature: float) -> None:
    settings: dict[str, Any] = {"sample_temperature": temperature, "draw_seed": 7}
    answers, without = [], []
    with served(_open(run, tmp_path)) as url:
        for user, text in WORDS.items():
            _post(url, user, _items(text))
            answer, headers = _ask(url, user, temperature=temperature, seed=7)
            answers.append(answer.strip())
            without.append(_expected(run, models, _items(text), copies=False, **settings))
            assert headers[HEADER] == "true"
    assert answers == [_expected(run, models, _items(text), **settings) for text in WORDS.values()]
    assert answers != without


def test_concurrent_users_copy_only_their_own_words(eager: Run, models: Models, tmp_path: Path) -> None:
    users = {f"user {letters}": f"{letters} " * 6 for letters in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr")}
    expected = {user: _expected(eager, models, _items(text)) for user, text in users.items()}
    assert sum(map(bool, expected.values())) > 4
    assert all(set(expected[user]) <= set(text) for user, text in users.items())
    with served(_open(eager, tmp_path)) as url, ThreadPoolExecutor(8) as pool:
        for user, text in users.items():
            _post(url, user, _items(text))
        for _ in range(2):  # the answers are read, then cached
            answers = pool.map(lambda user: _ask(url, user)[0].strip(), users)
            assert dict(zip(users, answers, strict=True)) == expected


def test_erasure_drops_the_words_of_the_user_only(eager: Run, models: Models, tmp_path: Path) -> None:
    service = _open(eager, tmp_path)
    with served(service) as url:
        for user in ("ann", "bob"):
            _post(url, user, _items(WORDS[user]))
        answers = {user: _ask(url, user)[0] for user in ("ann", "bob")}
        before, size = service.personas.cached_bytes, _source(service, "ann").nbytes
        assert size > 0
        assert httpx.delete(f"{url}/v1/users/ann").status_code == 200
        assert service.personas.cached_bytes <= before - size
        assert len(_source(service, "ann")) == 0
        assert _ask(url, "ann")[0].strip() == _expected(eager, models, []) != answers["ann"].strip()
        assert _ask(url, "bob")[0] == answers["bob"]


def test_cached_user_does_not_wait_for_the_model(run: Run, tmp_path: Path) -> None:
    service = _open(run, tmp_path)
    with served(service) as url:
        _post(url, "ann", _items(WORDS["ann"]))
        ticket = service.store.admit("default", "ann")
        assert service.personas.reads_history(ticket)
        _ask(url, "ann")
        assert not service.personas.reads_history(ticket)


def test_new_items_change_the_copied_words(eager: Run, models: Models, tmp_path: Path) -> None:
    service = _open(eager, tmp_path)
    with served(service) as url:
        _post(url, "ann", _items(WORDS["ann"]))
        first, source = _ask(url, "ann")[0], _source(service, "ann")
        items = [*_items(WORDS["ann"]), *_items("zebra zebra", 40)]
        _post(url, "ann", items)
        assert _ask(url, "ann")[0].strip() == _expected(eager, models, items) != first.strip()
        assert WORDS["ann"][0] not in _ask(url, "ann")[0], "only the latest answers are read"
        assert not torch.equal(_source(service, "ann").tokens, source.tokens)


def test_new_item_rereads_no_earlier_answer(eager: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, passes = _open(eager, tmp_path), list[list[str]]()

    def counted(llm: CausalLM, texts: Sequence[str], *, layer: int) -> list[ReadAnswer]:
        passes.append(list(texts))
        return read_answers(llm, texts, layer=layer)

    monkeypatch.setattr("personaplug.llm.copied_answers.read_answers", counted)
    with served(service) as url:
        for text in ("one", "two", "one"):
            _post(url, "ann", [{"id": f"{text} {len(passes)}", "text": text}])
            _ask(url, "ann")
        assert passes == [["one"], ["two"]]
        assert len(_source(service, "ann")) == len("onetwoone") + 3  # a letter is a token, and each text ends
        _post(url, "bob", _items("one"))
        _ask(url, "bob")
    assert passes == [["one"], ["two"], ["one"]], "users share no source"


def test_reading_long_answers_takes_several_passes() -> None:
    groups = list(_groups_of_texts(["a" * 900] * 5 + ["b" * 9000, "c"]))
    assert [[len(text) for text in group] for group in groups] == [[900, 900], [900, 900], [900], [9000], [1]]
    assert list(_groups_of_texts([])) == []


def test_only_answers_with_soft_tokens_have_a_copy_head(run: Run, models: Models, tmp_path: Path) -> None:
    with served(_open(run, tmp_path)) as url:
        _post(url, "ann", _items(WORDS["ann"]))
        for user in (None, "new"):  # the population's: the prompt may be copied
            answer, headers = _ask(url, user)
            assert answer.strip() == _expected(run, models, [])
            assert headers[HEADER] == "true"
        assert HEADER not in _ask(url, "ann", personaplug={"persona_scale": 0})[1]
        assert HEADER not in _ask(url, "ann", prompt="hello")[1]
    with served(_open(run, tmp_path, fallback="plain")) as url:
        assert HEADER not in _ask(url, "new")[1]


def test_source_of_very_long_answers_stays_small(run: Run, tmp_path: Path) -> None:
    service = _open(run, tmp_path)
    with served(service) as url:
        _post(url, "ann", [{"id": f"i{n}", "text": f"{n} a very long text " * 2_000} for n in range(50)])
        assert len(_source(service, "ann")) == MAX_ANSWERS * MAX_TOKENS
        assert service.personas.cached_bytes < 2**20


def test_closing_service_refuses_to_read_answers(run: Run, tmp_path: Path) -> None:
    service = _open(run, tmp_path)
    with served(service) as url:
        _post(url, "ann", _items(WORDS["ann"]))
        reader = service.personas._reader
        assert reader is not None
        assert len(reader.read(["On tea"])[0]) > 0
    with pytest.raises(EngineFailure, match="not running"):
        reader.read(["On tea"])


def test_copy_head_needs_its_training(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns(COPY_HEAD))
    with pytest.raises(MissingData, match=r"repeat this run's `personaplug train` .* --methods plug\+copy-head"):
        _open(Run.open(copy), tmp_path)
    assert not (tmp_path / "histories.db").exists()


def test_copy_head_needs_a_store_with_texts(run: Run, tmp_path: Path) -> None:
    open_service(run, ServingConfig(str(tmp_path / "histories.db"))).store.close()
    with pytest.raises(StoreConflict, match="keep_text"):
        _open(run, tmp_path)


def test_copy_head_needs_free_text_and_the_local_engine(run: Run, tmp_path: Path) -> None:
    labels = replace(run, task=replace(run.task, labels=("1", "2")))
    with pytest.raises(ConfigError, match="closed set of labels"):
        _open(labels, tmp_path)
    with pytest.raises(ConfigError, match="Remove --copy-head"):
        _open(run, tmp_path, engine="http://127.0.0.1:9")
    assert not (tmp_path / "histories.db").exists()


def test_name_is_that_of_the_trained_part() -> None:
    assert PART.name == COPY_HEAD
