"""Measure the cost of each part of the default recipe: compare the variants of the experiment `ablations` in one run.

    python benchmarks/parts.py --data DATA/SET [--data DATA/SET …] [--json FILE]

Uses real questions and histories of each set's dev split, the real encoder, and an untrained plug for a model of
SmolLM2-135M's width. Training would not change the cost. Reports milliseconds of processor time, the median of rounds
in which the variants take turns. `persona_ms` is one persona from a precomputed history, the cost per question when
serving. `history_ms` is the precomputation of one history. `step_ms` is the plug's share of a training step: forward
and backward passes for sixteen personas. The times exclude the language model. They also exclude encoding questions
and options, which are cached.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

# Like the command line, before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from personas import plug_of
from store import spent_on

from personaplug.config import PlugConfig
from personaplug.config_resolution import resolved
from personaplug.data import load_task, open_dataset
from personaplug.data.records import Sample
from personaplug.encoders import Encoder, open_encoder
from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.errors import ConfigError
from personaplug.evaluation.experiment import EXPERIMENTS, Experiment, load_experiment
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer

EXPERIMENT = EXPERIMENTS / "ablations.yaml"
SAMPLES = 16
ROUNDS = 9
COLUMNS = ("trained_numbers", "soft_tokens", "persona_ms", "history_ms", "step_ms")


class Variant:
    """A plug with encoded samples in its own input format."""

    def __init__(self, plug: PersonaPlug, *, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.plug = plug
        self.personalizer = Personalizer(self.plug)
        self.samples = samples
        self.histories = [self.personalizer.encode(sample.history, encoder=encoder) for sample in samples]
        self.precomputed = [self.personalizer.precompute(history) for history in self.histories]
        self.joined = self.personalizer.collate(_joined(self.histories), lengths=tuple(map(len, self.histories)))
        self.plug.cache_queries([sample.query for sample in samples], [sample.options for sample in samples])

    def personas(self) -> None:
        """Compute a persona for each sample, one by one."""
        self.plug.eval()
        for sample, history in zip(self.samples, self.precomputed, strict=True):
            self.personalizer.persona(sample.query, history, options=sample.options)

    def precompute(self) -> None:
        """Precompute each history, one by one."""
        for history in self.histories:
            self.personalizer.precompute(history)

    def step(self) -> None:
        """Run the plug's share of a training step."""
        self.plug.train()
        self.plug.zero_grad()
        options = [sample.options for sample in self.samples]
        soft = self.plug([sample.query for sample in self.samples], self.joined, options=options)
        soft.vectors.sum().backward()

    def facts(self) -> dict[str, float]:
        """Return the plug's sizes. The trained numbers include the trained copy of the encoder."""
        return {
            "trained_numbers": sum(parameter.numel() for parameter in self.plug.parameters()),
            "soft_tokens": self.plug.config.soft_tokens,
        }


def _joined(histories: Sequence[EncodedHistory]) -> EncodedHistory:
    parts = zip(*((one.vectors, one.label_ids, one.style) for one in histories), strict=True)
    return EncodedHistory(*(np.concatenate(part) for part in parts))


def costs_on(folder: Path, *, experiment: Experiment) -> dict[str, Any]:
    """Return the costs of every variant on this set, without variants whose plug equals an earlier one's."""
    task = load_task(folder)
    config = next(iter(experiment.configs.values()))
    encoder = open_encoder(config.model.encoder)
    with_items = (sample for sample in open_dataset(folder, "dev", task=task) if sample.history)
    samples = list(islice(with_items, SAMPLES))
    variants: dict[str, Variant] = {}
    for name in experiment.variants:
        plug = _plug_config(experiment, name, folder.name)
        try:
            resolved_plug = resolved(replace(config, plug=plug), task).plug
        except ConfigError:
            continue  # the variant does not apply to this set
        if resolved_plug not in [variant.plug.config for variant in variants.values()]:
            untrained = plug_of(resolved_plug, encoder=encoder, labels=task.labels)
            variants[name] = Variant(untrained, encoder=encoder, samples=samples)
    times = _times(variants)
    return {
        "items": round(mean(len(sample.history) for sample in samples), 1),
        "variants": {name: variant.facts() | times[name] for name, variant in variants.items()},
    }


def _plug_config(experiment: Experiment, variant: str, name: str) -> PlugConfig:
    """Return a variant's plug config for a set, or for the experiment's first set if the set is not part of it."""
    known_set = name if name in experiment.sets else experiment.sets[0]
    return experiment.configs[variant, known_set].plug


def _times(variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """Measure the milliseconds of all variants in turn, so that other work on the machine affects all of them."""
    work: dict[str, tuple[Callable[[Variant], None], int]] = {
        "persona_ms": (Variant.personas, SAMPLES),
        "history_ms": (Variant.precompute, SAMPLES),
        "step_ms": (Variant.step, 1),
    }
    times: dict[str, dict[str, list[float]]] = {name: {column: [] for column in work} for name in variants}
    for _ in range(ROUNDS + 1):
        for name, variant in variants.items():
            for column, (run, calls) in work.items():
                times[name][column].append(1e3 * spent_on(run, variant).processor / calls)
    # Skip the first round, which fills caches.
    return {
        name: {column: round(median(values[1:]), 2) for column, values in by_column.items()}
        for name, by_column in times.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment = load_experiment(EXPERIMENT)
    result: dict[str, Any] = {}
    for folder in arguments.data:
        costs = result[folder.name] = costs_on(folder, experiment=experiment)
        print(f"{folder.name}: {SAMPLES} questions, {costs['items']} items each")
        print(f"  {'':20}" + "".join(f"{column:>17}" for column in COLUMNS))
        for name, values in costs["variants"].items():
            print(f"  {name:20}" + "".join(f"{values[column]:>17,}" for column in COLUMNS), flush=True)
    if arguments.json:
        write_json(arguments.json, {"sets": result, "versions": package_versions(), "machine": machine_info()})


if __name__ == "__main__":
    main()
