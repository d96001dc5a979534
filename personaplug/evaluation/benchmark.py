"""Run an experiment trial by trial. Finished trials do not run again, and each trial is saved when it finishes.

    OUT/NAME/[VARIANT/]SET/           the runs: vectors, trained parts, predictions; may be deleted at any time
    RESULTS/NAME/[VARIANT/]SET.json   the results
    RESULTS/NAME/[VARIANT/]SET.trials.jsonl   the finished trials, one per line; a stopped benchmark resumes from them

A trial is one (variant, set, row, seed). It is finished if the file contains a trial with the same key. The key covers
the config, the data files, the row and the seed, but not the code. After a change of the code, use a new experiment.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from personaplug.analysis.results import Settings, build_results, history_thirds
from personaplug.analysis.results_file import ResultPart, Results, Subgroup, write_results
from personaplug.analysis.trials import EvalSamples, Provenance, Trial, TrialFile
from personaplug.config import SPEED_ONLY, Config, ModelConfig
from personaplug.config_resolution import resolved, with_rates
from personaplug.data import load_task, open_dataset
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData, MissingModel, PersonaPlugError, TrainingDiverged, UserError
from personaplug.evaluation.evaluator import Evaluator, settings_of, with_remarks
from personaplug.evaluation.experiment import WHOLE, Experiment, SweepPoint
from personaplug.infra.environment import machine_info, package_versions
from personaplug.methods import Method, needed_parts
from personaplug.run import Models, Run, dated, open_models
from personaplug.training.parts import SoftPromptPart
from personaplug.training.trainings import TrainedPart, Trainings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a benchmark. Each text names a table or row and gives the reason.

    Attributes:
        written: results files.
        absent: tables whose model or data set is missing.
        failed: rows that failed.
        left_out: rows and variants that do not apply to a set.
    """

    written: list[Path]
    absent: list[str]
    failed: list[str]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Folders:
    """The folders of a benchmark.

    Attributes:
        data: folder with a folder for each data set.
        out: folder for the runs.
        results: folder for the results.
    """

    data: Path
    out: Path
    results: Path


def run_benchmark(
    experiment: Experiment,
    folders: Folders,
    *,
    sets: Sequence[str] = (),
    seeds: Sequence[int] = (),
    methods: Sequence[str] = (),
) -> Outcome:
    """Fill an experiment's tables, one after the other.

    Args:
        sets: only these sets; use it to split the sets across processes.
        seeds: only these seeds. Run all seeds of a table together, because they share cached prompts.
        methods: only these rows.
    Raises:
        ConfigError: if the experiment does not contain a given set, seed or row.
    """
    _check_selection(experiment, sets=sets, seeds=seeds, methods=methods)
    models = _ModelCache()
    tables = [
        _Table(experiment, folders, variant=variant, name=name, models=models)
        for variant in experiment.variants
        for name in experiment.sets
        if not sets or name in sets
    ]
    selected = [method for method in experiment.methods if not methods or method.name in methods]
    for table in tables:
        table.fill(selected, seeds=[seed for seed in table.config.training.seeds if not seeds or seed in seeds])
    return Outcome(
        [table.target for table in tables if not table.absent and table.target.exists()],
        [table.absent for table in tables if table.absent],
        [reason for table in tables for reason in table.failed],
        [reason for table in tables for reason in table.left_out],
    )


def _check_selection(
    experiment: Experiment, *, sets: Sequence[str], seeds: Sequence[int], methods: Sequence[str]
) -> None:
    valid_seeds = {seed for config in experiment.configs.values() for seed in config.training.seeds}
    if set(seeds) - valid_seeds:
        raise ConfigError(f"{experiment.name} has the seeds {sorted(valid_seeds)}; found {sorted(seeds)}.")
    rows = [method.name for method in experiment.methods]
    for kind, selected, valid in (("set", sets, experiment.sets), ("row", methods, rows)):
        unknown = [name for name in selected if name not in valid]
        if unknown:
            raise ConfigError(
                f"{experiment.name} has no {kind} {', '.join(unknown)}; expected {kind}s from: {', '.join(valid)}."
            )


_LATER_SETTINGS = {
    "training.preference_loss": "none",
    "training.preference_weight": 1.0,
    "plug.item_parts": "all",
    "evaluation.item_kinds": "all",
    "evaluation.identification_samples": 0,
    "evaluation.sampled_answers": 0,
}
"""Settings that are newer than published trials, with the values that leave the scores of those trials unchanged."""


def trial_key(config: Config, *, data_hash: str, method: str, seed: int, point: SweepPoint) -> str:
    """Return a hash of everything that affects a trial's scores; settings that affect only speed are excluded."""
    settings = asdict(config)
    settings["evaluation"] |= point.changes
    for name in ("training.seeds", "evaluation.resamples", *SPEED_ONLY):
        section, _, key = name.partition(".")
        del settings[section][key]
    settings["training"]["tensorboard"] = False  # published trials have this setting, which no longer exists
    # `kinds` equals `shrinkage` in both presets, so the remaining settings still distinguish all configs.
    for name, value in {**_LATER_SETTINGS, "plug.kinds": config.plug.shrinkage}.items():
        section, _, key = name.partition(".")
        if settings[section][key] == value:
            del settings[section][key]
    if settings["model"]["chat_date"] == "auto":  # each run resolves it, for templates that write a date
        del settings["model"]["chat_date"]
    return _hash([settings, data_hash, method, seed])


def data_hash(folder: Path, split: str) -> str:
    """Return a hash of a data set's files.

    Raises:
        MissingData: if the folder contains no data set.
    """
    digest = hashlib.sha256()
    files = sorted(path for part in ("train", split) for path in folder.glob(f"{part}_*.json*"))
    if not files:
        raise MissingData(f"{folder} contains no data set. --data must be the parent folder of the data sets.")
    for path in [*files, folder / "task.json"]:
        digest.update(path.name.encode())
        if path.exists():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class _Table:
    """The trials of one variant on one set."""

    def __init__(
        self, experiment: Experiment, folders: Folders, *, variant: str, name: str, models: _ModelCache
    ) -> None:
        self.experiment, self.variant, self.name, self.models = experiment, variant, name, models
        self.config = experiment.configs[variant, name]
        self.data = folders.data / name
        trained_on = experiment.trained_on.get(name, name)
        self.training_data = folders.data / trained_on
        self.folder = folders.out / (experiment.runs or experiment.name) / variant / trained_on
        self.target = folders.results / experiment.name / variant / f"{name}.json"
        self.title = " ".join(part for part in (experiment.name, variant, name) if part)
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.absent = ""

    def fill(self, methods: Sequence[Method], *, seeds: Sequence[int]) -> None:
        """Run the missing trials of some rows and seeds, then write the results, even after an interruption.

        If a trial cannot run, record the reason in `absent` or `failed` and run the other trials.
        """
        try:
            methods = self._suitable(methods)
            for point in (WHOLE, *self._points()):
                self._fill(methods, seeds, point)
        except (MissingModel, MissingData) as error:
            self.absent = _logged(self.title, error)
        finally:
            if not self.absent:
                self.write()

    def write(self) -> None:
        """Write the results of the finished trials."""
        samples, trials = self._finished(WHOLE)
        if samples is None:
            return
        settings = settings_of(self.task, self.config.evaluation)
        thirds = history_thirds(samples.history_items) if self.experiment.subgroups else ()
        results = build_results(samples, trials, settings=settings, subgroups=thirds)
        present = {trial.method.name for trial in trials}
        methods = [method for method in self.experiment.methods if method.name in present]
        results = with_remarks(results, methods, self.task)
        for curve in self.experiment.curves:
            results = replace(results, subgroups=[*results.subgroups, *self._curve(curve, results, settings)])
        write_results(self.target, results)

    @cached_property
    def task(self) -> Task:
        return load_task(self.data)

    # ---- selecting trials

    def _suitable(self, methods: Sequence[Method]) -> list[Method]:
        """Return the rows that apply to this set; none if the variant does not apply to it."""
        try:
            resolved(self.config, self.task)
        except ConfigError as error:
            if not self.variant:
                raise
            self.left_out.append(f"{self.title}: {error}")
            return []
        suitable = []
        for method in methods:
            try:
                method.check(self.task)
            except ConfigError as error:
                self.left_out.append(f"{self.title}, {method.name}: {error}")
            else:
                suitable.append(method)
        return suitable

    def _missing(
        self, methods: Sequence[Method], seeds: Sequence[int], *, point: SweepPoint, finished: set[str]
    ) -> dict[str, tuple[Method, int]]:
        """Return the unfinished trials by key, row by row, because the seeds of a row share cached prompts."""
        trials = [(method, seed) for method in methods for seed in self._seeds(method) if seed in seeds]
        return {key: (m, seed) for m, seed in trials if (key := self._key(m, seed, point)) not in finished}

    def _seeds(self, method: Method) -> Sequence[int]:
        seeds = self.config.training.seeds
        return seeds if method.info.is_seeded else seeds[:1]

    def _points(self) -> list[SweepPoint]:
        return [point for curve in self.experiment.curves for point in curve if point.changes]

    # ---- running trials

    def _fill(self, methods: Sequence[Method], seeds: Sequence[int], point: SweepPoint) -> None:
        file = self._file(point)
        file.switch_to(self._samples_key)
        samples, finished = file.load()
        missing = self._missing(methods, seeds, point=point, finished={trial.key for trial in finished})
        if not missing:
            return
        trainings, evaluator = self._opened(point)
        if samples is None:
            file.start(replace(evaluator.eval_samples, about=self._about(evaluator), key=self._samples_key))
        # Train everything first: trainings share cached prompts, and the prompts of the split later replace these.
        untrained = self._train(list(missing.values()), trainings)
        for key, (method, seed) in missing.items():
            if untrained.intersection((part, seed) for part in method.requires):
                continue
            logger.info("%s: %s, seed %d%s", self.title, method.name, seed, point.name and f", {point.name}")
            try:
                trial = evaluator.trial(method, seed=seed)
            except (UserError, TrainingDiverged) as error:
                self.failed.append(_logged(f"{self.title}, {method.name}, seed {seed}", error))
            else:
                file.append(replace(trial, key=key, made_with=_made_with(trainings.models)))

    def _train(self, trials: Sequence[tuple[Method, int]], trainings: Trainings) -> set[tuple[TrainedPart, int]]:
        """Train the parts that trials need, and return the parts and seeds whose training failed."""
        untrained: set[tuple[TrainedPart, int]] = set()
        for part in needed_parts([method for method, _ in trials]):
            for seed in dict.fromkeys(seed for method, seed in trials if part in method.requires):
                try:
                    trainings.train(part, seed=seed)
                except (UserError, TrainingDiverged) as error:
                    self.failed.append(_logged(f"{self.title}, {part.name}, seed {seed}", error))
                    untrained.add((part, seed))
        return untrained

    def _opened(self, point: SweepPoint) -> tuple[Trainings, Evaluator]:
        with_date = dated(self.config, self.folder)
        models = self.models.get(with_date)
        task, max_history = load_task(self.training_data), self.config.plug.max_history
        run = Run.create(self.folder, config=with_date, task=task)
        train = open_dataset(self.training_data, "train", task=task, max_history=max_history)
        split = open_dataset(self.data, self.experiment.split, task=self.task, max_history=max_history)
        # Create the trainings first: they record the training data, which the evaluator reports.
        trainings = Trainings(run, train, models=models)
        run = run.asked(self.task)
        config = replace(self.config.evaluation, **point.changes)
        folder = self.experiment.split if self.data == self.training_data else f"{self.name}-{self.experiment.split}"
        name = f"{folder}-{point.file_name}" if point.changes else folder
        return trainings, Evaluator(run, split, split=name, config=config, models=models, train=train)

    # ---- finished trials

    def _finished(self, point: SweepPoint) -> tuple[EvalSamples | None, list[Trial]]:
        """Return the finished trials that match the current experiment, in its order of rows and seeds."""
        samples, trials = self._file(point).load()
        if samples is None or samples.key != self._samples_key:
            return None, []
        samples = replace(samples, about=replace(samples.about, config=asdict(resolved(self.config, self.task))))
        by_key = {trial.key: trial for trial in trials}
        keys = [
            self._key(method, seed, point) for method in self.experiment.methods for seed in self.config.training.seeds
        ]
        finished = [by_key[key] for key in keys if key in by_key]
        return (samples if finished else None), finished

    def _curve(self, curve: Sequence[SweepPoint], whole: Results, settings: Settings) -> list[Subgroup]:
        """Return the rows at each point of a curve; `whole` is the point without changes."""
        parts = [(point, self._at(point, settings) if point.changes else whole) for point in curve]
        return [Subgroup(part.rows, part.pairs, point.name) for point, part in parts if part]

    def _at(self, point: SweepPoint, settings: Settings) -> ResultPart | None:
        samples, trials = self._finished(point)
        return None if samples is None else build_results(samples, trials, settings=settings)

    def _file(self, point: SweepPoint) -> TrialFile:
        middle = f".{point.file_name}" if point.changes else ""
        return TrialFile(self.target.with_name(f"{self.name}{middle}.trials.jsonl"))

    @cached_property
    def _data_hash(self) -> str:
        own = data_hash(self.data, self.experiment.split)
        return own if self.data == self.training_data else _hash([own, data_hash(self.training_data, "train")])

    @cached_property
    def _samples_key(self) -> str:
        config = self.config.evaluation
        sampling = [config.limit, config.draw_seed, self.config.plug.max_history, self.experiment.split]
        return _hash([self._data_hash, *sampling])

    def _key(self, method: Method, seed: int, point: SweepPoint) -> str:
        config = with_rates(self.config, [self.task])  # so keys match trials with explicit rates
        if not self._adds_label_prior(method):
            config = replace(config, plug=replace(config.plug, label_prior="none"))
        return trial_key(config, data_hash=self._data_hash, method=method.name, seed=seed, point=point)

    def _adds_label_prior(self, method: Method) -> bool:
        """Return whether a plug of this row has a label prior on this set."""
        plug = resolved(self.config, self.task).plug
        parts = [part for part in method.requires if isinstance(part, SoftPromptPart)]
        return any(part.plug_config(plug).label_prior != "none" for part in parts)

    def _about(self, evaluator: Evaluator) -> Provenance:
        """Return the provenance without trainings: they change from trial to trial, and the run describes them."""
        return replace(
            evaluator.eval_samples.about,
            experiment=self.experiment.name,
            title=self.experiment.title,
            set=self.name,
            variant=self.variant,
            training=[],
        )


class _ModelCache:
    """The loaded models of the last config, for reuse if the next config has the same models."""

    def __init__(self) -> None:
        self.config: ModelConfig | None = None
        self.models: Models | None = None

    def get(self, config: Config) -> Models:
        if self.models is None or not self._fits(self.models, config.model):
            self.models = None  # free the memory before the next models load
            self.config, self.models = config.model, open_models(config)
        return self.models

    def _fits(self, models: Models, config: ModelConfig) -> bool:
        if models.llm.identity.chat_date is None and self.config is not None:  # no prompt holds a date
            config = replace(config, chat_date=self.config.chat_date)
        return self.config == config


def _logged(title: str, error: PersonaPlugError) -> str:
    message = f"{title}: {error}"
    logger.warning("%s", message)
    return message


def _made_with(models: Models) -> str:
    """Return, in one line, the versions and hardware that may affect a trial's scores in addition to its key."""
    facts = {**package_versions(), "processor": machine_info()["processor"]}
    if models.llm.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(models.llm.device)
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
