"""Measure the peak memory of training on large histories and long prompts, with a real model.

    python benchmarks/memory.py [--items 200000] [--steps 20] [--json FILE] [key=value …]

Writes a simulated data set with this number of different items in LaMP's format, trains a few steps on it in this
process, and prints the process's peak memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from personaplug.config import PAPER, Config
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task_registry import lamp_task
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.infra.memory import peak_memory
from personaplug.infra.model_hub import PACKAGED_MODELS
from personaplug.run import Run, open_models
from personaplug.training.parts import train

PER_USER = 250
LONGEST_QUERY = 400  # words of at least one token
_MIDDLE = ("long", "and", "slow", "and", "then", "rather", "loud", "but", "never", "dull", "yet", "kind")
LIMIT_GIB = 4


def samples(items: int) -> Iterator[Sample]:
    """Yield one sample per user: a query of up to 400 words, and 250 unique reviews as history."""
    for user in range(items // PER_USER):
        history = tuple(
            HistoryItem(
                f"{user}-{i}",
                (
                    (
                        "text",
                        f"Film {i} of user {user}: {'slow' if i % 3 else 'quick'}.",
                    ),
                    ("score", str(i % 5 + 1)),
                ),
                "score",
            )
            for i in range(PER_USER)
        )
        # Lengths cover the range in a mixed order, so that every batch has long and short queries.
        words = 10 + user * 97 % (LONGEST_QUERY - 9)
        query = " ".join([f"Another film, number {user}, with a", *islice(cycle(_MIDDLE), words - 8), "middle part."])
        prompt = (
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
            f"without further explanation. review: {query}"
        )
        yield Sample(str(user), f"u{user}", prompt, query, str(user % 5 + 1), history)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    settings = [*PACKAGED_MODELS, f"max_steps={arguments.steps}", "controls=false", *arguments.settings]
    config = load_config(overrides=settings, base=Config(plug=PAPER))
    with tempfile.TemporaryDirectory() as folder:
        write_lamp(samples(arguments.items), folder, "train", task=lamp_task("LaMP_3"))
        run = Run.create(Path(folder) / "run", config=config, task=load_task(folder))
        train(run, open_dataset(folder, "train", task=run.task), models=open_models(config))
    peak = peak_memory()
    print(
        f"{arguments.items:,} items of history, {arguments.steps} steps, batches of {config.training.batch_size}: "
        f"peak {peak / 2**30:.2f} GiB ({'under' if peak < LIMIT_GIB * 2**30 else 'OVER'} {LIMIT_GIB} GiB)"
    )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "items": arguments.items,
                "steps": arguments.steps,
                "peak_memory_bytes": peak,
                "versions": package_versions(),
                "machine": machine_info(),
            },
        )


if __name__ == "__main__":
    main()
