"""Compute shards on Ray Data: each worker is an actor with its own models.

Workers read the input and write shards themselves, so only the descriptions of shards pass through Ray. If a worker
dies, Ray starts another one and retries its shard.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from personaplug.errors import ConfigError, MissingExtra, PersonaPlugError, WorkerFailure, first_line
from personaplug.infra.atomic_io import storage_errors
from personaplug.offline.job import Job, Shard
from personaplug.offline.output_folder import missing_shards
from personaplug.offline.worker import Worker

_TRIES = 4
"""How often a shard is started whose workers die. Ray retries without end, and a shard may always kill its worker."""

_CONNECT_S, _POLL_S = 10.0, 2.0

_OBJECT_STORE_BYTES = 100 * 2**20  # of a local Ray; only descriptions of shards pass through it


def compute(job: Job, shards: Sequence[Shard], *, address: str, workers: int | None) -> Iterator[Shard]:
    """Compute shards on Ray, and yield each when it is written.

    Args:
        address: as in `RayPlace`.
        workers: number of workers; None = one for each GPU or, without GPUs, for each machine.
    Raises:
        PersonaPlugError: of a worker.
        WorkerFailure: if workers keep dying.
    """
    ray = _import_ray()
    with _connected(ray, address):
        if address.startswith("ray://"):
            yield from _computed_remotely(ray, job, shards, workers=workers)
        else:
            yield from _computed(ray, job, shards, workers=workers)


def _computed(ray: Any, job: Job, shards: Sequence[Shard], *, workers: int | None) -> Iterator[Shard]:
    by_name = {shard.name: shard for shard in shards}
    data = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
    options = _resources(ray, job, workers=workers, shards=len(shards))
    results = data.map_batches(_Actor, fn_constructor_args=(job,), **options)
    try:
        for result in results.iter_rows():
            _raise(result["failure"])
            yield by_name[result["name"]]
    except ray.exceptions.RayError as error:
        raise _failure(error) from None


def _computed_remotely(ray: Any, job: Job, shards: Sequence[Shard], *, workers: int | None) -> Iterator[Shard]:
    """Compute shards from outside of the cluster, where Ray Data does not run: a task in the cluster runs it."""
    task, pending, is_done = ray.remote(num_cpus=0)(_compute_all).remote(job, shards, workers), list(shards), False
    while not is_done:
        is_done = bool(ray.wait([task], timeout=_POLL_S)[0])
        missing = missing_shards(job)
        yield from (shard for shard in pending if shard not in missing)
        pending = missing
    try:
        _raise(ray.get(task))
    except ray.exceptions.RayError as error:
        raise _failure(error) from None


def _compute_all(job: Job, shards: Sequence[Shard], workers: int | None) -> bytes:
    """Compute shards inside a cluster; return a pickled error, or nothing."""
    try:
        for _ in _computed(_import_ray(), job, shards, workers=workers):
            pass
    except PersonaPlugError as error:
        return pickle.dumps(error)
    return b""


def _raise(failure: bytes) -> None:
    """Raise an error that a worker returned as a value."""
    if failure:
        error: PersonaPlugError = pickle.loads(failure)
        raise error


def _failure(error: Exception) -> WorkerFailure:
    return WorkerFailure("A shard", f"Ray failed with {type(error).__name__}")


class _Actor:
    """Runs a worker as an actor. It returns errors as values, because Ray would log an exception."""

    def __init__(self, job: Job) -> None:
        self._job, self._worker = job, Worker(job)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        shard = Shard(str(batch["name"][0]), *(int(batch[key][0]) for key in ("file", "first", "rows")))
        failure = b""
        try:
            with _counted(self._job, shard):
                self._worker.run(shard)
        except PersonaPlugError as error:
            failure = pickle.dumps(error)
        return {"name": [shard.name], "failure": [failure]}


@contextmanager
def _counted(job: Job, shard: Shard) -> Iterator[None]:
    """Count the starts of a shard in a file, which a dead worker leaves behind; refuse another start after the last."""
    tries = job.output / f".{shard.name}.tries.tmp"
    with storage_errors(tries), tries.open("ab") as file:
        file.write(b".")
        count = file.tell()
    if count > _TRIES:
        raise WorkerFailure(shard.name, f"each of {_TRIES} workers died, which happens if memory runs out")
    yield
    tries.unlink(missing_ok=True)


def _import_ray() -> Any:
    try:
        data, ray = importlib.import_module("ray.data"), importlib.import_module("ray")
    except ModuleNotFoundError:
        raise MissingExtra("--ray", extra="ray") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs its execution plan; the job has its own progress
    data.DataContext.get_current().enable_progress_bars = False
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster, or start Ray on this machine for the time of the job."""
    if ray.is_initialized():  # by the caller, who also ends it
        yield
        return
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report the use of its parts to its makers
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray warns of each restartable worker
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        _check_port(address)
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises a plain Exception if it starts too slowly
        problem = "Ray did not start" if address == "local" else f"No Ray cluster answers at {address!r}"
        raise ConfigError(
            f"{problem} ({first_line(error)}). Give `local` to start Ray on this machine, `auto` for a cluster that "
            f"this machine belongs to, HOST:PORT or ray://HOST:PORT."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, because Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def _resources(ray: Any, job: Job, *, workers: int | None, shards: int) -> dict[str, Any]:
    """Return the options of the workers: how many, and the processors and GPUs of each."""
    cores = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    wants_gpu = job.config.model.device.partition(":")[0] in ("auto", "cuda")
    gpus = ray.cluster_resources().get("GPU", 0) if wants_gpu else 0
    count = min(workers or int(gpus) or len(cores), shards)
    share = min(cores) / -(-count // len(cores))  # the machine with the fewest cores gets as many workers as others
    return {
        "batch_size": 1,
        "compute": ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
        "num_cpus": int(share) or share,
        "num_gpus": min(1, gpus / count),
    }
