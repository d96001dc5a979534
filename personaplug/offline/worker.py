"""A worker: opens the models of a job once, and computes shards. One process runs it, and so does each actor of Ray."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from personaplug.data.parquet_files import import_pyarrow
from personaplug.encoders import Encoder, open_encoder
from personaplug.errors import MissingExtra, PersonaPlugError, RunConflict, WorkerFailure
from personaplug.llm.loading import choose_device, choose_dtype
from personaplug.offline.answers import AnswerWriter
from personaplug.offline.input_files import USER
from personaplug.offline.job import Job, Shard, plug_fingerprint
from personaplug.offline.output_folder import JOB, ShardFacts, write_shard
from personaplug.offline.personas import Histories, ItemHistories, Personas, PersonaWriter, Result, StoredHistories
from personaplug.offline.row_reader import RowReader
from personaplug.offline.rows import Row, RowParser
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run, open_models


class Writer(Protocol):
    """Computes the columns of results."""

    dtype: str

    @property
    def fields(self) -> list[tuple[str, Any]]: ...

    @property
    def about(self) -> dict[str, Any]: ...

    def results(self, rows: Sequence[Row]) -> list[Result]: ...


class Worker:
    """Computes shards of a job. The models are loaded for the first shard."""

    def __init__(self, job: Job) -> None:
        self._job, self._reader = job, RowReader(job.input.columns)

    def run(self, shard: Shard) -> None:
        """Compute and write a shard, unless it exists.

        Raises:
            PersonaPlugError: of any kind. Other errors, whose messages may quote users, become a WorkerFailure.
        """
        try:
            if not (self._job.output / shard.name).exists():  # another worker may have died right after it wrote this
                self._write(shard)
        except PersonaPlugError:
            raise
        except Exception as error:
            raise WorkerFailure(shard.name, _place_of(error)) from None

    def _write(self, shard: Shard) -> None:
        rows = self._job.read_rows(shard, reader=self._reader, parser=self._parser)
        results = iter(self._writer.results([row for row in rows if not row.error]))
        records: list[dict[str, Any]] = [
            {"id": row.id, "user_id": row.user, "error": row.error or None} for row in rows
        ]
        records = [
            record if row.error else {**record, **next(results)} for row, record in zip(rows, records, strict=True)
        ]
        facts = ShardFacts(
            self._job.fingerprint,
            rows=len(rows),
            errors=sum(bool(row.error) for row in rows),
            other_wordings=sum(row.has_other_wording for row in rows),
            without_items=sum(record.get("items") == 0 for record in records),
            dtype=self._writer.dtype,
            about=self._writer.about,
        )
        write_shard(self._job, shard, records, schema=self._schema, facts=facts)

    @cached_property
    def _schema(self) -> Any:
        pyarrow, _ = import_pyarrow()
        names = ["id", *([USER] if USER in self._job.input.columns else [])]
        return pyarrow.schema(
            [*((name, pyarrow.string()) for name in names), *self._writer.fields, ("error", pyarrow.string())]
        )

    @cached_property
    def _parser(self) -> RowParser:
        return self._job.parser(self._run)

    @cached_property
    def _run(self) -> Run:
        """The run, with the settings of the job."""
        job = self._job
        if not (job.output / JOB).is_file():
            raise RunConflict(f"A worker sees another folder {job.output} than the command. Give a shared folder.")
        run = replace(Run.open(job.run_folder), config=job.config)
        if run.id != job.run_id or (job.plug and plug_fingerprint(run, seed=job.seed) != job.plug):
            raise RunConflict(
                f"{job.run_folder} holds another run or plug than at the start of the job. All machines need the same "
                f"files there."
            )
        return run

    @cached_property
    def _writer(self) -> Writer:
        job, run = self._job, self._run
        if job.command == "encode":
            return _persona_writer(job, run)
        models = open_models(job.config)
        if job.is_plain:
            return AnswerWriter(models.llm, run.task, job.config.evaluation)
        plug = run.load_plug("plug", seed=job.seed, models=models)
        personas = _personas(job, plug, models.encoder)
        return AnswerWriter(models.llm, run.task, job.config.evaluation, personas=personas)


def _persona_writer(job: Job, run: Run) -> PersonaWriter:
    """Open encoder and plug, but not the language model, which personas do not need."""
    model = job.config.model
    device = choose_device(model.device)
    encoder = open_encoder(model.encoder, device=device, engine=model.encoder_engine)
    dtype = str(choose_dtype(model.dtype, device=device)[0]).removeprefix("torch.")
    folder = run.check_trained("plug", seed=job.seed)
    plug = PersonaPlug.from_pretrained(folder, encoder=encoder, llm=None).compute_items_in(dtype).to(device)
    batch_size = job.config.evaluation.evaluation_batch_size
    return PersonaWriter(_personas(job, plug, encoder), batch_size=batch_size, dtype=dtype)


def _personas(job: Job, plug: PersonaPlug, encoder: Encoder) -> Personas:
    personalizer = Personalizer(plug, persona_scale=job.config.evaluation.persona_scale)
    return Personas(personalizer, _histories(job, personalizer, encoder))


def _histories(job: Job, personalizer: Personalizer, encoder: Encoder) -> Histories:
    if job.store is None:
        return ItemHistories(personalizer, encoder)
    try:
        from personaplug.serving.persona_cache import check_fits
        from personaplug.store.history_store import HistoryStore
    except ModuleNotFoundError:
        raise MissingExtra("A store of histories", extra="serve") from None
    store = HistoryStore.open(job.store.location, secret=job.store.secret, create=False)
    check_fits(personalizer.plug, store)
    return StoredHistories(personalizer, store, tenant=job.store.tenant)


def _place_of(error: Exception) -> str:
    """Return the type of an error and the place in the code, without the message, which may quote a user."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}, {frame.filename}:{frame.lineno}"
