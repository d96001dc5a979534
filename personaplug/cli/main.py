"""The command group: error handling, logging and multi-process runs."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import warnings
from typing import Any

import click

from personaplug.cli.answer_command import generate
from personaplug.cli.benchmark_commands import bench, convert, lamp, report, score, split_command
from personaplug.cli.data_commands import import_command, simulate, synthesize
from personaplug.cli.encode_command import encode
from personaplug.cli.options import RESUME_POINT
from personaplug.cli.run_commands import (
    estimate,
    evaluate,
    predict,
    quickstart,
    schema,
    train,
)
from personaplug.cli.serving_commands import (
    create_key,
    erase_user,
    explain,
    refill_store,
    revoke_key,
    serve,
    verify_receipt,
)
from personaplug.cli.store_commands import (
    backup,
    list_preferences,
    load,
    replay_erasures,
    restore,
    set_preferences,
    users,
)
from personaplug.errors import ConfigError, PersonaPlugError, UserError
from personaplug.infra.distributed import (
    is_main,
    is_reporter,
    is_single_cpu_launch,
    world_size,
)
from personaplug.infra.progress import show_progress, stop_bars

_RESUME_POINTS = {
    "train": "the last checkpoint",
    "quickstart": "this point",
    "bench": "the first unfinished trial",
    "encode": "the first text without a vector",
    "evaluate": "the first unfinished row",
    "predict": "the first unfinished row",
    "load": "the first item that is not stored",
    "refill-store": "the first user that is not copied",
}
"""Where a command resumes when the user repeats it after Ctrl-C. A command may replace it in `RESUME_POINT`."""


class _Group(click.Group):
    """Prints the package's errors without a traceback. The exit code is 2 for a user error, else 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                stop_bars()  # before the message of an error
        except PersonaPlugError as error:
            _print_error(error, f"error: {error}")
            sys.exit(2 if isinstance(error, UserError) else 1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the output pipe is closed; click exits without a message
            _print_error(error, f"error: the operating system refused access to a file or device: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            if is_main():
                point = ctx.meta.get(RESUME_POINT) or _RESUME_POINTS.get(ctx.invoked_subcommand or "")
                advice = f"; run the same command again to resume from {point}" if point else ""
                click.echo(f"\nstopped{advice}", err=True)
            sys.exit(130)


def _print_error(error: Exception, message: str) -> None:
    if not is_reporter(error):
        # The launcher kills all processes when one exits. The main process needs time to print this error. If this
        # process is alive after the wait, no other process has printed the error.
        time.sleep(10)
    click.echo(message, err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="personaplug", message="personaplug %(version)s")
@click.option("--quiet", is_flag=True, help="Print only results and errors.")
def main(quiet: bool) -> None:
    """Personalize a frozen language model: train a plug that maps a user's history to a few soft tokens."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("personaplug").setLevel(logging.WARNING if quiet else logging.INFO)
    show_progress(not quiet)
    # Set here, not on import: a library must not change its caller's environment.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch reads this when it loads. Waiting threads spin for some microseconds, then sleep. Longer spinning blocks
    # other work. Without spinning, the many small matrix products of a step take twice the time.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _set_up_processes(click.get_current_context().invoked_subcommand)


def _set_up_processes(command: str | None) -> None:
    """Refuse several processes for commands other than `train`; silence all processes but the main one."""
    if world_size() > 1 and command != "train":
        raise ConfigError(
            f"`personaplug {command}` runs in one process, but a launcher started {world_size()}. Only `train` can "
            f"use several processes: run this command without the launcher."
        )
    if is_single_cpu_launch():
        click.echo(
            "warning: `accelerate launch --cpu` ignores --num_processes and starts one process, unless MPI starts "
            "more. For N processes on this machine: accelerate launch --multi_gpu --num_processes N",
            err=True,
        )
    if not is_main():
        logging.disable()
        # The hub's client reads its environment variable on import, and may be imported already.
        from huggingface_hub.utils.tqdm import disable_progress_bars

        warnings.simplefilter("ignore")
        disable_progress_bars()


for _command in (
    *(quickstart, simulate, encode, train, evaluate, predict, generate, estimate, schema),
    *(bench, report, score, lamp, convert, import_command, split_command, synthesize),
    *(serve, create_key, revoke_key, erase_user, explain, refill_store, verify_receipt),
    *(load, users, backup, restore, replay_erasures, list_preferences, set_preferences),
):
    main.add_command(_command)
