"""The command line: the group of all commands, its errors, and how it behaves among several processes."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import warnings
from typing import Any

import click

from personaplug.cli.benchmark_commands import bench, convert, lamp, report, score, split_command
from personaplug.cli.data_commands import import_command, synthesize
from personaplug.cli.run_commands import (
    encode,
    estimate,
    evaluate,
    generate,
    predict,
    quickstart,
    schema,
    simulate,
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

_AFTER_STOP = {
    "train": "; the same command goes on from the last checkpoint",
    "quickstart": "; the same command goes on where it stopped",
    "bench": "; the same command goes on with the trials that are missing",
    "encode": "; the same command goes on with the texts that are missing",
    "evaluate": "; the same command goes on with the rows that are missing",
    "predict": "; the same command goes on with the rows that are missing",
    "load": "; the same command goes on with the items that are missing",
    "refill-store": "; the same command goes on with the users that are missing",
}
"""What the same command does after Ctrl-C, for commands that keep what they have done."""


class _Group(click.Group):
    """Prints the errors of this package without a traceback; a caller's mistake exits with 2, the rest with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PersonaPlugError as error:
            _tell(error, f"error: {error}")
            sys.exit(2 if isinstance(error, UserError) else 1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output has gone, which click ends quietly
            _tell(error, f"error: the system refused a file or device: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            if is_main():
                click.echo(f"\nstopped{_AFTER_STOP.get(ctx.invoked_subcommand or '', '')}", err=True)
            sys.exit(130)


def _tell(error: Exception, sentence: str) -> None:
    if not is_reporter(error):
        # The launcher ends all others as soon as one has ended. The main process must not be ended before it has told
        # this; whoever is still here after a while is the only one that knows.
        time.sleep(10)
    click.echo(sentence, err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="personaplug", message="personaplug %(version)s")
@click.option("--quiet", is_flag=True, help="Say nothing but results and errors.")
def main(quiet: bool) -> None:
    """Personalize a frozen language model: train a plug that turns a user's history into a few soft tokens."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("personaplug").setLevel(logging.WARNING if quiet else logging.INFO)
    # Set here and not on import: a library leaves the environment of its caller alone.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch loads: threads that wait for each other spin for some microseconds only, then sleep. Spinning on
    # keeps them from other work; going to sleep at once doubles a step of the many small products behind a prompt.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _settle_among_processes(click.get_current_context().invoked_subcommand)


def _settle_among_processes(command: str | None) -> None:
    """Refuse several processes to commands that cannot share their work out; let but one of them speak."""
    if world_size() > 1 and command != "train":
        raise ConfigError(
            f"`personaplug {command}` runs in one process; a launcher has started {world_size()}. Only `train` can "
            f"share its work out: run this without the launcher."
        )
    if is_single_cpu_launch():
        click.echo(
            "warning: `accelerate launch --cpu` starts one process, whatever --num_processes says, and leaves more of "
            "them to MPI. For N on this machine: accelerate launch --multi_gpu --num_processes N",
            err=True,
        )
    if not is_main():
        logging.disable()
        # The hub's client may be loaded already, too late for its environment variable.
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
