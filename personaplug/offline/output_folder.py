"""The output of a job: a Parquet file for each shard, `_job.json` from the start, `_manifest.json` at the end.

A shard appears under its name only when it is complete. Readers of the folder skip names with an underscore.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from personaplug.data.parquet_files import import_pyarrow
from personaplug.errors import DamagedFile, MissingData, RunConflict
from personaplug.infra.atomic_io import atomic_write, storage_errors, write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.environment import package_versions
from personaplug.infra.locks import sole_process
from personaplug.offline.job import Job, Shard

JOB, MANIFEST, LOCK = "_job.json", "_manifest.json", "_job.lock"
_FACTS = b"personaplug"
_REMEDY = "Delete it and run the same command again."


@dataclass(frozen=True)
class ShardFacts:
    """Facts about a written shard.

    Attributes:
        job: fingerprint of the job.
        errors: rows with an error instead of a result.
        other_wordings: rows whose prompt differs from the prompts of the training.
        without_items: rows of users without a history.
        dtype: number format of the model that computed the shard.
        about: what readers of the columns need to know.
    """

    job: str
    rows: int
    errors: int
    other_wordings: int
    without_items: int
    dtype: str
    about: dict[str, Any]


@contextmanager
def opened(job: Job) -> Iterator[None]:
    """Start or resume a job in its output folder, and keep other processes out of the folder.

    Raises:
        RunConflict: if the folder holds another job or other files, or another process uses it.
    """
    folder = job.output
    _holds_job(folder)  # before the lock, because other folders should not get its file
    remedy = "Wait for its end and run the same command again, or choose another --output."
    with sole_process(folder / LOCK, work=f"writing to {folder}", remedy=remedy):
        if _holds_job(folder):  # again, because another process may have started a job meanwhile
            _check_same(job, read_json(folder / JOB, remedy="Restore it, or choose another --output."))
        else:
            write_checked_json(folder / JOB, job.identity)
        _check_files(job)
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        yield


def _holds_job(folder: Path) -> bool:
    """Return whether a folder, which is created if needed, holds a job; raise RunConflict if it holds other files."""
    with storage_errors(folder / JOB):
        names = {path.name for path in folder.iterdir()}
    own = (LOCK, f".{JOB}.")  # with the lock's journal, and a description that another process is writing
    if JOB not in names and not all(name.startswith(own) for name in names):
        raise RunConflict(f"{folder} is neither empty nor the output of a job. Choose another --output.")
    return JOB in names


def missing_shards(job: Job) -> list[Shard]:
    """Return the shards that are not written yet."""
    names = {path.name for path in job.output.iterdir()}
    return [shard for shard in job.shards if shard.name not in names]


def write_shard(job: Job, shard: Shard, rows: Sequence[Mapping[str, Any]], *, schema: Any, facts: ShardFacts) -> None:
    """Write a shard under a temporary name, then rename it."""
    pyarrow, parquet = import_pyarrow()
    assert len(rows) == shard.rows, "a result for each row"
    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    table = table.replace_schema_metadata({_FACTS: json.dumps(asdict(facts))})
    atomic_write(job.output / shard.name, lambda temporary: parquet.write_table(table, temporary))


def read_facts(job: Job, shard: Shard) -> ShardFacts:
    """Read the footer of a shard; raise MissingData or DamagedFile if it is not complete."""
    pyarrow, parquet = import_pyarrow()
    path = job.output / shard.name
    if not path.exists():
        raise MissingData(f"{path} is missing. All workers and this machine need to see the same output folder.")
    try:
        with parquet.ParquetFile(path) as file:
            rows, metadata = file.metadata.num_rows, file.metadata.metadata or {}
        facts = ShardFacts(**json.loads(metadata[_FACTS]))
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError):
        raise DamagedFile(path, reason="it is not a shard of this job", remedy=_REMEDY) from None
    if (facts.job, facts.rows, rows) != (job.fingerprint, shard.rows, shard.rows):
        raise DamagedFile(path, reason=f"it should have {shard.rows} rows, found {rows}", remedy=_REMEDY)
    return facts


def finish(job: Job) -> dict[str, Any]:
    """Check that the shards hold each row of the input once, and write and return the manifest.

    Raises:
        DamagedFile: if a shard is missing or has another number of rows.
        RunConflict: if the input changed during the job, or the folder has other Parquet files.
    """
    _check_files(job)
    if changed := [file.name for file in job.input.files if not file.is_unchanged()]:
        raise RunConflict(
            f"{changed[0]} changed during the job, so the results mix two inputs. Run the job again with another "
            f"--output."
        )
    facts = [read_facts(job, shard) for shard in job.shards]
    rows = sum(each.rows for each in facts)
    assert rows == job.input.rows, "shards cover the input"
    manifest = {
        **job.identity,
        **facts[0].about,
        "job": job.fingerprint,
        "rows": rows,
        "errors": sum(each.errors for each in facts),
        "other_wordings": sum(each.other_wordings for each in facts),
        "without_items": sum(each.without_items for each in facts),
        "dtypes": sorted({each.dtype for each in facts}),
        "shards": [{"file": shard.name, "rows": shard.rows} for shard in job.shards],
        "versions": package_versions(),
    }
    write_checked_json(job.output / MANIFEST, manifest)
    return manifest


def _check_same(job: Job, existing: Mapping[str, Any]) -> None:
    identity = job.identity
    names = [name for name in identity if name != "settings" and identity[name] != existing.get(name)]
    settings = existing.get("settings", {})
    names += [name for name, value in identity["settings"].items() if settings.get(name) != value]
    if names:
        raise RunConflict(
            f"{job.output} holds a job with another {', '.join(names)}. To resume that job, give the same values; "
            f"otherwise choose another --output."
        )


def _check_files(job: Job) -> None:
    """Refuse Parquet files that are no shards of the job, because readers of the folder would read them too."""
    names = {shard.name for shard in job.shards}
    if others := sorted(path.name for path in job.output.glob("[!._]*.parquet") if path.name not in names):
        raise RunConflict(f"{job.output} holds {others[0]}, which is not a part of this job. Move it elsewhere.")
