"""Trackers of a training: TensorBoard and Weights & Biases, through the trackers of Accelerate."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from personaplug.errors import ConfigError, MissingExtra, first_line

ReportTo = Literal["none", "tensorboard", "wandb", "all"]

_PROJECT = "personaplug"


def check_trackers(report_to: ReportTo) -> None:
    """Raise `MissingExtra` if the package of a tracker is not installed."""
    for name in _names(report_to):
        if find_spec(name) is None:
            raise MissingExtra(f"training.report_to={report_to}", extra=name)


class Trackers:
    """The trackers of one training, in the main process.

    Args:
        folder: the folder of the training, for TensorBoard's events. Weights & Biases writes where it always does,
            because its files contain links that lead out of its folder, which a run must not contain.
        owner: unique name of the training, so that a resumed training continues the same run of Weights & Biases.
        config: the settings to record. They must contain no user text.
        after: number of steps that were done before a resumption; TensorBoard hides its events of later steps.
    Raises:
        ConfigError: if Weights & Biases does not start.
    """

    def __init__(
        self, report_to: ReportTo, *, folder: Path, owner: str, config: Mapping[str, Mapping[str, Any]], after: int
    ) -> None:
        check_trackers(report_to)
        names = _names(report_to)
        self._trackers: list[Any] = []
        if names:
            from accelerate import PartialState

            PartialState()  # the trackers' own log messages need it
        if "tensorboard" in names:
            self._trackers.append(_open_tensorboard(folder, config, after=after))
        if "wandb" in names:
            self._trackers.append(_open_wandb(folder, config, owner=owner))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Report values of a step, by tag."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _names(report_to: ReportTo) -> tuple[str, ...]:
    return {"none": (), "all": ("tensorboard", "wandb")}.get(report_to, (report_to,))


def _open_tensorboard(folder: Path, config: Mapping[str, Mapping[str, Any]], *, after: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", folder, purge_step=after + 1 if after else None)
    tracker.start()
    if not after:
        # As text, because Accelerate writes settings into a second folder, which TensorBoard shows as another run.
        settings = [f"    {section}.{key}: {value}" for section, own in config.items() for key, value in own.items()]
        tracker.log({"config": "\n".join(settings)}, step=0)
    return tracker


def _open_wandb(folder: Path, config: Mapping[str, Mapping[str, Any]], *, owner: str) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    run, part, seed = folder.absolute().parts[-3:]
    # Arguments override the variables of Weights & Biases, so give only those that the user did not set.
    named = {"name": f"{run}/{part}/{seed}", "group": run}
    variables = {"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP"}
    named = {key: value for key, value in named.items() if not os.environ.get(variables[key])}
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT") or _PROJECT,
        **named,
        id=hashlib.blake2b(owner.encode(), digest_size=8).hexdigest() if owner else None,
        resume="allow",
        settings={"console": "off"},  # otherwise Weights & Biases would copy all printed lines
    )
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise ConfigError(
            f"Weights & Biases did not start ({first_line(error).rstrip('.')}). Run `wandb login`, set "
            f"WANDB_MODE=offline, or remove report_to."
        ) from error
    tracker.store_init_configuration(dict(config))
    return tracker
