"""Several `personaplug serve` processes behind a balancer that sends each request to a random server in rotation."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

_START_S = 300
_STOP_S = 60
_PAUSE_S = 0.05


@dataclass(eq=False)
class FleetServer:
    """One server process, which may be replaced by a new one on the same port.

    Attributes:
        options: the words after `personaplug serve`, without the port.
        models: the names that it serves; empty while it is out of rotation.
        running: requests that wait for its reply.
        kills: how often it was killed.
    """

    number: int
    options: Sequence[str]
    log: Path
    port: int
    models: tuple[str, ...] = ()
    running: int = 0
    kills: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, session: aiohttp.ClientSession, *, key: str) -> None:
        """Start the process, wait until it is ready, and put it in rotation."""
        with self.log.open("ab") as output:
            command = [sys.executable, "-m", "personaplug", "serve", *self.options, "--port", str(self.port)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        async with asyncio.timeout(_START_S):
            while not await self._is_ready(session):
                if self.process.poll() is not None:
                    raise RuntimeError(f"A server did not start: {self.log.read_text(encoding='utf-8')[-2000:]}")
                await asyncio.sleep(_PAUSE_S)
        headers = {"Authorization": f"Bearer {key}"}
        async with session.get(f"{self.url}/v1/models", headers=headers) as reply:
            self.models = tuple(model["id"] for model in (await reply.json())["data"])

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        with suppress(aiohttp.ClientError):
            async with session.get(f"{self.url}/ready") as reply:
                return reply.status == 200
        return False

    def kill(self) -> None:
        """Kill the process while requests are running. The balancer notices it by their broken connections."""
        assert self.process is not None
        self.kills += 1
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    async def stop(self) -> int:
        """Take the server out of rotation, wait for its replies, stop it with SIGTERM, and return its exit code."""
        assert self.process is not None
        self.models = ()
        async with asyncio.timeout(_STOP_S):
            while self.running:
                await asyncio.sleep(_PAUSE_S)
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, _STOP_S)


@dataclass
class Fleet:
    """The servers, and a random choice among those in rotation."""

    servers: Sequence[FleetServer]
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def pick(self, model: str | None = None) -> FleetServer:
        """Return a server in rotation that serves the model; None = any server."""
        able = [server for server in self.servers if (server.models if model is None else model in server.models)]
        if not able:
            raise RuntimeError(f"No server in rotation serves {model or 'anything'}.")
        return self.draw.choice(able)

    def serves(self, model: str) -> bool:
        return any(model in server.models for server in self.servers)

    def kill_all(self) -> None:
        for server in self.servers:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
                server.process.wait()
