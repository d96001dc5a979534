"""Plugins: installed distributions with entry points in the group "personaplug"."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from published import paper, write

from personaplug.cli.main import main
from personaplug.data import benchmarks, open_dataset
from personaplug.data.benchmarks import open_benchmark, register_reader
from personaplug.data.benchmarks.lamp_qa import LampQAReader
from personaplug.data.benchmarks.longlamp import LongLampReader
from personaplug.errors import ConfigError
from personaplug.infra.plugins import load_plugins

REGISTER = """
from personaplug.data.benchmarks import register_reader
from personaplug.data.benchmarks.longlamp import LongLampReader

calls = []


def register():
    calls.append(1)
    register_reader("my_papers", LongLampReader)
"""


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(benchmarks, "BENCHMARKS", dict(benchmarks.BENCHMARKS))
    load_plugins.cache_clear()
    yield
    load_plugins.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's search path for installed distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("paper_plugin", None)


def install(site: Path, code: str, target: str) -> None:
    """Write a distribution "paper-plugin" with one module and one entry point."""
    (site / "paper_plugin.py").write_text(code)
    info = site / "paper_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paper-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[personaplug]\npapers = {target}\n")


@pytest.mark.parametrize(
    ("code", "target"), [(REGISTER, "paper_plugin:register"), (f"{REGISTER}\nregister()\n", "paper_plugin")]
)
def test_convert_reader_of_a_plugin_is_found_by_name(site: Path, tmp_path: Path, code: str, target: str) -> None:
    install(site, code, target)
    papers = write(tmp_path / "val.jsonl", [paper(1), paper(2)])
    result = CliRunner().invoke(main, ["convert", "my-papers", str(papers), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert list(open_dataset(tmp_path / "out", "dev")) == list(LongLampReader(papers, "dev"))


def test_load_plugins_twice_loads_each_plugin_once(site: Path) -> None:
    install(site, REGISTER, "paper_plugin:register")
    load_plugins()
    load_plugins()
    assert sys.modules["paper_plugin"].calls == [1]


def test_built_in_reader_is_opened_without_plugins(site: Path, tmp_path: Path) -> None:
    install(site, "raise RuntimeError", "paper_plugin")
    papers = write(tmp_path / "val.jsonl", [paper(1)])
    assert len(list(open_benchmark("longlamp", papers, "dev"))) == 1


@pytest.mark.parametrize(
    ("code", "target", "reason"),
    [
        ("import no_such_module", "paper_plugin", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "paper_plugin:register", "AttributeError: .*'register'"),
        (f"{REGISTER}\nregister_reader('lamp-qa', LongLampReader)", "paper_plugin", "ConfigError: .*lamp-qa"),
    ],
)
def test_broken_plugin_error_names_the_distribution(
    site: Path, tmp_path: Path, code: str, target: str, reason: str
) -> None:
    install(site, code, target)
    with pytest.raises(ConfigError, match=f"plugin 'papers' .*distribution 'paper-plugin' cannot be loaded: {reason}"):
        open_benchmark("my-papers", tmp_path, "dev")


def test_unknown_benchmark_error_lists_readers_of_plugins(site: Path, tmp_path: Path) -> None:
    install(site, REGISTER, "paper_plugin:register")
    with pytest.raises(ConfigError, match="no benchmark 'my-paper'; did you mean 'my-papers'"):
        open_benchmark("my-paper", tmp_path, "dev")


def test_register_reader_refuses_a_duplicate_name() -> None:
    register_reader("My_Papers", LongLampReader)
    register_reader("my-papers", LongLampReader)
    with pytest.raises(ConfigError, match="The reader 'my-papers' already exists"):
        register_reader("my-papers", LampQAReader)
