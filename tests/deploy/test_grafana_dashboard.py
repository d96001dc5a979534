"""The dashboard for Grafana: its queries name metrics and labels of a server, and Prometheus reads each query."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from free_ports import free_port
from live_server import open_service, served
from prometheus_client.parser import text_string_to_metric_families

from personaplug.llm.causal_lm import CausalLM

FILE = Path(__file__).resolve().parents[2] / "deploy" / "grafana-dashboard.json"
_METRIC = re.compile(r"\bpersonaplug_\w+")
_SELECTOR = re.compile(r"(personaplug_\w+)\{([^{}]*)\}")
_MATCHER = re.compile(r'(\w+)(?:=|!=|=~|!~)"(?:[^"\\]|\\.)*"(?:, )?')
_GROUPING = re.compile(r"\bby \(([^()]*)\)")
_OF_PROMETHEUS = {"instance", "le"}


def _dashboard() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return dashboard


def _queries() -> list[str]:
    return [target["expr"] for panel in _dashboard()["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has answered requests of each kind."""
    with served(open_service(toy, tmp_path_factory.mktemp("dashboard"))) as base_url:
        _use(base_url)
        yield base_url


def _use(url: str) -> None:
    httpx.post(f"{url}/v1/users/ann/history", json={"text": "tea", "score": "4"}).raise_for_status()
    body = {"messages": [{"role": "user", "content": "review: tea"}], "user": "ann", "max_tokens": 2}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()


def _labels(url: str) -> dict[str, set[str]]:
    """Return the labels of each metric, under the names that queries use."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        for name in (f"{family.name}{suffix}" for suffix in suffixes):
            labels[name] = {label for sample in family.samples for label in sample.labels}
    return labels


def test_each_metric_and_label_of_the_dashboard_is_one_of_the_server(url: str) -> None:
    known, used = _labels(url), set[str]()
    for query in _queries():
        names = _METRIC.findall(query)
        assert names, query
        assert set(names) <= known.keys(), query
        used |= set(names)
        for name, matchers in _SELECTOR.findall(query):
            assert _MATCHER.sub("", matchers) == "", query
            labels = {label for label, *_ in re.findall(r"(\w+)(=|!=)", matchers)}
            # A metric without samples shows no labels, such as the one of closed connections.
            assert not known[name] or labels <= known[name] | _OF_PROMETHEUS, query
        grouped = {label.strip() for group in _GROUPING.findall(query) for label in group.split(",")}
        assert all(not known[name] or grouped <= known[name] | _OF_PROMETHEUS for name in names), query
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in known}
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in used}
    assert {name for name in families if not name.endswith("_created")} == shown


def test_variables_and_panels_are_complete() -> None:
    dashboard = _dashboard()
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
    used = {name for query in _queries() for name in re.findall(r"\$(\w+)", query)} - {"__rate_interval"}
    assert used | {"datasource"} == variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("query", _queries(), ids=lambda query: query[:60])
def test_brackets_and_quotes_of_each_query_are_closed(query: str) -> None:
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", query)
    assert '"' not in rest
    while (shorter := re.sub(r"\([^()\[\]{}]*\)|\[[^()\[\]{}]*\]|\{[^()\[\]{}]*\}", "", rest)) != rest:
        rest = shorter
    assert not set(rest) & set("()[]{}"), query


@contextmanager
def _prometheus(folder: Path, *, target: str) -> Iterator[str]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs Prometheus: apt-get install prometheus")
    scrape = {"job_name": "personaplug", "static_configs": [{"targets": [target]}]}
    (folder / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
    )
    address = f"127.0.0.1:{free_port()}"
    options = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    with (folder / "log").open("wb") as log:
        command = [program, *options, f"--web.listen-address={address}"]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def _result(prometheus: str, query: str) -> list[dict[str, Any]]:
    reply = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=30)
    assert reply.json()["status"] == "success", reply.text
    result: list[dict[str, Any]] = reply.json()["data"]["result"]
    return result


@pytest.mark.slow
def test_prometheus_reads_each_query(url: str, tmp_path: Path) -> None:
    with _prometheus(tmp_path, target=url.removeprefix("http://")) as prometheus:
        for _ in range(300):  # rates need two readings of counters that have grown
            _use(url)
            with suppress(httpx.HTTPError):
                if _result(prometheus, "sum(rate(personaplug_personas_total[10s])) > 0"):
                    break
            time.sleep(0.2)
        values = {"$__rate_interval": "10s", "$instance": ".*", "$model": ".*"}
        for query in _queries():
            for name, value in values.items():
                query = query.replace(name, value)
            found = _result(prometheus, query)
            assert found or "5.." in query or "closed_connections" in query, query
