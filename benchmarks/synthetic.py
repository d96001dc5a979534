"""Compare training on few real samples with training on real and synthetic samples, with paired tests.

    python benchmarks/synthetic.py --data FEW [--results benchmarks/results]

The experiment `synthetic` writes a table for each set. This script joins the tables of SET and SET+synthetic, which
score the same dev samples. `plug` and `plug+synthetic` become rows of one table, RESULTS/synthetic/both/SET.json.
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
    """Return the rows of a set and of its copy with synthetic samples as one table.

    Args:
        data, results: folders, as for `personaplug bench`.
    Raises:
        MissingData: if one of the two sets has no trials.
    """
    folder = results / experiment.name
    (samples, trials), (others, more) = (_loaded(folder / f"{each}.trials.jsonl") for each in (name, name + ENDING))
    if (samples.groups, samples.history_items) != (others.groups, others.history_items):
        raise RunConflict(f"{name} and {name}{ENDING} have different dev samples. Create both from the same data set.")
    settings = settings_of(load_task(data / name), experiment.configs["", name].evaluation)
    return build_results(samples, [*trials, *map(_renamed, more)], settings=settings)


def _loaded(path: Path) -> tuple[EvalSamples, list[Trial]]:
    samples, trials = TrialFile(path).load()
    if samples is None or not trials:
        raise MissingData(f"There are no trials in {path}. Create them with `personaplug bench synthetic`.")
    return samples, trials


def _renamed(trial: Trial) -> Trial:
    return replace(trial, method=with_ending(trial.method))


def with_ending(method: MethodInfo) -> MethodInfo:
    """Return a method with the ending in its name, as a child of the method without synthetic samples."""
    control_of = None if method.control_of is None else method.control_of + ENDING
    return replace(method, name=method.name + ENDING, control_of=control_of, parents=(method.name,))


def main() -> None:
    """Join all pairs of tables that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    for name in [each for each in experiment.sets if each + ENDING in experiment.sets]:
        try:
            table = joined(experiment, name, data=arguments.data, results=arguments.results)
        except MissingData as error:
            print(error)
            continue
        path = arguments.results / experiment.name / "both" / f"{name}.json"
        write_results(path, table)
        print(path)


if __name__ == "__main__":
    main()
