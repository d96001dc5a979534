"""The documentation site: complete reference pages, working links, and a build without resources of other sites."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from reference_pages import cli_page, http_page, python_page, settings_page
from repository_pages import site_links

import personaplug
from personaplug.cli.main import main
from personaplug.config import SECTIONS
from personaplug.config_parsing import settings_of

ROOT = Path(__file__).resolve().parents[2]
_RESOURCES = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
_LINKS_OF_TEXT = ("canonical", "next", "prev", "alternate")


def test_the_page_of_commands_has_all_commands_and_options() -> None:
    page = cli_page()
    for name, command in main.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        for leaf, each in inner.items():
            title = f"## personaplug {name} {leaf}".rstrip()
            section = page.partition(f"{title}\n")[2].partition("\n## ")[0]
            assert section, title
            options = [
                option for parameter in each.params if isinstance(parameter, click.Option) for option in parameter.opts
            ]
            assert [option for option in options if option not in section] == [], title


def test_the_page_of_settings_has_all_settings() -> None:
    page = settings_page()
    for section in SECTIONS:
        table = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
        for name, field in settings_of(section).items():
            row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
            assert row.count(" | ") == 3, row
            assert str(field.description).split()[0].strip("`") in row


def test_the_page_of_routes_has_routes_and_schemas() -> None:
    pytest.importorskip("fastapi")
    page = http_page()
    for route in (
        "POST /v1/chat/completions",
        "PUT /v1/users/{user}/preferences",
        "DELETE /v1/users/{user}",
        "GET /metrics",
    ):
        assert f"## `{route}`" in page
    assert "[ChatRequest](#chatrequest)" in page
    assert "| `messages` | list of [Message](#message) | required |" in page


def test_the_python_page_has_all_public_names() -> None:
    names = set(re.findall(r"^::: [\w.]+\.(\w+)$", python_page(), flags=re.MULTILINE))
    assert names == set(personaplug.__all__)


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("plug.md", "[log](../benchmarks/LOG.md#a)", "[log](research/log.md#a)"),
        ("project/overview.md", "[plug](docs/plug.md)", "[plug](../plug.md)"),
        ("project/overview.md", "![flow](docs/assets/flow.svg)", "![flow](../assets/flow.svg)"),
        ("project/overview.md", '<img src="docs/assets/flow.svg">', '<img src="../assets/flow.svg">'),
        ("research/benchmarks.md", "[log](LOG.md)", "[log](log.md)"),
        (
            "training.md",
            "[its\nresults](../benchmarks/results/speed.json)",
            "its\nresults (`benchmarks/results/speed.json`)",
        ),
        ("protocol.md", "[benchmarks/results](../benchmarks/results)", "benchmarks/results"),
        ("plug.md", "[gone](../no/such/file.md)", "[gone](../no/such/file.md)"),
        ("plug.md", "[here](#scale) [there](https://example.org/a)", "[here](#scale) [there](https://example.org/a)"),
        ("plug.md", "```\n[log](../README.md)\n```", "```\n[log](../README.md)\n```"),
    ],
)
def test_repository_links_become_site_links(uri: str, link: str, expected: str) -> None:
    assert site_links(link, uri=uri) == expected


class _Resources(HTMLParser):
    """Collects the addresses of the resources that a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in _LINKS_OF_TEXT:
            return
        self.addresses += [
            address for name in (_RESOURCES.get(tag, "srcset"), "srcset") if (address := values.get(name))
        ]
        self.addresses += _style_addresses(values.get("style") or "")


def _style_addresses(text: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import\s+)["']?([^"')\s]+)""", text)


def _foreign(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"(?:https?:)?//", address)]


def _foreign_resources(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return _foreign(_style_addresses(text))
    parser = _Resources()
    parser.feed(text)
    return _foreign(parser.addresses)


def test_a_resource_of_another_site_is_detected(tmp_path: Path) -> None:
    page, style = tmp_path / "page.html", tmp_path / "style.css"
    page.write_text(
        '<link rel="stylesheet" href="https://a.example/x.css"><link rel="canonical" href="https://b.example/">'
        '<script src="//c.example/x.js"></script><img src="x.svg"><a href="https://d.example/">d</a>'
    )
    style.write_text('@import "https://e.example/x.css"; a { background: url(data:x), url("https://f.example/x.png") }')
    assert _foreign_resources(page) == ["https://a.example/x.css", "//c.example/x.js"]
    assert _foreign_resources(style) == ["https://e.example/x.css", "https://f.example/x.png"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`: make docs")
def test_a_strict_build_succeeds_and_loads_nothing_from_other_sites(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    files = [path for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".css")]
    assert (tmp_path / "site" / "reference" / "cli" / "index.html") in files
    assert {str(path): addresses for path in files if (addresses := _foreign_resources(path))} == {}
