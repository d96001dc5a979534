"""Disks that fill up: the command says so, complete files stay, and the same command goes on when there is room."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks import Verdict, case
from attacks.files import command, evaluate
from attacks.lab import Lab

_TRAIN = ("llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=4", "save_steps=2", "controls=false")


class NoSmallDisk(Exception):
    """This user may not mount a file system."""


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Path]:
    """Mount a file system of a few KiB in memory; raise NoSmallDisk if this user may not."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoSmallDisk("mounting a small file system needs root") from error
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def enlarge(place: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", place], check=True)


@case("a full disk under vectors, training and results")
def full_disk(lab: Lab, verdict: Verdict) -> None:
    lab = lab.hashed()
    reference = lab.scratch("whole") / "run"
    words = ("train", "--data", lab.data(), *_TRAIN, "--out")
    command(*words, reference)
    expected = _weights(reference)
    needed = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file()) // 1024
    counts = {"done": 0, "refused": 0}
    with contextlib.ExitStack() as stack:
        for number, share in enumerate((0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)):
            try:
                disk = stack.enter_context(small_disk(lab.folder / f"disk-{number}", max(int(share * needed), 4)))
            except NoSmallDisk as error:
                verdict.note(f"not tried: {error}")
                return
            state, output = command(*words, disk / "run")
            verdict.expect(state != "raw", f"training on {share:.0%} of the space: {output[-200:]}")
            counts[state] = counts.get(state, 0) + 1
            enlarge(disk, 100_000)
            state, output = command(*words, disk / "run")
            verdict.expect(state == "done", f"the same command with room again: {output[-200:]}")
            verdict.expect(
                state == "done" and _weights(disk / "run") == expected, "other weights than without the stop"
            )
        verdict.note(f"{counts['refused']} of 9 trainings stopped")
        _fill_with_results(lab, stack, verdict, run=reference)


def _weights(run: Path) -> Any:
    from safetensors.torch import load_file

    return {name: tensor.tolist() for name, tensor in load_file(next(run.rglob("plug.safetensors"))).items()}


def _fill_with_results(lab: Lab, stack: contextlib.ExitStack, verdict: Verdict, *, run: Path) -> None:
    """Write results over an earlier file on a full disk: the earlier file stays."""
    disk = stack.enter_context(small_disk(lab.folder / "disk-results", 8))
    target = disk / "results.json"
    target.write_text('{"earlier": true}')
    (disk / "ballast").write_bytes(b"x" * 3_000)
    state, output = evaluate(run, lab.data(), target)
    verdict.expect(state != "raw", f"results: {output[-200:]}")
    is_whole = (
        "earlier" in json.loads(target.read_text()) if state == "refused" else "rows" in json.loads(target.read_text())
    )
    verdict.expect(is_whole, "the results file is half written")


@case("a full disk under a store")
def full_disk_under_store(lab: Lab, verdict: Verdict) -> None:
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(lab.folder / "disk-store", 9_000))
        except NoSmallDisk as error:
            verdict.note(f"not tried: {error}")
            return
        server = stack.enter_context(lab.hashed().serve("--keep-text", store=disk / "histories.db"))
        stored, statuses = 0, []
        for number in range(200):
            reply = server.add(lab.items(20, words=200, prefix=f"n{number}-"))
            statuses.append(reply.status_code)
            stored += reply.json()["new"] if reply.status_code == 200 else 0
        verdict.expect(set(statuses) == {200, 503}, f"statuses of adds: {sorted(set(statuses))}")
        verdict.expect(server.count() == stored, f"{server.count()} items of {stored} that were confirmed")
        enlarge(disk, 100_000)
        verdict.expect(server.add(lab.items(5, prefix="late")).status_code == 200, "no add with room again")
        verdict.expect(server.count() == stored + 5, "items are lost with room again")
        verdict.expect(server.call("DELETE", "/v1/users/ann").status_code == 200, "no erasure with room again")
        verdict.note(f"{statuses.count(503)} of {len(statuses)} adds refused")
