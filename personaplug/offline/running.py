"""Run a job: start or resume it, compute the missing shards in this process or on Ray, and check the output."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.infra.progress import Progress
from personaplug.offline.job import Job, Shard
from personaplug.offline.output_folder import finish, missing_shards, opened
from personaplug.offline.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayPlace:
    """Where Ray runs.

    Attributes:
        address: `local` for this machine, `auto` for the cluster of this machine, HOST:PORT, or ray://HOST:PORT.
        workers: number of workers; None = one for each GPU or, without GPUs, for each machine.
    """

    address: str
    workers: int | None = None


def run_job(job: Job, *, ray: RayPlace | None = None) -> dict[str, Any]:
    """Compute the shards that are missing, check that each row has one result, and return the manifest.

    After an interruption, repeat the call to continue with the first unfinished shard.

    Args:
        ray: None = compute in this process.
    Raises:
        PersonaPlugError: if the output folder holds another job, or a shard cannot be computed.
    """
    with opened(job):
        missing = missing_shards(job)
        rows = sum(shard.rows for shard in missing)
        logger.info(
            "%s rows in %d shards; %d shards are finished",
            f"{job.input.rows:,}",
            len(job.shards),
            len(job.shards) - len(missing),
        )
        if missing:
            start = job.input.rows - rows
            with Progress(job.command, total=job.input.rows, start=start, unit="rows") as progress:
                for shard in _computed(job, missing, ray=ray):
                    progress.advance(shard.rows)
        return finish(job)


def _computed(job: Job, shards: Sequence[Shard], *, ray: RayPlace | None) -> Iterator[Shard]:
    """Yield each shard when it is written."""
    if ray is not None:
        from personaplug.offline.on_ray import compute

        yield from compute(job, shards, address=ray.address, workers=ray.workers)
        return
    worker = Worker(job)
    for shard in shards:
        worker.run(shard)
        yield shard
