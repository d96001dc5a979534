"""Damage to files: every flipped bit and every cut is said, or changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from attacks import Verdict, case
from attacks.lab import Lab

_FLIPS = 40  # for each file
_CUTS = (0.0, 0.1, 0.5, 0.9, 0.999)  # shares of a file that stay
_SCORES = ("metrics", "intervals", "n", "condition", "invalid_rate")


def command(*words: object) -> tuple[str, str]:
    """Run a command in this process; return `done`, `refused` or `raw`, and what it printed."""
    from click.testing import CliRunner

    from personaplug.cli.main import main
    from personaplug.errors import PersonaPlugError

    result = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    if result.exit_code == 0:
        return "done", result.output
    is_clear = result.exception is None or isinstance(result.exception, SystemExit | PersonaPlugError)
    return "refused" if is_clear else "raw", f"{result.output}\n{result.exception!r}"


def outcome(work: Callable[[], Any], expected: Any) -> str:
    """Return `same`, `detected`, `silent` or `raw (…)` for a reading of damaged files."""
    from personaplug.errors import PersonaPlugError

    try:
        return "same" if work() == expected else "silent"
    except PersonaPlugError:
        return "detected"
    except Exception as error:
        return f"raw ({type(error).__name__})"


def evaluate(run: Path, data: Path, target: Path) -> tuple[str, str]:
    """Write the results of a run into a file; return what `command` returns."""
    methods = ("--split", "dev", "--methods", "plain,plug")
    return command("evaluate", "--run", run, "--data", data, *methods, "--json", target)


def evaluation(run: Path, data: Path) -> Callable[[], Any]:
    """Return a function that gives the scores of a run."""

    def scores() -> Any:
        target = run.parent / f"{run.name}.json"
        target.unlink(missing_ok=True)
        state, output = evaluate(run, data, target)
        if state != "done":
            raise _of(state, output)
        return [{name: row.get(name) for name in _SCORES} for row in json.loads(target.read_text())["rows"]]

    return scores


def _of(state: str, output: str) -> Exception:
    from personaplug.errors import UserError

    return UserError(output) if state == "refused" else RuntimeError(output)


def flip(path: Path, generator: random.Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    place = generator.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def damage_each(
    verdict: Verdict, place: Path, original: Path, *, files: Sequence[Path], read: Callable[[Path], Callable[[], Any]]
) -> None:
    """Flip a bit of each file many times and read; `files` are relative to the folder `original`."""
    copy = place / original.name
    generator = random.Random(0)
    _renew(copy, original)
    expected = read(copy)()
    for file in files:
        outcomes: dict[str, int] = {}
        for number in range(_FLIPS + len(_CUTS)):
            _renew(copy, original)
            if number < _FLIPS:
                flip(copy / file, generator)
            else:
                os.truncate(copy / file, int(_CUTS[number - _FLIPS] * (copy / file).stat().st_size))
            state = outcome(read(copy), expected)
            outcomes[state] = outcomes.get(state, 0) + 1
            verdict.expect(state in ("same", "detected"), f"{file}: {state}")
        verdict.note(f"{file.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(outcomes.items())))


def _renew(copy: Path, original: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)


@case("flipped bits and cuts: a run")
def damaged_run(lab: Lab, verdict: Verdict) -> None:
    lab = lab.hashed()
    run, data = lab.run(), lab.data()
    evaluation(run, data)()  # makes the cache of predictions
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    files = [
        path
        for path in files
        if path.suffix in (".json", ".safetensors", ".f16", ".sqlite", ".yaml") or "pred" in str(path)
    ]
    damage_each(verdict, lab.scratch("damaged"), run, files=files, read=lambda copy: evaluation(copy, data))


@case("flipped bits and cuts: the checkpoints of a training")
def damaged_checkpoint(lab: Lab, verdict: Verdict) -> None:
    lab = lab.hashed()
    data, place = lab.data(), lab.scratch("stopped")
    words = ("train", "--data", data, "llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=12",
             "controls=false", "save_steps=5", "--out")  # fmt: skip
    stopped = place / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "personaplug", *map(str, words), str(stopped)], stderr=subprocess.DEVNULL
    )
    while not list(stopped.rglob("state-*/state.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = [
        path for path in stopped.rglob("*") if path.is_file() and path.parent.name.startswith(("state-", "best-"))
    ]

    def resume(copy: Path) -> Callable[[], Any]:
        def weights() -> Any:
            from safetensors.torch import load_file

            state, output = command(*words, copy)
            if state != "done":
                raise _of(state, output)
            tensors = load_file(next(copy.rglob("plug.safetensors")))
            return {name: tensor.tolist() for name, tensor in tensors.items()}

        return weights

    verdict.expect(bool(states), "no checkpoint was written before the training ended")
    files = [path.relative_to(stopped) for path in sorted(states)]
    damage_each(verdict, lab.scratch("resumed"), stopped, files=files, read=resume)
    for path in sorted(states):
        if path.name == "state.json":
            copy = lab.scratch("resumed") / "run"
            _renew(copy, stopped)
            expected = resume(copy)()
            _renew(copy, stopped)
            (copy / path.relative_to(stopped)).write_text("{}")
            verdict.expect(outcome(resume(copy), expected) in ("same", "detected"), "state.json = {} is believed")


@case("flipped bits and cuts: a store of histories")
def damaged_store(lab: Lab, verdict: Verdict) -> None:
    from personaplug.data.records import HistoryItem
    from personaplug.encoders import HashEncoder
    from personaplug.store.history_store import HistoryStore, StoreSettings

    folder = lab.scratch("store-original")
    encoder = HashEncoder(32)
    store = HistoryStore.open(folder / "histories.db", encoder, settings=StoreSettings(keep_text=True, shards=2))
    for user in range(10):
        items = [HistoryItem(f"i{n}", (("text", f"a film of {user} {n}"),)) for n in range(20)]
        store.add(store.admit("t", f"u{user}"), items)
    store.close()

    def read(copy: Path) -> Callable[[], Any]:
        def everything() -> Any:
            with contextlib.closing(HistoryStore.open(copy / "histories.db", encoder)) as store:
                return [
                    (
                        [(item.id, item.fields) for item in store.list_items("t", f"u{user}")],
                        store.load_history("t", f"u{user}").vectors.tolist(),
                    )
                    for user in range(10)
                ]

        return everything

    files = [path.relative_to(folder) for path in sorted(folder.iterdir()) if path.suffix in (".db", ".secret")]
    damage_each(verdict, lab.scratch("store-damaged"), folder, files=files, read=read)


@case("sizes and paths of a stranger's files")
def strangers_sizes(lab: Lab, verdict: Verdict) -> None:
    lab = lab.hashed()
    run, place = lab.run(), lab.scratch("strange")
    copy = place / "run"
    outside = place / "outside"
    for name in ("projector_width", "persona_tokens", "instruction_tokens", "max_history", "query_width", "heads"):
        for value in (20_000_000, -1, 2**63, "x", None, 1e400):
            _renew(copy, run)
            path = next(copy.rglob("plug.json"))
            about = json.loads(path.read_text())
            if name not in about["config"] and "config" in about:
                continue
            about["config"][name] = value
            path.write_text(json.dumps(about))
            before = psutil.Process().memory_info().rss
            state, _ = command("evaluate", "--run", copy, "--data", lab.data(), "--split", "dev", "--methods", "plug")
            grown = (psutil.Process().memory_info().rss - before) / 2**20
            verdict.expect(state == "refused" and grown < 500, f"{name}={value!r}: {state}, {grown:.0f} MB more")
    for path_value in (str(outside), "../outside", str(outside / "deep" / "er")):
        _renew(copy, run)
        values = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps(values | {"vectors": path_value}))
        command("evaluate", "--run", copy, "--data", lab.data(), "--split", "dev", "--methods", "plug")
        verdict.expect(not outside.exists(), f"run.json made {path_value}")
        shutil.rmtree(outside, ignore_errors=True)


@case("backups of a store in use")
def backups(lab: Lab, verdict: Verdict) -> None:
    place = lab.scratch("backup")
    store = place / "histories.db"
    with lab.serve("--keep-text", store=store) as server:
        for user in range(30):
            server.add(lab.items(3), user=f"u{user}").raise_for_status()
        lab.command("backup", "--store", store, "--to", place / "copy.backup")
        server.call("DELETE", "/v1/users/u0").raise_for_status()
    secret, restored = f"{store}.secret", place / "restored.db"
    words = ("restore", "--from", place / "copy.backup", "--secret", secret, "--to")
    lab.command(*words, restored)
    verdict.expect(_users(restored) == 30, "users are missing in the restored store")
    lab.command(*words, place / "newest.db", "--current", store)
    verdict.expect(_users(place / "newest.db") == 29, "the erasure since the backup is not repeated")
    damaged = place / "damaged.backup"
    generator = random.Random(0)
    for _ in range(10):
        shutil.copy(place / "copy.backup", damaged)
        flip(damaged, generator)
        target = lab.scratch("restored-damaged") / "histories.db"
        result = lab.command("restore", "--from", damaged, "--secret", secret, "--to", target, expect_success=False)
        verdict.expect(result.returncode != 0 and "Traceback" not in result.stderr, "a damaged backup is restored")


def _users(store: Path) -> int:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sum(
            connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables if t.startswith("users")
        )


@case("big numbers and deep nesting in data files")
def hostile_data(lab: Lab, verdict: Verdict) -> None:
    lab = lab.hashed()
    deep, big = "[" * 100_000, "9" * 400
    for number, text in enumerate(
        (deep, deep + "]" * 100_000, '{"name": ' + deep, "1" * 10_000, '{"name": ' + big + "}")
    ):
        _expect_clear(lab, verdict, {"task.json": text}, f"task.json {number}")
    questions = json.loads((lab.data() / "train_questions.json").read_text())
    integers = (2**63, 2**64 + 1, 10**400, -(10**400))
    values: tuple[object, ...] = (*integers, 1.5, True, None, [], {}, "\u202ex", "\x00", "")
    for value in values:
        for place in ("id", "item id", "score", "date"):
            changed = json.loads(json.dumps(questions))
            holder = changed[0] if place == "id" else changed[0]["profile"][0]
            holder[place.split()[-1]] = value
            _expect_clear(lab, verdict, {"train_questions.json": _dumps(changed)}, f"{place} = {str(value)[:20]!r}")
    for number, text in enumerate(("", "[]", "{}", "null", deep, '[{"id": ' + big + "}]", "\x00" * 100, "[1e999]")):
        _expect_clear(lab, verdict, {"train_questions.json": text}, f"questions {number}")


def _dumps(value: Any) -> str:
    sys.set_int_max_str_digits(0)
    return json.dumps(value)


def _expect_clear(lab: Lab, verdict: Verdict, files: dict[str, str], what: str) -> None:
    folder = lab.scratch("hostile") / "data"
    shutil.copytree(lab.data(), folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    state, output = command("estimate", "--data", folder, "llm=toy", "encoder=hash:32", "dtype=float32")
    verdict.expect(state != "raw", f"{what}: {output[-200:]}")


@cache
def _typos() -> tuple[tuple[str, str], ...]:
    return (("llm=typo/name", "llm=toy"), ("encoder=typo/name", "encoder=hash:32"), ("dtype=float33", "dtype=float32"))


@case("starts with a typing mistake")
def failed_starts(lab: Lab, verdict: Verdict) -> None:
    lab = lab.hashed()
    right = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false"]
    for wrong, correct in _typos():
        out = lab.scratch("typo") / "run"
        words = ["train", "--data", lab.data(), "--out", out]
        state, _ = command(*words, *(wrong if word == correct else word for word in right))
        verdict.expect(state == "refused", f"{wrong}: {state}")
        verdict.expect(not out.exists(), f"{wrong} leaves a folder")
        state, output = command(*words, *right)
        verdict.expect(state == "done", f"after {wrong}: {output[-200:]}")
