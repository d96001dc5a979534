"""Options of jobs over Parquet files, and how a command runs such a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from personaplug.cli.options import FILE, FOLDER, RESUME_POINT, secret_option, show
from personaplug.config import Config
from personaplug.errors import ConfigError

if TYPE_CHECKING:
    from personaplug.offline.job import Command as JobCommand
    from personaplug.run import Run

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--input", "source", type=FILE, help="Folder of Parquet files, or one file; see docs/offline.md."),
    click.option("--output", type=FOLDER, help="Folder for the results; an unfinished job is resumed."),
    click.option("--store", help="Store with the histories of --input: a file or a postgresql:// URL."),
    click.option("--tenant", default="default", show_default=True, help="Tenant of the users in --store."),
    secret_option,
    click.option(
        "--shard-rows",
        default=1000,
        show_default=True,
        type=click.IntRange(1),
        help="Rows of --input that a worker computes and writes at once.",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Compute --input on Ray: `local`, `auto`, HOST:PORT or ray://HOST:PORT.  [default: in this process]",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Workers on Ray.  [default: one for each GPU or, without GPUs, for each machine]",
    ),
)


def offline_options(command: Command) -> Command:
    """Add the options of jobs to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, repr=False)
class OfflineOptions:
    """The values of `offline_options`."""

    source: Path | None
    output: Path | None
    store: str | None
    tenant: str
    secret: Path | None
    shard_rows: int
    ray: str | None
    workers: int | None

    def is_used(self, *, without: Sequence[str], jobs_only: Sequence[str] = ()) -> bool:
        """Return whether the command runs a job; ConfigError if it gives options that do not belong together.

        Args:
            without: names of the command's parameters that jobs do not use.
            jobs_only: names of the command's parameters that only jobs use, beside those of `offline_options`.
        """
        if self.source is None:
            if words := _given([*jobs_only, *(each.name for each in fields(self))]):
                raise ConfigError(f"Only jobs over Parquet files use {words}. Give --input too, or remove {words}.")
            return False
        if words := _given(without):
            raise ConfigError(f"--input does not use {words}. Remove {words}. See docs/offline.md.")
        if self.output is None:
            raise ConfigError("--input needs --output, a folder for the results.")
        if self.workers is not None and self.ray is None:
            raise ConfigError("--workers applies to Ray. Give --ray with the address of Ray, such as --ray local.")
        if self.store is None and (words := _given(["tenant", "secret"])):
            raise ConfigError(f"Only a store uses {words}. Give --store too, or remove {words}.")
        return True


def _given(names: Sequence[str]) -> str:
    """Return which of some options the command line gives, as the user writes them."""
    context = click.get_current_context()
    return ", ".join(
        each.opts[0]
        for each in context.command.params
        if each.name in names and context.get_parameter_source(each.name) is ParameterSource.COMMANDLINE
    )


def run_offline(
    command: JobCommand, run: Run, config: Config, options: OfflineOptions, *, seed: int | None, plain: bool = False
) -> None:
    """Run or resume a job, and print what it wrote."""
    from personaplug.offline.job import StorePlace, plan_job
    from personaplug.offline.running import RayPlace, run_job

    assert options.source is not None
    assert options.output is not None
    show(config, "evaluation")
    secret = None if options.secret is None else options.secret.absolute()
    job = plan_job(
        command,
        run,
        config,
        source=options.source,
        output=options.output,
        seed=seed,
        plain=plain,
        store=None if options.store is None else StorePlace(_absolute(options.store), options.tenant, secret),
        shard_rows=options.shard_rows,
    )
    click.get_current_context().meta[RESUME_POINT] = "the first unfinished shard"
    manifest = run_job(job, ray=None if options.ray is None else RayPlace(options.ray, options.workers))
    _tell(manifest, options.output)


def _absolute(store: str) -> str:
    """Return a path of a store that workers in other folders can open; URLs stay unchanged."""
    return store if "://" in store else str(Path(store).absolute())


def _tell(manifest: dict[str, Any], output: Path) -> None:
    rows, errors, others = (manifest[key] for key in ("rows", "errors", "other_wordings"))
    click.echo(f"{rows:,} rows in {len(manifest['shards']):,} files in {output}; each row of the input once")
    if errors:
        click.echo(f"{errors:,} rows have no result; the column error has the reasons", err=True)
    if others:
        click.echo(f"warning: {others:,} prompts differ in their wording from the prompts of the training", err=True)
    if manifest["plug"] and manifest["without_items"] == rows - errors > 0:
        click.echo("warning: no row has a history. Check the column history, or --store and --tenant.", err=True)
    if len(manifest["dtypes"]) > 1:
        formats = " and ".join(manifest["dtypes"])
        click.echo(f"warning: workers computed in {formats}. Their results differ in rounding.", err=True)
