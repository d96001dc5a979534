"""Rows trained on few real samples beside those trained on synthetic ones too, with paired tests.

    python benchmarks/synthetic.py --data FEW [--results benchmarks/results]

The experiment `synthetic` fills a table for each set. This joins the tables of SET and SET+synthetic, which score the
same dev samples: `plug` and `plug+synthetic` become rows of one table, RESULTS/synthetic/both/SET.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.results import build_results
from personaplug.analysis.results_file import Results, write_results
from personaplug.analysis.trials import EvalSamples, Trial, TrialFile
from personaplug.data import load_task
from personaplug.errors import MissingData, RunConflict
from personaplug.evaluation.evaluator import settings_of
from personaplug.evaluation.experiment import EXPERIMENTS, Experiment, load_experiment

ENDING = "+synthetic"
EXPERIMENT = EXPERIMENTS / "synthetic.yaml"


def joined(experiment: Experiment, name: str, *, data: Path, results: Path) -> Results:
    """Return the rows of a set and those of its copy with synthetic samples as one table.

    Args:
        data, results: folders as `personaplug bench` takes them.
    Raises:
        MissingData: if one of the two sets has no trials.
        RunConflict: if the two score different samples.
    """
    folder = results / experiment.name
    (samples, trials), (others, more) = (_loaded(folder / f"{each}.trials.jsonl") for each in (name, name + ENDING))
    if (samples.groups, samples.history_items) != (others.groups, others.history_items):
        raise RunConflict(f"{name} and {name}{ENDING} have different dev samples. Make both from the same data set.")
    settings = settings_of(load_task(data / name), experiment.configs["", name].evaluation)
    return build_results(samples, [*trials, *map(_renamed, more)], settings=settings)


def _loaded(path: Path) -> tuple[EvalSamples, list[Trial]]:
    samples, trials = TrialFile(path).load()
    if samples is None or not trials:
        raise MissingData(f"There are no trials in {path}. `personaplug bench synthetic` makes them.")
    return samples, trials


def _renamed(trial: Trial) -> Trial:
    return replace(trial, method=with_ending(trial.method))


def with_ending(method: MethodInfo) -> MethodInfo:
    """Return a row under its name with synthetic samples; it adds to the row without."""
    control_of = None if method.control_of is None else method.control_of + ENDING
    return replace(method, name=method.name + ENDING, control_of=control_of, parents=(method.name,))


def main() -> None:
    """Join the pairs of tables that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    given = parser.parse_args()
    experiment = load_experiment(given.experiment)
    for name in [each for each in experiment.sets if each + ENDING in experiment.sets]:
        try:
            table = joined(experiment, name, data=given.data, results=given.results)
        except MissingData as error:
            print(error)
            continue
        path = given.results / experiment.name / "both" / f"{name}.json"
        write_results(path, table)
        print(path)


if __name__ == "__main__":
    main()
