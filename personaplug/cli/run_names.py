"""The option `--run-for NAME=RUN`: further plugs of a server, by the name of a model in requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

_MAX_CHARACTERS = 255  # of a model's name in a request


def named_runs(ctx: click.Context, param: click.Parameter, words: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=RUN words to the folders of runs by name; BadParameter if a name is invalid or occurs twice."""
    runs: dict[str, Path] = {}
    for word in words:
        name, separator, folder = word.partition("=")
        if not (separator and folder and name.strip() == name != "" and name.isprintable()):
            raise click.BadParameter(f"{word!r} is not NAME=RUN, such as v2=runs/v2.", ctx, param)
        if len(name) > _MAX_CHARACTERS:
            raise click.BadParameter(f"a name may have at most {_MAX_CHARACTERS} characters.", ctx, param)
        if name in runs:
            raise click.BadParameter(f"the name {name!r} occurs twice. Give each run its own name.", ctx, param)
        runs[name] = Path(folder)
    return runs
