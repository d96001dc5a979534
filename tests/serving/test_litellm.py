"""LiteLLM's SDK and proxy before the server: by which ways a user's name arrives.

LiteLLM is large and brings its own versions of much, so it has a virtual environment to itself:
`python -m venv .venv-litellm && .venv-litellm/bin/pip install 'litellm[proxy]'`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import free_port, open_service, served

from personaplug.llm.causal_lm import CausalLM

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PERSONAPLUG_LITELLM_PYTHON", HERE / ".venv-litellm" / "bin" / "python"))
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
TURNS: Any = [{"role": "user", "content": "review: a film about tea"}]
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "user": ({"user": "ann"}, "population"),  # dropped: LiteLLM does not know the model
    "allowed": ({"user": "ann", "allowed_openai_params": ["user"]}, "user"),
    "header": ({"extra_headers": {"X-Personaplug-User": "ann"}}, "user"),
    "body": ({"extra_body": {"user": "ann"}}, "user"),
    "safety_identifier": ({"safety_identifier": "ann"}, "user"),
}


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PYTHON.exists():
        pytest.skip(f"LiteLLM is not installed at {PYTHON}: see above, or set PERSONAPLUG_LITELLM_PYTHON")
    with served(open_service(toy, tmp_path_factory.mktemp("litellm"))) as base_url:
        item = {"id": "1", "text": "a film", "score": "5"}
        httpx.post(f"{base_url}/v1/users/ann/history", json=item).raise_for_status()
        yield base_url


def _personas(url: str) -> dict[str, int]:
    """How many replies each kind of persona has had."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "personas_total{" in line]
    counts = dict.fromkeys(("user", "population", "plain"), 0)
    for line in lines:
        counts[line.split('applied="')[1].split('"')[0]] += int(float(line.rpartition(" ")[2]))
    return counts


@pytest.mark.parametrize("way", WAYS)
def test_user_arrives_from_the_sdk(url: str, way: str) -> None:
    fields, applied = WAYS[way]
    given = {"model": "openai/toy", "api_base": f"{url}/v1", "api_key": "none", "messages": TURNS} | fields
    before = _personas(url)
    script = f"import litellm; print(litellm.completion(**{given!r}).choices[0].message.content)"
    subprocess.run([PYTHON, "-c", script], check=True, env={**os.environ, **OFFLINE}, timeout=120)
    assert _personas(url) == before | {applied: before[applied] + 1}


@contextmanager
def _proxy(url: str, folder: Path) -> Iterator[openai.OpenAI]:
    toy = f"litellm_params: {{model: openai/toy, api_base: {url}/v1, api_key: none"
    (folder / "litellm.yaml").write_text(
        f"model_list:\n  - {{model_name: toy, {toy}}}}}\n"
        f'  - {{model_name: toy-user, {toy}, allowed_openai_params: ["user"]}}}}\n'
        "general_settings: {forward_client_headers_to_llm_api: true}\n"
    )
    port = free_port()
    key = f"sk-{secrets.token_hex(24)}"
    command = [PYTHON.parent / "litellm", "--config", folder / "litellm.yaml", "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **OFFLINE, "LITELLM_MASTER_KEY": key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health/liveliness", process)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        assert process.poll() is None, "the proxy ended while it was starting"
        time.sleep(1)
    raise AssertionError("the proxy did not start within two minutes")


def test_user_arrives_through_the_proxy(url: str, tmp_path: Path) -> None:
    with _proxy(url, tmp_path) as client:
        for model, fields, applied in (
            ("toy", {"user": "ann"}, "population"),
            ("toy-user", {"user": "ann"}, "user"),
            ("toy", {"extra_headers": {"X-Personaplug-User": "ann"}}, "user"),
            ("toy", {"safety_identifier": "ann"}, "user"),
        ):
            before = _personas(url)
            given: dict[str, Any] = fields
            client.chat.completions.create(model=model, messages=TURNS, **given)
            assert _personas(url) == before | {applied: before[applied] + 1}
