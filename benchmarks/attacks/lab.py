"""A place for attacks: small trained runs, and servers in processes of their own that are watched from outside."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil
from free_ports import free_port

TENANTS = ("a", "b")
_TOY = ("llm=toy", "dtype=float32", "batch_size=4", "epochs=1", "controls=false")
_PROBE_PAUSE_S = 0.02


@dataclass
class Server:
    """A running `personaplug serve`.

    Attributes:
        keys: API key by tenant; empty on a server without keys.
        start_bytes, end_bytes: resident memory after the start and after the case.
        worst_gap_s: longest time in which `/health` did not answer.
    """

    url: str
    process: subprocess.Popen[bytes]
    keys: dict[str, str]
    log: Path
    start_bytes: int = 0
    end_bytes: int = 0
    worst_gap_s: float = 0

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def call(
        self, method: str, path: str, *, tenant: str = "a", timeout: float = 120, headers: Any = None, **body: Any
    ) -> httpx.Response:
        """Send a request with a tenant's key."""
        key = {"Authorization": f"Bearer {self.keys[tenant]}"} if self.keys else {}
        return httpx.request(
            method, self.url + path, verify=False, timeout=timeout, headers={**key, **(headers or {})}, **body
        )

    def chat(self, prompt: str, user: str | None = "ann", **fields: Any) -> httpx.Response:
        """Ask a question as a user."""
        options = {name: fields.pop(name) for name in ("tenant", "timeout") if name in fields}
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **fields}
        return self.call("POST", "/v1/chat/completions", json=body | ({"user": user} if user else {}), **options)

    def add(self, items: Sequence[dict[str, Any]], user: str = "ann", **options: Any) -> httpx.Response:
        """Add items to a user's history."""
        return self.call("POST", f"/v1/users/{user}/history", json={"items": list(items)}, **options)

    def count(self, user: str = "ann", **options: Any) -> int:
        """Return the number of a user's items; 0 if the user is unknown."""
        reply = self.call("GET", f"/v1/users/{user}/history?latest=1", **options)
        return int(reply.json()["count"]) if reply.status_code == 200 else 0

    def open_socket(self, *, timeout: float = 60) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def memory(self) -> int:
        """Return the resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@dataclass
class Lab:
    """Runs and servers of the attacks, in a folder.

    Attributes:
        encoder: of the runs; a real one makes encodings take the time that they take.
        servers: those of the current case.
    """

    folder: Path
    encoder: str
    servers: list[Server] = field(default_factory=list)

    def hashed(self) -> Lab:
        """Return a lab whose runs have the hash encoder, which takes no time; its servers are listed here too."""
        folder = self.folder / "hash"
        folder.mkdir(exist_ok=True)
        return replace(self, folder=folder, encoder="hash:32")

    def run(self, task: str = "films", *settings: str) -> Path:
        """Return a trained run of a task: `films`, with ratings from 1 to 5, or `choice`, LaMP's choice of two.

        The settings count for the first call of a task alone.
        """
        folder = self.folder / f"run-{task}"
        if not folder.exists():
            data = self.data(task)
            self.command("train", "--data", data, "--out", folder, *_TOY, f"encoder={self.encoder}", *settings)
        return folder

    def data(self, task: str = "films") -> Path:
        """Return a data folder of a task."""
        folder = self.folder / f"data-{task}"
        if not folder.exists():
            _DATA[task](folder)
        return folder

    def question(self, task: str = "films") -> dict[str, Any]:
        """Return the dev question with the longest history."""
        questions = json.loads((self.data(task) / "dev_questions.json").read_text())
        return max(questions, key=lambda sample: len(sample["profile"]))

    def items(self, count: int, *, words: int = 30, prefix: str = "i") -> list[dict[str, Any]]:
        """Return distinct items of the films task."""
        return [
            {
                "id": f"{prefix}{number}",
                "text": f"film {prefix}{number} " + "slow western " * (words // 2),
                "score": "4",
            }
            for number in range(count)
        ]

    def command(
        self, *words: object, expect_success: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of personaplug; by default, raise if it fails."""
        result = subprocess.run(
            [sys.executable, "-m", "personaplug", *map(str, words)],
            capture_output=True, text=True, timeout=timeout, env=_ENVIRONMENT, cwd=self.folder,
        )  # fmt: skip
        if expect_success and result.returncode:
            raise RuntimeError(f"{words[0]} failed: {result.stderr[-2000:]}")
        return result

    def scratch(self, name: str) -> Path:
        """Return an empty folder."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    @contextlib.contextmanager
    def serve(
        self, *options: object, task: str = "films", store: str | Path = "", keys: bool = True, files: int = 0
    ) -> Iterator[Server]:
        """Serve a run in a process of its own while a third process asks for `/health`.

        Args:
            store: a new SQLite file by default.
            keys: make a key for each of TENANTS.
            files: most open files of the process; 0 = the system's limit.
        """
        number = len(self.servers)
        place = self.scratch(f"server-{number}")
        words: list[object] = ["serve", "--run", self.run(task), "--store", store or place / "histories.db"]
        tenants = {}
        if keys:
            path = place / "keys.json"
            tenants = {tenant: self.command("create-key", tenant, "--keys", path).stdout.strip() for tenant in TENANTS}
            words += ["--keys", path]
        port = free_port()
        server = _start([*words, "--port", port, *options], port, keys=tenants, log=place / "log", files=files)
        self.servers.append(server)
        try:
            with watched(server):
                yield server
        finally:
            server.process.send_signal(signal.SIGCONT)
            server.process.kill()
            server.process.wait()


_ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _start(words: Sequence[object], port: int, *, keys: dict[str, str], log: Path, files: int) -> Server:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "personaplug", *map(str, words)],
            stdout=output,
            stderr=output,
            env=_ENVIRONMENT,
            preexec_fn=limit_files if files else None,
        )
    server = Server(f"http://127.0.0.1:{port}", process, keys, log)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                server.start_bytes = server.memory()
                return server
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"The server did not start: {server.log_text()[-2000:]}")


@contextlib.contextmanager
def watched(server: Server) -> Iterator[None]:
    """Measure the worst gap of `/health` and the memory at the end."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_probe, args=(server.port, sender), daemon=True)
    process.start()
    if not receiver.poll(60):
        raise RuntimeError("The probe of /health did not start.")
    receiver.recv()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            server.end_bytes = server.memory()
        receiver.send("stop")
        server.worst_gap_s = receiver.recv() if receiver.poll(180) else float("inf")
        process.kill()


def _probe(port: int, sender: Connection) -> None:
    """Ask for `/health` all the time; send the longest time until an answer."""
    while not _is_healthy(port):
        time.sleep(0.005)
    sender.send("started")
    worst = 0.0
    while not sender.poll():
        began = time.monotonic()
        while not _is_healthy(port) and not sender.poll():
            time.sleep(0.005)
        worst = max(worst, time.monotonic() - began)
        time.sleep(_PROBE_PAUSE_S)
    sender.send(worst)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def save_toy_model(folder: Path) -> None:
    """Write the toy language model as a folder, as an engine of its own needs it."""
    from personaplug.llm.tiny import load_tiny_llm

    llm = load_tiny_llm()
    llm.model.save_pretrained(folder)
    llm.prompt_tokenizer.tokenizer.save_pretrained(folder)


def _simulate(folder: Path) -> None:
    from personaplug.data.simulation import SimulationConfig, write_simulation

    write_simulation(SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=2, max_items=5), folder)


def _write_choices(folder: Path) -> None:
    """Write LaMP_1's question, with its built-in pattern, for a few users."""
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": "choice", "like": "LaMP_1"}))
    for split, users in (("train", 8), ("dev", 4)):
        questions, outputs = [], []
        for number in range(users):
            papers = [
                {"id": f"{split}{number}-{i}", "title": f"Paper {i} on parsing", "abstract": f"Trees {i}."}
                for i in range(4)
            ]
            prompt = (
                f'For an author who has written the paper with the title "Parsing {number}", '
                f"which reference is related? Just answer with [1] or [2] "
                f'without explanation. [1]: "Trees {number}" [2]: "Graphs {number}"'
            )
            questions.append({"id": f"{split}{number}", "input": prompt, "profile": papers})
            outputs.append({"id": f"{split}{number}", "output": "[1]"})
        (folder / f"{split}_questions.json").write_text(json.dumps(questions))
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": "choice", "golds": outputs}))


_DATA: dict[str, Callable[[Path], None]] = {"films": _simulate, "choice": _write_choices}
