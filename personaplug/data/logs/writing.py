"""Write the data set of a log, and describe how the log was read."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from personaplug.data.event_log import EventLogReader
from personaplug.data.ids import short_id
from personaplug.data.lamp_writer import check_new, write_lamp
from personaplug.data.logs.log import Log
from personaplug.data.splits import Split, split_by_user
from personaplug.data.task import ReadReport
from personaplug.errors import ConfigError, MissingData, RunConflict
from personaplug.infra.atomic_io import atomic_folder, storage_errors

MAX_SAMPLES_PER_USER = 4
"""Train samples of a user. Each holds the user's history until then, so more samples make much larger files."""

HISTORIES = "histories"
"""The split of a data set that holds the whole history of each user."""

_MANY_DROPPED = 0.1
_MAX_UNUSED = 10
_MIN_USERS = 4
_MIN_DEV_USERS = 2  # a control shows each user the history of another


@dataclass(frozen=True)
class WrittenLog:
    """The reports of the splits of a data set."""

    train: ReadReport
    dev: ReadReport


def write_log(log: Log, folder: Path, *, samples_per_user: int = MAX_SAMPLES_PER_USER) -> WrittenLog:
    """Write a new data set, split by time within each user: `dev` asks the last row, `train` those before it.

    It appears complete or not at all.
    """
    check_new(folder)
    readers = {split: log.reader(split, queries_per_user=samples_per_user) for split in ("train", "dev")}
    with atomic_folder(folder) as draft:
        for split, reader in readers.items():
            with _counts_in_error(log, reader):
                write_lamp(reader, draft, split, task=log.task)
        check_new(folder)  # else it would replace a folder that another import has written meanwhile
    return WrittenLog(readers["train"].report, readers["dev"].report)


def write_user_split(log: Log, reader: EventLogReader, folder: Path, *, dev_share: float) -> Split:
    """Write train and dev, which share no user, and the histories of all users; or check an earlier call's files.

    Raises:
        ConfigError: if too few users have a question.
        RunConflict: if the folder holds other data.
    """
    with storage_errors(folder), TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        draft = Path(place, "draft")
        with _counts_in_error(log, reader):
            users = len({sample.owner for sample in reader})
        if users < _MIN_USERS:
            raise ConfigError(
                f"Expected {_MIN_USERS} or more users with a question and an earlier row, to train and to evaluate on; "
                f"found {users} in {log.name}. {_counts_of_rows(log, reader.report)}."
            )
        parts = split_by_user(reader, draft, share=max(dev_share, _MIN_DEV_USERS / users))
        write_lamp(reader.history_samples(), draft, HISTORIES, task=log.task)
        if not folder.exists():
            draft.rename(folder)
        elif not _holds_same_files(draft, folder):
            raise RunConflict(f"{folder} holds data of other rows. Give the same rows, or choose another `out`.")
    return parts


def describe_columns(log: Log) -> Iterator[str]:
    """Yield a line for each file and each column with its meaning and the reason for it."""
    yield from log.report.files
    for role in log.found.roles:
        names = ", ".join(repr(short_id(name)) for name in role.columns) or "none"
        if role.role == "id" and log.event_id is None:
            yield f"  {'id':<9}{names}: not used, because rows with other contents have the same id or none"
            continue
        more = f"; {log.answers.kind}: {log.answers.reason}" if role.role == "answer" else ""
        yield f"  {role.role:<9}{names}: {role.reason}{more}"
    if log.found.unused:
        names = ", ".join(repr(short_id(name)) for name in log.found.unused[:_MAX_UNUSED])
        more = f" and {len(log.found.unused) - _MAX_UNUSED} more" if len(log.found.unused) > _MAX_UNUSED else ""
        yield f"  {'not used':<9}{names}{more}"


def describe_task(log: Log) -> str:
    """Return a line about the task and its wording."""
    task = log.task
    closed = f" with {len(task.labels)} labels" if task.labels else ""
    return f"task {task.name}: {task.kind}{closed}; the prompt is {log.form.mapping.prompt!r}"


def describe_rows(log: Log, read: ReadReport) -> Iterator[str]:
    """Yield lines about the rows, the dropped rows and the users."""
    report, sizes = log.report, read.rows_of_users
    yield _counts_of_rows(log, read)
    yield from (f"  {problem}" for problem in report.problems)
    if report.without_text:
        yield f"{report.without_text:,} of the kept rows have no text: they are in histories, and are not asked"
    if report.dropped.total() > _MANY_DROPPED * report.rows:
        yield f"warning: {report.dropped.total() / report.rows:.0%} of the rows cannot be used; see the reasons above"
    if sizes:
        yield f"{len(sizes):,} users; rows of a user: median {median(sizes):g}, from {min(sizes):,} to {max(sizes):,}"


def _counts_of_rows(log: Log, read: ReadReport) -> str:
    dropped = log.report.dropped
    losses = [f"{count:,} {reason}" for reason, count in dropped.most_common()]
    losses += [f"{read.copies:,} copies of earlier rows"] if read.copies else []
    counts = (log.report.rows, sum(read.rows_of_users), dropped.total() + read.copies)
    line = "{:,} rows read, {:,} kept, {:,} dropped".format(*counts)
    return f"{line}: {', '.join(losses)}" if losses else line


@contextmanager
def _counts_in_error(log: Log, reader: EventLogReader) -> Iterator[None]:
    """Add the counts of dropped rows to the error of a reader without samples, which gets only the other rows."""
    try:
        yield
    except MissingData as error:
        raise MissingData(
            f"{error} {_counts_of_rows(log, reader.report)}. Give more rows of each user, or options with which more "
            f"rows can be used."
        ) from None


def _holds_same_files(one: Path, other: Path) -> bool:
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)
    ]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, names[0], shallow=False)[1:])
