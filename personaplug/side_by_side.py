"""Tables side by side: each filled by a process of its own, so many at a time.

A small model leaves most of a large card, or of many cores, idle; tables share nothing but the machine.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from personaplug.bench import Outcome, Places, bench, check_asked
from personaplug.errors import PersonaPlugError
from personaplug.experiment import Experiment

logger = logging.getLogger(__name__)

_THREADS = "OMP_NUM_THREADS"  # of a process; read when its torch loads


def bench_side_by_side(
    experiment: Experiment,
    places: Places,
    *,
    processes: int,
    sets: Sequence[str] = (),
    seeds: Sequence[int] = (),
    conditions: Sequence[str] = (),
) -> Outcome:
    """Fill an experiment's tables as `bench` does, several at a time; what each process says is in a file by its run.

    Args:
        processes: how many at most. They share the cores out, unless OMP_NUM_THREADS says how many threads each has.
        sets, seeds, conditions: see `bench`.
    Raises:
        BadConfig: if the experiment has no such set, seed or row.
    """
    check_asked(experiment, sets=sets, seeds=seeds, conditions=conditions)
    jobs = [
        _Job(replace(experiment, sets=(name,), configs={(variant, name): config}), places, seeds, conditions)
        for (variant, name), config in experiment.configs.items()
        if not sets or name in sets
    ]
    with _threads(processes), ThreadPoolExecutor(processes) as pool:
        return _together(list(pool.map(_filled, jobs)))


@dataclass(frozen=True)
class _Job:
    """One table: an experiment of one set and one variant."""

    experiment: Experiment
    places: Places
    seeds: Sequence[int]
    conditions: Sequence[str]

    @property
    def title(self) -> str:
        (variant, name), *_ = self.experiment.configs
        return " ".join(part for part in (self.experiment.name, variant, name) if part)

    @property
    def log(self) -> Path:
        """Where its process tells of its progress."""
        return self.places.out / self.experiment.name / f"{self.title.replace(' ', '-')}.log"


def _filled(job: _Job) -> Outcome:
    """Fill a table in a process of its own, and wait for it."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("%s: begun; its progress is in %s", job.title, job.log)
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    level = logging.getLogger("personaplug").level
    process = context.Process(target=_fill, args=(job, theirs, level), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        outcome: Outcome = ours.recv()
    except EOFError:
        outcome = Outcome([], [], [])
    process.join()
    if process.exitcode:
        reason = f"{job.title}: its process ended with {process.exitcode}; finished rows are kept. See {job.log}."
        outcome = replace(outcome, failed=[*outcome.failed, reason])
    logger.info("%s: %s", job.title, "failed" if outcome.failed else "not here" if outcome.absent else "done")
    return outcome


def _fill(job: _Job, connection: Connection, level: int) -> None:
    """What the process does: all that would go to standard error goes into the log."""
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("personaplug").setLevel(level)
    try:
        outcome = bench(job.experiment, job.places, seeds=job.seeds, conditions=job.conditions)
    except PersonaPlugError as error:
        outcome = Outcome([], [], [f"{job.title}: {error}"])
    connection.send(outcome)


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(
        [path for outcome in outcomes for path in outcome.written],
        [reason for outcome in outcomes for reason in outcome.absent],
        [reason for outcome in outcomes for reason in outcome.failed],
        [reason for outcome in outcomes for reason in outcome.left_out],
    )


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """Let processes that are started within a block share the cores out."""
    if _THREADS in os.environ:
        yield
        return
    os.environ[_THREADS] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        del os.environ[_THREADS]
