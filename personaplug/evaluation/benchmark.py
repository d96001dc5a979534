"""A bench: runs an experiment cell by cell, never a finished one again, and writes results as they come.

    OUT/NAME/[VARIANT/]SET/           the runs: vectors, trained parts, answers; may be deleted at any time
    RESULTS/NAME/[VARIANT/]SET.json   the results object; beside it SET.cells.jsonl, which grows cell by cell and from
                                      which a stopped bench goes on

A cell is one (variant, set, condition, seed). It is finished if a cell of the same key is in the file: the key covers
the config, the data files, the condition and the seed; not the code, so a change of method wants a new experiment.
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

from personaplug.analysis.results import Settings, build_results, history_thirds, with_subgroups
from personaplug.analysis.trials import EvalSamples, Trial, TrialFile
from personaplug.baselines.heuristics import check_rules
from personaplug.config import BEFORE, Config, EvaluationConfig, ModelConfig
from personaplug.data import load_task, open_dataset
from personaplug.errors import ConfigError, MissingData, MissingModel, PersonaPlugError, TrainingDiverged, UserError
from personaplug.evaluation.evaluator import Evaluation, settings_of, with_remarks
from personaplug.evaluation.experiment import WHOLE, Experiment, Probe
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.methods import Condition, Trained, needed
from personaplug.run import SPEED_ONLY, Models, Run, open_models, resolved
from personaplug.training.recipes import Trainings

logger = logging.getLogger(__name__)

_ALL_ITEMS = -1


@dataclass(frozen=True)
class Outcome:
    """What came of a bench.

    Attributes:
        written: results files.
        absent: tables whose model or set is not here, and why.
        failed: rows that could not be filled, and why.
        left_out: rows and variants that have no meaning on a set, and why.
    """

    written: list[Path]
    absent: list[str]
    failed: list[str]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Places:
    """Where a bench reads and writes.

    Attributes:
        data: folder of the sets' folders.
        out: gets the runs.
        results: gets the results.
    """

    data: Path
    out: Path
    results: Path


def bench(
    experiment: Experiment,
    places: Places,
    *,
    sets: Sequence[str] = (),
    seeds: Sequence[int] = (),
    conditions: Sequence[str] = (),
) -> Outcome:
    """Fill an experiment's tables, one after the other.

    Args:
        sets: only these of the experiment's; several processes may share out the sets among them.
        seeds: only these; all of a table go together, since they read the same prompts.
        conditions: only these rows.
    Raises:
        ConfigError: if it has no such set, seed or row.
    """
    known = {seed for config in experiment.configs.values() for seed in config.training.seeds}
    rows = [condition.name for condition in experiment.conditions]
    if set(seeds) - known:
        raise ConfigError(f"{experiment.name} has the seeds {sorted(known)}; found {sorted(seeds)}.")
    for what, asked, there in (("set", sets, experiment.sets), ("row", conditions, rows)):
        unknown = [name for name in asked if name not in there]
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)}: no {what} of {experiment.name}, whose {what}s are {', '.join(there)}."
            )
    opened = _OpenModels()
    tables = [
        _Table(experiment, places, variant=variant, name=name, opened=opened)
        for variant in experiment.variants
        for name in experiment.sets
        if not sets or name in sets
    ]
    wanted = [condition for condition in experiment.conditions if not conditions or condition.name in conditions]
    for table in tables:
        table.fill(wanted, seeds=[seed for seed in table.config.training.seeds if not seeds or seed in seeds])
    return Outcome(
        [table.target for table in tables if not table.absent and table.target.exists()],
        [table.absent for table in tables if table.absent],
        [reason for table in tables for reason in table.failed],
        [reason for table in tables for reason in table.left_out],
    )


class _Table:
    """The cells of one variant on one set."""

    def __init__(self, experiment: Experiment, places: Places, *, variant: str, name: str, opened: _OpenModels) -> None:
        self.experiment, self.variant, self.name, self.opened = experiment, variant, name, opened
        self.config = experiment.configs[variant, name]
        self.data = places.data / name
        self.folder = places.out / (experiment.runs or experiment.name) / variant / name
        self.target = places.results / experiment.name / variant / f"{name}.json"
        self.title = " ".join(part for part in (experiment.name, variant, name) if part)
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.absent = ""

    def fill(self, conditions: Sequence[Condition], *, seeds: Sequence[int]) -> None:
        """Make the cells of some rows and seeds that are missing, then write the results, even if stopped halfway.

        What cannot be made is noted in `absent` or `failed` and does not keep other cells from being made.
        """
        try:
            conditions = self._fitting(conditions)
            for probe in (WHOLE, *self._probes()):
                self._fill(conditions, seeds, probe)
        except (MissingModel, MissingData) as error:
            self.absent = self._told(self.title, error)
        finally:
            if not self.absent:
                self.write()

    def _fill(self, conditions: Sequence[Condition], seeds: Sequence[int], probe: Probe) -> None:
        file = self._file(probe)
        file.turn_to(self._samples_key())
        scored, cells = file.read()
        known = {cell.key for cell in cells}
        # Row by row and not seed by seed: where the seeds of a row read the same prompts, they are read once.
        wanted = [(condition, seed) for condition in conditions for seed in self._seeds(condition) if seed in seeds]
        missing = {key: one for one in wanted if (key := self._key(*one, probe)) not in known}
        if not missing:
            return
        trainings, evaluation = self._opened(probe)
        if scored is None:
            file.start(replace(evaluation.scored, about=self._about(evaluation), key=self._samples_key()))
        # All trainings first: those on the same prompts read them once, before the split's take their place.
        untrained = self._train(list(missing.values()), trainings)
        for key, (condition, seed) in missing.items():
            if untrained.intersection((need, seed) for need in condition.needs):
                continue
            logger.info("%s: %s, seed %d%s", self.title, condition.name, seed, probe.name and f", {probe.name}")
            try:
                cell = evaluation.cell(condition, seed=seed)
            except (UserError, TrainingDiverged) as error:
                self.failed.append(self._told(f"{self.title}, {condition.name}, seed {seed}", error))
            else:
                file.append(replace(cell, key=key, made_with=_made_with(evaluation.models)))

    def _fitting(self, conditions: Sequence[Condition]) -> list[Condition]:
        """The rows without those rules that have no meaning on this set: a median of categories, say.

        None of a variant that has none: a prior of labels where no item holds a label.
        """
        task, found = load_task(self.data), []
        try:
            resolved(self.config, task)
        except ConfigError as error:
            if not self.variant:
                raise
            self.left_out.append(f"{self.title}: {error}")
            return []
        for condition in conditions:
            try:
                check_rules([condition], task)
            except ConfigError as error:
                self.left_out.append(f"{self.title}, {condition.name}: {error}")
            else:
                found.append(condition)
        return found

    def _train(self, cells: Sequence[tuple[Condition, int]], trainings: Trainings) -> set[tuple[Trained, int]]:
        """Train what some cells need; what could not be."""
        untrained: set[tuple[Trained, int]] = set()
        for need in needed([condition for condition, _ in cells]):
            for seed in dict.fromkeys(seed for condition, seed in cells if need in condition.needs):
                try:
                    trainings.train(need, seed=seed)
                except (UserError, TrainingDiverged) as error:
                    self.failed.append(self._told(f"{self.title}, {need.name}, seed {seed}", error))
                    untrained.add((need, seed))
        return untrained

    def _told(self, what: str, error: PersonaPlugError) -> str:
        told = f"{what}: {error}"
        logger.warning("%s", told)
        return told

    def write(self) -> None:
        """Write the results of the cells that there are."""
        scored, cells = self._kept(WHOLE)
        if scored is None:
            return
        task = load_task(self.data)
        settings = settings_of(task, self.config.evaluation)
        results = with_remarks(build_results(scored, cells, settings=settings), task)
        if self.experiment.slices:
            slices = history_thirds(scored.history_items)
            results = with_subgroups(results, scored, cells, slices=slices, settings=settings)
        for curve in self.experiment.curves:
            results |= {"slices": [*results.get("slices", []), *self._points(curve, results, settings)]}
        write_json(self.target, results)

    def _probes(self) -> list[Probe]:
        return [probe for curve in self.experiment.curves for probe in curve if probe.changes]

    def _points(self, curve: Sequence[Probe], whole: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
        """The rows by the number of items shown, or by strength; those of the table proper at their place."""
        proper = {"rows": whole["rows"], "pairs": whole["pairs"]}
        points = [(probe, self._at(probe, settings) if probe.changes else proper) for probe in curve]
        return [{"name": probe.name} | point for probe, point in points if point]

    def _seeds(self, condition: Condition) -> Sequence[int]:
        """The seeds that a row is answered with."""
        seeds = self.config.training.seeds
        return seeds if condition.seeded else seeds[:1]

    def _opened(self, probe: Probe) -> tuple[Trainings, Evaluation]:
        task, models = load_task(self.data), self.opened.get(self.config)
        run = Run.create(self.folder, config=self.config, task=task)
        train, split = (
            open_dataset(self.data, split, task=task, max_history=self.config.plug.max_history)
            for split in ("train", self.experiment.split)
        )
        # First, since it notes what the run is trained on, which the evaluation tells.
        trainings = Trainings(run, train, models=models)
        config = self._evaluated(probe)
        name = f"{self.experiment.split}-{_label(probe)}" if probe.changes else self.experiment.split
        return trainings, Evaluation(run, split, split=name, config=config, models=models, train=train)

    def _kept(self, probe: Probe) -> tuple[EvalSamples | None, list[Trial]]:
        """The cells that are of this experiment as it stands, in its order of conditions and seeds."""
        scored, cells = self._file(probe).read()
        if scored is None or scored.key != self._samples_key():
            return None, []  # of other samples
        # What may change from one cell to the next is told as it is now.
        scored = replace(scored, about=scored.about | {"config": asdict(self.config)})
        held = {cell.key: cell for cell in cells}
        keys = [
            self._key(condition, seed, probe)
            for condition in self.experiment.conditions
            for seed in self.config.training.seeds
        ]
        found = [held[key] for key in keys if key in held]
        return (scored if found else None), found

    def _at(self, probe: Probe, settings: Settings) -> dict[str, Any] | None:
        scored, cells = self._kept(probe)
        if scored is None:
            return None
        part = build_results(replace(scored, about={}), cells, settings=settings)
        return {"rows": part["rows"], "pairs": part["pairs"]}

    def _evaluated(self, probe: Probe) -> EvaluationConfig:
        return replace(self.config.evaluation, **probe.changes)  # type: ignore[arg-type]

    def _file(self, probe: Probe) -> TrialFile:
        middle = f".{_label(probe)}" if probe.changes else ""
        return TrialFile(self.target.with_name(f"{self.name}{middle}.cells.jsonl"))

    @cached_property
    def _data_key(self) -> str:
        return _data_key(self.data, self.experiment.split)

    def _samples_key(self) -> str:
        config = self.config.evaluation
        drawn = [config.limit, config.draw_seed, self.config.plug.max_history, self.experiment.split]
        return _hash([self._data_key, *drawn])

    def _key(self, condition: Condition, seed: int, probe: Probe) -> str:
        about, changes = asdict(self.config), dict(probe.changes)
        shown = changes.pop("max_eval_history", _ALL_ITEMS)  # apart, as in keys from before there were other probes
        about["evaluation"] |= changes
        for name in ("training.seeds", "evaluation.resamples", *SPEED_ONLY, *BEFORE):
            section, _, key = name.partition(".")
            value = about[section].pop(key)
            # Cells from before there was a choice stay what they are.
            if name in BEFORE and value != BEFORE[name]:
                about[section][key] = value
        parts = [about, self._data_key, condition.name, seed, shown]
        return _hash(parts)

    def _about(self, evaluation: Evaluation) -> dict[str, Any]:
        """What the results say of themselves; trainings come and go and are told by the run."""
        told = {key: value for key, value in evaluation.scored.about.items() if key != "training"}
        mine = {"experiment": self.experiment.name, "title": self.experiment.title, "set": self.name}
        return mine | ({"variant": self.variant} if self.variant else {}) | told


class _OpenModels:
    """The models of the last config asked for, which the next one may share."""

    def __init__(self) -> None:
        self.of: ModelConfig | None = None
        self.models: Models | None = None

    def get(self, config: Config) -> Models:
        if self.models is None or self.of != config.model:
            self.models = None  # before the next ones take its place in memory
            self.of, self.models = config.model, open_models(config)
        return self.models


def _data_key(folder: Path, split: str) -> str:
    digest = hashlib.sha256()
    files = sorted(path for part in ("train", split) for path in folder.glob(f"{part}_*.json*"))
    if not files:
        raise MissingData(f"{folder} holds no data set; --data is the folder that holds the sets' folders.")
    for path in [*files, folder / "task.json"]:
        digest.update(path.name.encode())
        if path.exists():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _made_with(models: Models) -> str:
    """What a cell's numbers may depend on beside its key, in a line."""
    known = {**package_versions(), "processor": machine_info()["processor"]}
    if models.llm.device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(models.llm.device)
    return ", ".join(f"{name} {value}" for name, value in known.items())


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _label(probe: Probe) -> str:
    return probe.name.replace("=", "-")
