"""A job: what it computes, from what, and into which shards. Everything that results depend on has one fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from personaplug.config import SPEED_ONLY, Config
from personaplug.encoders.joint import OUTSIDE
from personaplug.errors import ConfigError
from personaplug.offline.input_files import PROMPT, Input, InputFile, read_input
from personaplug.offline.row_reader import RowReader
from personaplug.offline.rows import Row, RowParser, check_columns
from personaplug.plug.saving import ABOUT, WEIGHTS, read_description
from personaplug.run import Run

Command = Literal["generate", "encode"]

_RESULT_SETTINGS = (
    *("decoding", "evaluation_batch_size", "num_beams", "sample_temperature", "max_new_tokens"),
    *("persona_scale", "draw_seed"),
)
"""The settings of an evaluation that change results. The batch size changes their rounding."""

_PREVIEW_ROWS = 100


@dataclass(frozen=True, repr=False)
class StorePlace:
    """A store of histories. A `repr` would show the password of a URL."""

    location: str
    tenant: str = "default"
    secret: Path | None = None


@dataclass(frozen=True)
class Shard:
    """A part of the output, from consecutive rows of one file.

    Attributes:
        name: name of the file in the output folder.
        file: index of the input file.
        first: number of the first row, from 0.
    """

    name: str
    file: int
    first: int
    rows: int


@dataclass(frozen=True, repr=False)
class Job:
    """A job. Workers get it by pickling, so it holds paths and settings, but no open files and no models.

    Attributes:
        config: the run's config, with the settings of the command.
        plug: fingerprint of the plug's files; "" for the plain model.
        store: where the histories are; None = in the input.
        shard_rows: maximum rows of a shard.
    """

    command: Command
    run_folder: Path
    run_id: str
    plug: str
    seed: int
    config: Config
    input: Input
    store: StorePlace | None
    output: Path
    shard_rows: int

    @property
    def is_plain(self) -> bool:
        return not self.plug

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on, as JSON."""
        model, evaluation = asdict(self.config.model), asdict(self.config.evaluation)
        settings = {name: value for name, value in model.items() if f"model.{name}" not in SPEED_ONLY}
        store = None if self.store is None else {"location": _hash(self.store.location), "tenant": self.store.tenant}
        return {
            "command": self.command,
            "run": self.run_id,
            "plug": self.plug,
            "seed": self.seed,
            "settings": settings | {name: evaluation[name] for name in _RESULT_SETTINGS},
            "store": store,
            "rows per shard": self.shard_rows,
            "columns": list(self.input.columns),
            "input": [{"file": file.name, "rows": file.rows, "digest": file.digest} for file in self.input.files],
        }

    @cached_property
    def fingerprint(self) -> str:
        return _hash(json.dumps(self.identity, sort_keys=True))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards of the job, in the order of the input."""
        return tuple(
            Shard(_shard_name(index, file, first, self.fingerprint), index, first, min(self.shard_rows, remaining))
            for index, file in enumerate(self.input.files)
            for first, remaining in ((start, file.rows - start) for start in range(0, file.rows, self.shard_rows))
        )

    def parser(self, run: Run) -> RowParser:
        """Return the parser of the job's rows."""
        return RowParser(
            run.task,
            self.input.columns,
            wordings=run.wordings,
            is_plain=self.is_plain,
            needs_user=self.store is not None,
            vector_width=None if self.is_plain else _vector_width(run, seed=self.seed),
        )

    def read_rows(self, shard: Shard, *, reader: RowReader, parser: RowParser) -> list[Row]:
        """Read and parse the rows of a shard."""
        file = self.input.files[shard.file]
        records = reader.read(file.path, first=shard.first, rows=shard.rows)
        numbered = enumerate(records, start=shard.first + 1)
        return [parser.parse(record, default_id=f"{file.name}:{number}") for number, record in numbered]


def plan_job(
    command: Command,
    run: Run,
    config: Config,
    *,
    source: Path,
    output: Path,
    seed: int | None = None,
    plain: bool = False,
    store: StorePlace | None = None,
    shard_rows: int = 1000,
) -> Job:
    """Describe a job and check its input, before any model is loaded.

    Args:
        source: a Parquet file, or a folder of such files.
        seed: training seed of the plug; None = the run's first seed.
        plain: answer without the plug.
    Raises:
        UserError: if the input, the plug or the settings are unsuitable, or no row of the beginning is valid.
    """
    source, output = source.absolute(), output.absolute()
    if output.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"--output {output} and --input {source} contain each other. Give two separate folders.")
    if command == "encode" and config.evaluation.persona_scale == 0:
        raise ConfigError("persona_scale=0 gives no soft tokens. Give another persona_scale.")
    chosen, found = run.config.training.seed_or_first(seed), read_input(source)
    needs_prompt = command == "generate"
    check_columns(found.columns, needs_prompt=needs_prompt, is_plain=plain, has_store=store is not None)
    job = Job(
        command=command,
        run_folder=run.folder.absolute(),
        run_id=run.id,
        plug="" if plain else plug_fingerprint(run, seed=chosen),
        seed=chosen,
        config=config,
        input=found,
        store=store,
        output=output,
        shard_rows=shard_rows,
    )
    _check_first_rows(job, run)
    return job


def plug_fingerprint(run: Run, *, seed: int) -> str:
    """Return a hash of the files of a run's plug; MissingData if its training has not finished."""
    folder = run.check_trained("plug", seed=seed)
    return _hash(*((folder / name).read_bytes() for name in (ABOUT, WEIGHTS)))


def _vector_width(run: Run, *, seed: int) -> int | None:
    _, spec, _ = read_description(run.check_trained("plug", seed=seed))
    return dict(spec.encoder.parts).get(OUTSIDE)


def uses_prompts(job: Job) -> bool:
    """Return whether personas are computed for prompts; without prompts, they are computed for an empty query."""
    return PROMPT in job.input.columns


def _check_first_rows(job: Job, run: Run) -> None:
    """Refuse an input whose first rows are all invalid, such as prompts without the wording of the task."""
    parser, reader = job.parser(run), RowReader(job.input.columns)
    first = next(file for file in job.input.files if file.rows)
    shard = Shard("", job.input.files.index(first), 0, min(first.rows, _PREVIEW_ROWS))
    rows = job.read_rows(shard, reader=reader, parser=parser)
    if all(row.error for row in rows):
        raise ConfigError(f"All of the first {len(rows)} rows of {first.path} are invalid; row 1: {rows[0].error}")


def _shard_name(index: int, file: InputFile, first: int, fingerprint: str) -> str:
    stem = re.sub(r"[^\w=.-]+", "-", file.name.removesuffix(".parquet"), flags=re.ASCII)[-80:]
    return f"part-{index:05d}-{stem}-{first:010d}-{fingerprint[:8]}.parquet"


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
