"""What personas cost a service: plain vLLM, ours, and prompts with retrieved texts, on one vLLM; and our own engine.

    python benchmarks/serving.py --run RUN --data DATA --vllm http://127.0.0.1:8123 [--json FILE]

All rows ask questions of DATA's dev split, with the same length of answer, streamed, greedy, so many at once. Rounds
take the rows in an order drawn anew, so that other work on the machine meets all of them, and no question is asked
twice, so that vLLM's prefix cache holds the task's wording and no row's questions. *plain*: the question, straight to
vLLM. *persona*: a question to `personaplug serve` in front of that vLLM, as its user, whose history is in the store.
*embeds*: what that server sends to vLLM, sent there straight: the difference to *plain* is vLLM's own, that to
*persona* ours. *retrieval*: the question with the four best items of the history (BM25) in its prompt, straight to
vLLM. Then the embedded engine: one request at a time, and sixteen at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from personaplug.baselines.history_prompt import HistoryPromptFormatter
from personaplug.baselines.retrievers import BM25Retriever
from personaplug.data import open_dataset
from personaplug.data.records import Sample
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.run import Run, open_models
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines.vllm_requests import add_soft_tokens
from personaplug.serving.setup import open_service

ITEMS = 4
ROWS = 4
WIDTH = 576


@dataclass(frozen=True)
class Asked:
    """One request of a row.

    Attributes:
        url: whom it is sent to.
        body: what.
    """

    url: str
    body: dict[str, Any]


async def answer(client: httpx.AsyncClient, asked: Asked) -> float:
    """Ask, read the answer to its end, and return the seconds until its first token."""
    began, first = time.perf_counter(), None
    async with client.stream("POST", f"{asked.url}/v1/chat/completions", json=asked.body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{asked.url} answered {reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if first is None and line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                first = time.perf_counter() - began if delta.get("content") else None
    return first if first is not None else time.perf_counter() - began


async def load(requests: Sequence[Asked], *, at_once: int) -> tuple[float, list[float]]:
    """Answer all, so many at once; seconds in all, and each one's until its first token."""
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:

        async def one(asked: Asked) -> float:
            async with places:
                return await answer(client, asked)

        began = time.perf_counter()
        firsts = await asyncio.gather(*map(one, requests))
        return time.perf_counter() - began, list(firsts)


@contextlib.contextmanager
def our_server(run: Path, store: Path, engine: str) -> Iterator[str]:
    """`personaplug serve` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "personaplug", "--quiet", "serve", "--run", str(run), "--store", str(store)]
    process = subprocess.Popen([*command, "--engine", engine, "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def summary(rounds: list[tuple[float, list[float]]]) -> dict[str, float]:
    """Requests a second and times to the first token, over all rounds."""
    firsts = np.concatenate([firsts for _, firsts in rounds])
    each = [len(firsts) / seconds for seconds, firsts in rounds]
    return {
        "requests_per_second": round(float(np.median(each)), 2),
        "first_token_p50_ms": round(1e3 * float(np.percentile(firsts, 50)), 1),
        "first_token_p99_ms": round(1e3 * float(np.percentile(firsts, 99)), 1),
    }


def fill(run: Run, store: Path, samples: Sequence[Sample]) -> None:
    """Put the users' histories into the store."""
    service = open_service(run, ServingConfig(store=str(store)))
    for sample in samples:
        service.store.add(service.store.admit("default", sample.owner), sample.history)
    service.store.close()


def bodies(sample: Sample, *, tokens: int, model: str | None = None) -> dict[str, Any]:
    """A question as a request."""
    body = {"messages": [{"role": "user", "content": sample.prompt}], "max_tokens": tokens, "temperature": 0}
    # Answers of one length for all rows, whatever the model would have stopped at.
    return body | {"stream": True, "ignore_eos": True} | ({"model": model} if model else {})


def on_vllm(run: Run, samples: list[Sample], *, vllm: str, ours: str, given: argparse.Namespace) -> dict[str, Any]:
    """The four rows, in turn."""
    model = httpx.get(f"{vllm}/v1/models").json()["data"][0]["id"]
    formatter, bm25 = HistoryPromptFormatter(run.task, open_models(run.config).llm), BM25Retriever()
    soft = SoftPrompt(torch.randn(1, run.config.plug.soft_tokens, WIDTH) * 0.1, placement="suffix")
    found: dict[str, list[tuple[float, list[float]]]] = {"plain": [], "embeds": [], "persona": [], "retrieval": []}

    def plain(sample: Sample) -> Asked:
        return Asked(vllm, bodies(sample, tokens=given.tokens, model=model))

    def embeds(sample: Sample) -> Asked:
        return Asked(vllm, add_soft_tokens(plain(sample).body, soft))

    def persona(sample: Sample) -> Asked:
        return Asked(ours, plain(sample).body | {"user": sample.owner, "personaplug": {"free": True}})

    def retrieval(sample: Sample) -> Asked:
        (ranking,) = bm25.rank([sample])
        text = formatter.format(sample.prompt, [sample.history[n] for n in ranking[:ITEMS]]).prompt
        return Asked(vllm, plain(sample).body | {"messages": [{"role": "user", "content": text}]})

    rows = {"plain": plain, "embeds": embeds, "persona": persona, "retrieval": retrieval}
    unasked = iter(samples)
    for number in range(given.rounds):
        for name in np.random.default_rng(number).permutation(list(rows)):
            asked = [rows[name](sample) for sample in islice(unasked, given.requests)]
            found[name].append(asyncio.run(load(asked, at_once=given.at_once)))
            print(number, name, summary(found[name][-1:]), flush=True)
    table: dict[str, Any] = {name: summary(rounds) for name, rounds in found.items()}
    ratios = {
        name: round(float(np.median([b[0] / a[0] for a, b in zip(found["persona"], found[name], strict=True)])), 3)
        for name in ("plain", "embeds", "retrieval")
    }
    return table | {"throughput_of_persona_over": ratios}


def on_ours(samples: list[Sample], *, ours: str, given: argparse.Namespace) -> dict[str, Any]:
    """The embedded engine, one request at a time and sixteen at once."""
    found: dict[str, list[tuple[float, list[float]]]] = {"1 at once": [], "16 at once": []}
    for number in range(given.rounds):
        part = samples[number * given.requests : (number + 1) * given.requests]
        asked = [
            Asked(ours, bodies(sample, tokens=given.tokens) | {"user": sample.owner, "personaplug": {"free": True}})
            for sample in part
        ]
        for name, at_once in (("1 at once", 1), ("16 at once", 16)):
            found[name].append(asyncio.run(load(asked, at_once=at_once)))
            print(number, name, summary(found[name][-1:]), flush=True)
    alone, together = found.values()
    gain = float(np.median([a[0] / b[0] for a, b in zip(alone, together, strict=True)]))
    return {name: summary(rounds) for name, rounds in found.items()} | {"throughput_gain": round(gain, 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run with a trained plug")
    parser.add_argument("--data", type=Path, required=True, help="a set of the run's task")
    parser.add_argument("--vllm", help="address of a vLLM server of the run's model; without it, only our own engine")
    parser.add_argument("--requests", type=int, default=32, help="in a round, of each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8, help="requests to vLLM at once")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    run = Run.open(given.run)
    wanted = given.rounds * given.requests * (ROWS if given.vllm else 1)
    samples = list(open_dataset(given.data, "dev", task=run.task))
    samples = [samples[place] for place in np.random.default_rng(0).permutation(len(samples))[:wanted]]
    if len(samples) < wanted:
        raise SystemExit(f"{given.data} has {len(samples)} dev samples, too few for so many rounds.")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "histories.db"
        fill(run, store, samples)
        if given.vllm:
            with our_server(given.run, store, given.vllm) as ours:
                found["vllm"] = on_vllm(run, samples, vllm=given.vllm, ours=ours, given=given)
        with our_server(given.run, store, "local") as ours:
            found["local"] = on_ours(samples, ours=ours, given=given)
    print(json.dumps(found, indent=1))
    if given.json:
        settings = {name: value for name, value in vars(given).items() if isinstance(value, int)}
        write_json(
            given.json, found | {"settings": settings, "versions": package_versions(), "machine": machine_info()}
        )


if __name__ == "__main__":
    main()
