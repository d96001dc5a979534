"""Measure the cost of personas in a service: on one vLLM server (four rows), and with the embedded engine.

    python benchmarks/serving.py --run RUN --data DATA --vllm http://127.0.0.1:8123 [--json FILE]

All rows send questions of DATA's dev split concurrently, streamed and greedy, with answers of the same length. Each
round takes the rows in a new random order, so that other work on the machine affects all rows. No question is sent
twice, so vLLM's prefix cache has only the task's wording.

*plain*      the question, sent to vLLM
*persona*    the question of a user with a stored history, sent to `personaplug serve` in front of this vLLM server
*embeds*     the question with soft tokens, sent to vLLM: the difference to *plain* is vLLM's cost, the difference to
             *persona* is ours
*retrieval*  the question with the four best items of the history (BM25) in its prompt, sent to vLLM

The processor time of our server is counted, too. Then the embedded engine answers requests one at a time, and sixteen
at once. It may end an answer early; both rows get the same questions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
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
import psutil
import torch
from free_ports import free_port

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
class ServerRequest:
    """One request of a row, and the address of its server."""

    url: str
    body: dict[str, Any]


async def answer(client: httpx.AsyncClient, request: ServerRequest) -> float:
    """Send a request, read the whole answer, and return the seconds until the first token."""
    start, first = time.perf_counter(), None
    async with client.stream("POST", f"{request.url}/v1/chat/completions", json=request.body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{request.url} answered {reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if first is None and line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                first = time.perf_counter() - start if delta.get("content") else None
    return first if first is not None else time.perf_counter() - start


async def load(requests: Sequence[ServerRequest], *, concurrency: int) -> tuple[float, list[float]]:
    """Send all requests; return the total seconds and each request's seconds until the first token."""
    slots = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:

        async def send(request: ServerRequest) -> float:
            async with slots:
                return await answer(client, request)

        start = time.perf_counter()
        firsts = await asyncio.gather(*map(send, requests))
        return time.perf_counter() - start, list(firsts)


@contextlib.contextmanager
def our_server(run: Path, store: Path, engine: str, *options: str) -> Iterator[str]:
    """Run `personaplug serve` in a separate process, with further options; yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "personaplug", "--quiet", "serve", "--run", str(run), "--store", str(store)]
    process = subprocess.Popen([*command, "--engine", engine, "--port", str(port), *options])
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


class ServerProcessor:
    """Counts the processor seconds of our server, the only child of this process."""

    def __init__(self) -> None:
        (self._server,) = psutil.Process().children()
        self.seconds = 0.0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        before = self._now()
        yield
        self.seconds += self._now() - before

    def _now(self) -> float:
        times = self._server.cpu_times()
        return float(times.user + times.system)


def summary(rounds: list[tuple[float, list[float]]]) -> dict[str, float]:
    """Return the requests per second and the times to the first token, over all rounds."""
    firsts = np.concatenate([firsts for _, firsts in rounds])
    each = [len(firsts) / seconds for seconds, firsts in rounds]
    return {
        "requests_per_second": round(float(np.median(each)), 2),
        "first_token_p50_ms": round(1e3 * float(np.percentile(firsts, 50)), 1),
        "first_token_p99_ms": round(1e3 * float(np.percentile(firsts, 99)), 1),
    }


def fill(run: Run, store: Path, samples: Sequence[Sample]) -> None:
    """Add the users' histories to the store."""
    service = open_service(run, ServingConfig(store=str(store)))
    for sample in samples:
        service.store.add(service.store.admit("default", sample.owner), sample.history)
    service.store.close()


def bodies(sample: Sample, *, tokens: int, model: str | None = None) -> dict[str, Any]:
    """Return a question as the body of a request."""
    body = {"messages": [{"role": "user", "content": sample.prompt}], "max_tokens": tokens, "temperature": 0}
    # On vLLM, all rows get answers of the same length, because the model does not stop early.
    return body | {"stream": True} | ({"model": model, "ignore_eos": True} if model else {})


def on_vllm(run: Run, samples: list[Sample], *, vllm: str, ours: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the four rows, in turn."""
    model = httpx.get(f"{vllm}/v1/models").json()["data"][0]["id"]
    formatter, bm25 = HistoryPromptFormatter(run.task, open_models(run.config).llm), BM25Retriever()
    soft = SoftPrompt(torch.randn(1, run.config.plug.soft_tokens, WIDTH) * 0.1, placement="suffix")
    times: dict[str, list[tuple[float, list[float]]]] = {"plain": [], "embeds": [], "persona": [], "retrieval": []}

    def plain(sample: Sample) -> ServerRequest:
        return ServerRequest(vllm, bodies(sample, tokens=arguments.tokens, model=model))

    def embeds(sample: Sample) -> ServerRequest:
        return ServerRequest(vllm, add_soft_tokens(plain(sample).body, soft))

    def persona(sample: Sample) -> ServerRequest:
        return ServerRequest(ours, plain(sample).body | {"user": sample.owner, "personaplug": {"free": True}})

    def retrieval(sample: Sample) -> ServerRequest:
        (ranking,) = bm25.rank([sample])
        text = formatter.format(sample.prompt, [sample.history[n] for n in ranking[:ITEMS]]).prompt
        return ServerRequest(vllm, plain(sample).body | {"messages": [{"role": "user", "content": text}]})

    rows = {"plain": plain, "embeds": embeds, "persona": persona, "retrieval": retrieval}
    unused, processor = iter(samples), ServerProcessor()
    for number in range(arguments.rounds):
        for name in np.random.default_rng(number).permutation(list(rows)):
            requests = [rows[name](sample) for sample in islice(unused, arguments.requests)]
            with processor.counted() if name == "persona" else contextlib.nullcontext():
                times[name].append(asyncio.run(load(requests, concurrency=arguments.at_once)))
            print(number, name, summary(times[name][-1:]), flush=True)
    table: dict[str, Any] = {name: summary(rounds) for name, rounds in times.items()}

    def over(base: str, *others: str) -> dict[str, float]:
        """Return the median of the rounds' ratios of throughput, `base` over each of the others."""
        ratios = {name: [b[0] / a[0] for a, b in zip(times[base], times[name], strict=True)] for name in others}
        return {name: round(float(np.median(each)), 3) for name, each in ratios.items()}

    served = arguments.rounds * arguments.requests
    return table | {
        "throughput_of_persona_over": over("persona", "plain", "embeds", "retrieval"),
        "throughput_of_embeds_over": over("embeds", "plain"),
        "throughput_of_retrieval_over": over("retrieval", "plain"),
        "our_processor_ms_per_request": round(1e3 * processor.seconds / served, 2),
    }


def on_ours(samples: list[Sample], *, ours: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the embedded engine, with one request at a time and with sixteen at once."""
    times: dict[str, list[tuple[float, list[float]]]] = {"1 at once": [], "16 at once": []}
    for number in range(arguments.rounds):
        part = samples[number * arguments.requests : (number + 1) * arguments.requests]
        requests = [
            ServerRequest(
                ours, bodies(sample, tokens=arguments.tokens) | {"user": sample.owner, "personaplug": {"free": True}}
            )
            for sample in part
        ]
        for name, concurrency in (("1 at once", 1), ("16 at once", 16)):
            times[name].append(asyncio.run(load(requests, concurrency=concurrency)))
            print(number, name, summary(times[name][-1:]), flush=True)
    single, concurrent = times.values()
    gain = float(np.median([a[0] / b[0] for a, b in zip(single, concurrent, strict=True)]))
    return {name: summary(rounds) for name, rounds in times.items()} | {"throughput_gain": round(gain, 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run with a trained plug")
    parser.add_argument("--data", type=Path, required=True, help="a data set of the run's task")
    parser.add_argument("--vllm", help="address of a vLLM server with the run's model; default: none")
    parser.add_argument("--requests", type=int, default=32, help="requests of each row in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8, help="concurrent requests to vLLM")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = Run.open(arguments.run)
    count = arguments.rounds * arguments.requests * (ROWS if arguments.vllm else 1)
    samples = list(open_dataset(arguments.data, "dev", task=run.task))
    samples = [samples[index] for index in np.random.default_rng(0).permutation(len(samples))[:count]]
    if len(samples) < count:
        raise SystemExit(f"Needs {count} dev samples; {arguments.data} has {len(samples)}. Use fewer --rounds.")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "histories.db"
        fill(run, store, samples)
        if arguments.vllm:
            with our_server(arguments.run, store, arguments.vllm) as ours:
                results["vllm"] = on_vllm(run, samples, vllm=arguments.vllm, ours=ours, arguments=arguments)
        with our_server(arguments.run, store, "local") as ours:
            results["local"] = on_ours(samples, ours=ours, arguments=arguments)
    print(json.dumps(results, indent=1))
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if isinstance(value, int)}
        write_json(
            arguments.json, results | {"settings": settings, "versions": package_versions(), "machine": machine_info()}
        )


if __name__ == "__main__":
    main()
