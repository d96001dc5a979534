"""Code in the documentation: commands and imports exist, and every Python block runs.

A Python block runs here if the line before it is `<!-- run -->`. The blocks of a page run in order and share a
namespace. RUN_BY names the tests that run the other blocks.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from markdown_code import code_blocks
from training_settings import TINY

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError
from personaplug.methods import parse_methods
from personaplug.serving import engines

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")),
    *ROOT.glob("docs/**/*.md"),
]
_INLINE = re.compile(r"`(personaplug [^`]+)`")
_SEPARATORS = {"&&", "||", ";", "|", ">", ">>", "&"}
_SHELLS = ("", "bash", "sh", "console")
_SUM = re.compile(r"\$\(\(.*?\)\)")
_VARIABLE = re.compile(r"\$\w+|\$\{\w+\}")
_LEFT_OUT = "…"  # marks an incomplete command


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    language: str
    code: str
    runs: bool


def _blocks(path: Path) -> list[Block]:
    page = path.relative_to(ROOT).as_posix()
    blocks = code_blocks(path.read_text(encoding="utf-8"))
    return [Block(page, each.language, each.code, each.runs) for each in blocks]


BLOCKS = [block for path in sorted(PAGES) for block in _blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
PAGES_THAT_RUN = sorted({block.page for block in PYTHON if block.runs})
RUN_BY = {
    "README.md": "e2e/test_docs.py",
    "docs/clients.md": "clients/test_page.py",
    "docs/getting-started/app-engineer.md": "clients/test_other_pages.py",
    "docs/python.md": "test_api.py",
    "docs/serving.md": "clients/test_other_pages.py",
    "docs/store.md": "store/test_opening.py",
    "docs/your-data.md": "e2e/test_docs.py",
}
"""The page of each Python block without a mark, and the test file that runs the block."""


def _commands(code: str) -> Iterator[list[str]]:
    """Yield the words after each `personaplug` in a shell script, up to a pipe, a redirection or the next command."""
    for line in _SUM.sub("1", code.replace("\\\n", " ")).splitlines():
        if "personaplug" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        while "personaplug" in words:
            words = words[words.index("personaplug") + 1 :]
            end = next((index for index, word in enumerate(words) if word in _SEPARATORS), len(words))
            yield words[:end]


COMMANDS = [(block.page, words) for block in BLOCKS if block.language in _SHELLS for words in _commands(block.code)] + [
    (path.relative_to(ROOT).as_posix(), [*words, _LEFT_OUT])  # commands in the text may lack options
    for path in sorted(PAGES)
    for inline in _INLINE.findall(path.read_text(encoding="utf-8"))
    for words in _commands(inline)
]


def _check_command(words: list[str]) -> None:
    """Raise UsageError if a command, an option or a value does not exist, and ConfigError for a setting or a row."""
    command: click.Command = main
    context, is_whole = click.Context(main, info_name="personaplug"), _LEFT_OUT not in words
    words = [_VARIABLE.sub("1", word) for word in words]
    while isinstance(command, click.Group) and words and words[0] != _LEFT_OUT:
        name, subcommand, words = command.resolve_command(context, words)
        assert subcommand is not None
        command, context = subcommand, click.Context(subcommand, info_name=name, parent=context)
    if is_whole:
        values = command.make_context(context.info_name, list(words), parent=context.parent).params
    else:
        values, _, _ = command.make_parser(context).parse_args(list(words))
    settings, methods = values.get("settings"), values.get("methods")
    if isinstance(settings, tuple | list):
        load_config(overrides=[word for word in settings if isinstance(word, str) and word != _LEFT_OUT])
    if isinstance(methods, str) and methods:
        parse_methods(methods)


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:40]}" for page, words in COMMANDS]
)
def test_a_documented_command_exists_with_its_options_and_settings(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in words:
        if re.fullmatch(r"[\w-]+\.json", word):
            Path(word).touch()  # click opens some files while it parses the command
    try:
        _check_command(words)
    except (click.UsageError, ConfigError) as error:
        pytest.fail(f"{page}: `personaplug {' '.join(words)}`: {error}")


@pytest.mark.parametrize(
    "words",
    [
        "trian --data DIR --out RUN",
        "train --data DIR --uot RUN",
        "train --data DIR --out RUN epoch=1",
        "train --data DIR --out RUN --methods plugg",
        "train",
        "lamp uplaod …",
        "evaluate --no-such …",
        "synthesize --data DIR --out OUT --samples many",
    ],
)
def test_an_unknown_command_option_setting_or_row_is_refused(words: str) -> None:
    with pytest.raises((click.UsageError, ConfigError)):
        _check_command(words.split())


def test_commands_are_found_in_a_script() -> None:
    script = "A=1 python -m personaplug schema > f && personaplug train --data \\\n D # personaplug no\necho personal"
    assert list(_commands(script)) == [["schema"], ["train", "--data", "D"]]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_documented_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "personaplug":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], block.page


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the quickstart's data and a run of toy models."""
    folder = tmp_path_factory.mktemp("documents")
    out = folder / "runs" / "quickstart"
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=2), out / "data")
    words = ["train", "--data", str(out / "data"), "--out", str(out / "run"), *TINY, "epochs=1", "controls=false"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_marked_python_runs(page: str, quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_ENGINES", dict(engines._ENGINES))  # a page registers an engine
    namespace: dict[str, object] = {"__name__": page}
    with contextlib.chdir(quickstart):
        for block in PYTHON:
            if block.page == page and block.runs:
                exec(compile(block.code, page, "exec"), namespace)


def test_every_python_block_is_marked_or_has_a_test() -> None:
    assert len(PAGES_THAT_RUN) >= 3
    assert {block.page for block in PYTHON if not block.runs} == set(RUN_BY)
    for page, test in RUN_BY.items():
        code = (ROOT / "tests" / test).read_text(encoding="utf-8") + (ROOT / "tests/client_page.py").read_text("utf-8")
        assert Path(page).name in code, page


def test_a_block_in_a_list_is_found() -> None:
    [block] = [block for block in PYTHON if block.page == "docs/serving.md"]
    assert block.code.startswith("import httpx\n")
