"""Measure offline jobs: one process, and a local Ray with one and with two workers.

    OMP_NUM_THREADS=1 python benchmarks/offline.py --run RUN --input FOLDER [--rounds N] [--json FILE]

Each way runs the whole job of `personaplug generate --input`, in turns, in new output folders. Ray is started before.
The first third of the shards is not timed, because workers load their models in it. Reported are rows per second, and
seconds of processor time per row in all processes that compute. Other work on the machine changes the first, but hardly
the second. So the speed-up by two workers is given by both: as it was, and as it is if each worker has a core.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow.dataset as dataset
import ray

from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.offline.job import Job, Shard, plan_job
from personaplug.offline.on_ray import compute
from personaplug.offline.output_folder import finish, opened
from personaplug.offline.worker import Worker
from personaplug.run import Run

WAYS = {"one process": 0, "Ray, 1 worker": 1, "Ray, 2 workers": 2}


@dataclass(frozen=True)
class Moment:
    """The state of a job after a shard."""

    seconds: float
    processor_seconds: float
    rows: int


def shards_of(job: Job, workers: int) -> Iterator[Shard]:
    """Yield shards when they are written, by this process (0 workers) or by Ray."""
    if workers:
        yield from compute(job, job.shards, address="local", workers=workers)
        return
    worker = Worker(job)
    for shard in job.shards:
        worker.run(shard)
        yield shard


def processor_seconds(workers: int) -> float:
    """Return the processor time of all processes that compute."""
    processes = [psutil.Process()]
    if workers:
        processes = [each for each in processes[0].children(recursive=True) if "MapWorker" in " ".join(each.cmdline())]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(job: Job, workers: int) -> dict[str, float]:
    """Run a job, and return its rates after the first third of the shards."""
    moments: list[Moment] = []
    with opened(job):
        for shard in shards_of(job, workers):
            moments.append(Moment(time.monotonic(), processor_seconds(workers), shard.rows))
        finish(job)
    timed = moments[len(moments) // 3 :]
    rows = sum(moment.rows for moment in timed[1:])
    return {
        "rows_per_s": rows / (timed[-1].seconds - timed[0].seconds),
        "processor_s_per_row": (timed[-1].processor_seconds - timed[0].processor_seconds) / rows,
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of an output in the order of their ids."""
    rows: list[dict[str, Any]] = dataset.dataset(folder).to_table().to_pylist()
    return sorted(rows, key=lambda row: str(row["id"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--input", type=Path, required=True, help="Parquet files with prompts and histories")
    parser.add_argument("--shard-rows", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    run = Run.open(arguments.run)
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    results: list[list[dict[str, Any]]] = []
    with TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name, workers in WAYS.items():
                output, rows = Path(folder, f"{name} {number}"), arguments.shard_rows
                job = plan_job("generate", run, run.config, source=arguments.input, output=output, shard_rows=rows)
                rates[name].append(measure(job, workers))
                results.append(rows_of(output))
                print(name, rates[name][-1], flush=True)
    ways = {
        name: {key: round(median(each[key] for each in rounds), 3) for key in rounds[0]}
        for name, rounds in rates.items()
    }
    one, two = ways["Ray, 1 worker"], ways["Ray, 2 workers"]
    speed_up = {
        "by_time": round(two["rows_per_s"] / one["rows_per_s"], 2),
        "by_processor_time": round(2 * one["processor_s_per_row"] / two["processor_s_per_row"], 2),
    }
    is_equal = all(rows == results[0] for rows in results)
    print("two workers against one:", speed_up, "equal results:", is_equal)
    if arguments.json:
        facts = {"input_rows": len(results[0]), "shard_rows": arguments.shard_rows, "rounds": arguments.rounds}
        about = {"model": run.config.model.llm, "machine": machine_info(), "versions": package_versions()}
        write_json(arguments.json, {**facts, "ways": ways, "speed_up": speed_up, "equal_results": is_equal, **about})


if __name__ == "__main__":
    main()
