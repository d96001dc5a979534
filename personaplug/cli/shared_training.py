"""`train` for several tasks, and the printed summary of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from personaplug.cli.options import device_of, show, tell_read, warn_of_few_users
from personaplug.config import Config
from personaplug.infra.distributed import connect, disconnect, is_main, synchronized


def train_together(
    folders: Sequence[Path],
    out: Path,
    config: Config,
    *,
    weights: Sequence[float],
    vectors: Path | None,
    skip_bad: int,
) -> None:
    """Train a plug for the tasks in several folders; the tasks share all parameters except their instructions."""
    from personaplug.data import load_task, open_dataset
    from personaplug.run import open_models
    from personaplug.shared_run import SharedRun
    from personaplug.training.shared import train_shared

    show(config, "model", "plug", "training")
    connect(device_of(config))
    with synchronized():
        tasks = [load_task(folder) for folder in folders]
    shared = SharedRun.plan(out, config=config, tasks=tasks, weights=weights, vectors=vectors)
    with synchronized():
        readers = [
            open_dataset(folder, "train", task=task, skip_bad=skip_bad, max_history=config.plug.max_history)
            for folder, task in zip(folders, tasks, strict=True)
        ]
        models = open_models(shared.runs[0].config, readers=readers)
    shared.start()  # after data and models are open, so that a failed start leaves no files
    trained = train_shared(shared, readers, models=models)
    disconnect()
    if is_main():
        tell_trained(trained)
        for task, reader in zip(tasks, readers, strict=True):
            tell_read(reader, f"{task.name} train")
            warn_of_few_users(reader.report.users)


def tell_trained(folders: Sequence[Path]) -> None:
    """Print steps, time and best loss of trainings, from their files."""
    from personaplug.infra.checksums import read_json

    for folder in folders:
        fitted = read_json(folder / "fit.json", remedy=f"Delete {folder} and train again.")
        click.echo(
            f"{folder}: {fitted['steps']} steps, {fitted['samples']:,} samples in {fitted['seconds']:.0f} s; "
            f"best step {fitted['best_step']} with validation loss {fitted['best_loss']:.4f} "
            f"per {fitted.get('unit', 'token')}"
        )
        if "served_as" in fitted:
            losses = ", ".join(f"{loss:.4f} as {name}" for name, loss in fitted["loss_by_choice"].items())
            click.echo(f"  loss of held-out users: {losses}; the plug serves users as {fitted['served_as']}")
