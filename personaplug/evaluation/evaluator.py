"""Evaluation: conditions × seeds on the same samples → answers → scores per sample → a results object.

Answers of a finished (condition, seed) are kept in the run and not made again by a repeated command. What the object
holds is described in `results.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from personaplug.analysis.metrics import ERROR_MATCHED_ESTIMATES, Array, NegativeLogLikelihood, get_metric, is_invalid
from personaplug.analysis.results import Settings, build_results
from personaplug.analysis.trials import EvalSamples, Trial, numbered
from personaplug.baselines.heuristics import Rules, check_rules
from personaplug.baselines.user_lora import user_lora_caveat
from personaplug.config import EvaluationConfig
from personaplug.data.records import Sample
from personaplug.data.task import Reader, Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError, MissingData
from personaplug.evaluation.lora_predictions import LoraPredictor
from personaplug.evaluation.method_runner import Asking
from personaplug.evaluation.model_inputs import Showing, Shown
from personaplug.evaluation.predictions import Answers
from personaplug.evaluation.provenance import provenance
from personaplug.evaluation.user_costs import CostMeter
from personaplug.infra.atomic_io import write_json
from personaplug.llm.base import GenerationConfig
from personaplug.methods import Condition, Rule
from personaplug.run import Models, Run

ORACLE = "all-knowing"
_TIMED_SAMPLES = 8


def evaluate(
    run: Run,
    reader: Reader,
    *,
    split: str,
    conditions: Sequence[Condition],
    config: EvaluationConfig,
    models: Models,
    oracle: Path | None = None,
    train: Reader | None = None,
) -> dict[str, Any]:
    """Fill a results table.

    Args:
        run: with what the conditions need trained.
        reader: the split to score.
        oracle: predictions of an all-knowing predictor in LaMP's output format, for simulated users.
        train: the training split; only needed for rows without a language model that are fitted on it.
    Returns:
        The results object; see `results.py`.
    Raises:
        MissingData: if something that a condition needs is not trained, or a sample has no answer to compare with.
        ConfigError: if labels are to be scored in a task without labels, or a rule does not fit the task.
    """
    check_rules(conditions, run.task)  # before any hour is spent on the other rows
    evaluation = Evaluation(run, reader, split=split, config=config, models=models, train=train)
    cells = [
        evaluation.cell(condition, seed=seed) for condition in conditions for seed in evaluation.seeds_of(condition)
    ]
    if oracle is not None:
        cells.append(evaluation.oracle(oracle))
    return with_remarks(build_results(evaluation.scored, cells, settings=evaluation.settings), run.task)


def predict(
    run: Run,
    reader: Reader,
    *,
    split: str,
    conditions: Sequence[Condition],
    config: EvaluationConfig,
    models: Models,
    train: Reader | None = None,
) -> list[Path]:
    """Answer a split whose answers may be hidden, as LaMP's test split's are.

    Args:
        train: as in `evaluate`.
    Returns:
        A file per condition and seed, in LaMP's output format.
    Raises:
        MissingData: if something that a condition needs is not trained.
        ConfigError: if a rule does not fit the task.
    """
    check_rules(conditions, run.task)
    evaluation = Evaluation(run, reader, split=split, config=config, models=models, train=train)
    return [
        evaluation.predictions(condition, seed=seed)
        for condition in conditions
        for seed in evaluation.seeds_of(condition)
    ]


def settings_of(task: Task, config: EvaluationConfig) -> Settings:
    """How cells of a task become results: by its metrics, by how likely the right answers were, and ratings that are
    scored also by the decisions that suit their errors.
    """
    scored = task.kind == "rating" and _decoding(task, config) == "score"
    names = dict.fromkeys([*task.metrics, *(ERROR_MATCHED_ESTIMATES if scored else ()), NegativeLogLikelihood.name])
    metrics = [get_metric(name, labels=task.labels, fallback=config.unparsable_rating) for name in names]
    return Settings(metrics, resamples=config.resamples, seed=config.draw_seed)


def with_remarks(results: dict[str, Any], task: Task) -> dict[str, Any]:
    """Results with notes on those of their rows that mean something else on this task, or with this plug."""
    names = [row["condition"] for row in results["rows"]]
    said = [user_lora_caveat(task) if any(name.startswith("lora-per-user") for name in names) else None]
    if "shuffled" in names:
        said.append("shuffled equals plug here: the plug takes no notice of the items' order.")
    return results | {"notes": [*results.get("notes", []), *(note for note in said if note)]}


class Evaluation:
    """One split of a run, ready to be asked row by row.

    Attributes:
        scored: what the rows are about.
        settings: how they become results.
    """

    def __init__(
        self,
        run: Run,
        reader: Reader,
        *,
        split: str,
        config: EvaluationConfig,
        models: Models,
        train: Reader | None = None,
    ) -> None:
        self.run, self.reader, self.split, self.config, self.models = run, reader, split, config, models
        self.task = run.task
        self.decoding = _decoding(self.task, config)
        self.generation = GenerationConfig(
            max_new_tokens=config.max_new_tokens or self.task.max_new_tokens, num_beams=config.num_beams
        )
        self.table = run.open_vectors(models.encoder)
        some = list(islice(reader, _TIMED_SAMPLES))  # before the whole is read, so that the reader's report is whole
        cut_before = models.encoder.truncated
        self.showing = Showing(run, reader, models=models, table=self.table, config=config)
        cut = models.encoder.truncated - cut_before
        self.samples = self.showing.samples
        self.rules = Rules(run, train, table=self.table)
        if not self.samples:
            raise MissingData("The split holds no samples.")
        self.owners = self.showing.owners
        self.settings = settings_of(self.task, config)
        self.metrics = self.settings.metrics
        self.folder = run.folder / "evaluations" / split
        about = provenance(
            run,
            self.samples,
            split=split,
            config=config,
            models=models,
            table=self.table,
            report=reader.report,
            cut_by_encoder=cut,
        )
        self.scored = EvalSamples(numbered(self.owners), [len(sample.rows) for sample in self.samples], about)
        self.costs = CostMeter(self.scored.history_items, some, encoder=models.encoder)

    def seeds_of(self, condition: Condition) -> tuple[int, ...]:
        """The seeds with which a condition is answered; one where nothing depends on them."""
        seeds = self.run.config.training.seeds
        return seeds if condition.seeded else seeds[:1]

    def cell(self, condition: Condition, *, seed: int) -> Trial:
        """Answer and score one condition with one seed.

        Raises:
            MissingData: if something that it needs is not trained.
            ConfigError: if it is a rule that does not fit the task.
        """
        golds = _golds(self.samples)
        if condition.rule is not None:
            return self._computed_cell(condition, condition.rule, golds, seed=seed)
        asking = self._asking(condition, seed=seed)
        shown, matrices = asking.shown, asking.matrices
        made = asking.answers()
        self._write_predictions(condition, made.texts, seed=seed)
        made = asking.with_surprises(made)
        stats = self._stats(condition, made, golds, seed=seed)
        tokens = float(np.mean([m.tokens for m in shown.measures])) + self._soft_tokens(condition)
        own = matrices.cost() if condition.per_user and matrices else shown.cost
        cost = None if condition.per_user and own is None else self.costs.of(condition, own=own)
        return Trial(
            condition.name,
            seed,
            stats,
            invalid_rate=self._invalid_rate(made.texts),
            truncated_rate=float(np.mean([measure.truncated for measure in shown.measures])),
            unfinished_rate=float(np.mean(made.unfinished)),
            lost_history_rate=self._lost_rate(condition, self._items_used(condition, shown, matrices), few=asking.few),
            cut_items_rate=self._cut_rate(shown, matrices),
            prompt_tokens_mean=tokens,
            extra_prompt_tokens=tokens - float(np.mean([measure.tokens for measure in self.showing.bare])),
            seconds=round(made.seconds, 2),
            peak_memory_bytes=made.peak_memory_bytes,
            decoding="scored" if self.decoding == "score" else "generated",
            bytes_per_user=cost.bytes if cost else None,
            seconds_per_user=cost.seconds if cost else None,
        )

    def predictions(self, condition: Condition, *, seed: int) -> Path:
        """Answer one condition with one seed, without looking at right answers; the file of the answers.

        Raises:
            MissingData: if something that it needs is not trained.
            ConfigError: if it is a rule that does not fit the task.
        """
        if condition.rule is not None:
            self._computed(condition, condition.rule, seed=seed)
        else:
            made = self._asking(condition, seed=seed).answers()
            self._write_predictions(condition, made.texts, seed=seed)
        return self.folder / f"{_file_name(condition, seed)}.json"

    def oracle(self, path: Path) -> Trial:
        """What an all-knowing predictor of simulated users scores.

        Raises:
            MissingData: if it lacks some of the samples.
        """
        told = {gold["id"]: gold["output"] for gold in json.loads(path.read_text(encoding="utf-8"))["golds"]}
        missing = sum(sample.id not in told for sample in self.samples)
        if missing:
            raise MissingData(f"{path} knows nothing of {missing} of {len(self.samples)} samples; is it of this split?")
        texts = [told[sample.id] for sample in self.samples]
        golds = _golds(self.samples)
        stats = {metric.name: metric.statistics(texts, golds) for metric in self.metrics if metric.of_answers}
        seed = self.run.config.training.seeds[0]
        return Trial(ORACLE, seed, stats, invalid_rate=self._invalid_rate(texts), decoding="known")

    # ---- who answers

    def _computed_cell(self, condition: Condition, rule: Rule, golds: Sequence[str], *, seed: int) -> Trial:
        """The cell of a row that asks no model: it has neither prompts nor costs that could be compared."""
        shown, made = self._computed(condition, rule, seed=seed)
        return Trial(
            condition.name,
            seed,
            self._stats(condition, made, golds, seed=seed),
            invalid_rate=self._invalid_rate(made.texts),
            lost_history_rate=self._lost_rate(condition, [len(sample.history) for sample in shown]),
            seconds=round(made.seconds, 2),
            decoding="computed",
            fit_seconds=round(self.rules.fitted(rule).seconds, 2),
        )

    def _computed(self, condition: Condition, rule: Rule, *, seed: int) -> tuple[list[Sample], Answers]:
        """The samples as a rule is shown them, and its answers."""
        answerer = self.rules.fitted(rule).answerer
        shown = self.showing.lent(condition, seed=seed)
        began = time.monotonic()
        texts = answerer.answers(shown)
        seconds = time.monotonic() - began
        self._write_predictions(condition, texts, seed=seed)
        return shown, Answers(texts, [False] * len(texts), seconds, peak_memory_bytes=0)

    def _asking(self, condition: Condition, *, seed: int) -> Asking:
        return Asking(
            self.run,
            self.models,
            showing=self.showing,
            condition=condition,
            seed=seed,
            decoding=self.decoding,
            generation=self.generation,
            path=self.folder / f"{_file_name(condition, seed)}.answers.json",
        )

    def _write_predictions(self, condition: Condition, texts: Sequence[str], *, seed: int) -> None:
        golds = [{"id": sample.id, "output": text} for sample, text in zip(self.samples, texts, strict=True)]
        write_json(self.folder / f"{_file_name(condition, seed)}.json", {"task": self.task.name, "golds": golds})

    # ---- what the row was

    def _items_used(self, condition: Condition, shown: Shown, matrices: LoraPredictor | None) -> list[int]:
        """How many items of a history reached each sample's answer."""
        if condition.per_user and matrices:
            return [0 if lender is None else matrices.learned(lender) for lender in shown.lenders]
        return shown.items()

    def _lost_rate(self, condition: Condition, got: Sequence[int], *, few: int = 0) -> float:
        """Share of the samples with a history whose row should have used it and got none of it, or too few items."""
        if condition.history == "none":
            return 0.0
        had = [items for items, sample in zip(got, self.samples, strict=True) if len(sample.rows)]
        return float(np.mean([items <= few for items in had])) if had else 0.0

    def _cut_rate(self, shown: Shown, matrices: LoraPredictor | None) -> float | None:
        """Share of the items meant for prompts, or for users' matrices, that were cut or left out."""
        return matrices.left_out() if matrices and matrices.owners else shown.cut_rate()

    def _soft_tokens(self, condition: Condition) -> int:
        if condition.trained is None or not condition.trained.soft or self.config.persona_scale == 0:
            return 0
        return condition.trained.plug(self.run.config.plug).soft_tokens

    def _invalid_rate(self, texts: Sequence[str]) -> float:
        return float(np.mean([is_invalid(text, kind=self.task.kind, labels=self.task.labels) for text in texts]))

    def _stats(self, condition: Condition, made: Answers, golds: Sequence[str], *, seed: int) -> dict[str, Array]:
        """What each metric averages, (n, d); without those that take probabilities that were not kept."""
        stats: dict[str, Array] = {}
        for metric in self.metrics:
            if metric.of_answers:
                texts = made.by(metric.decision, labels=self.task.labels)
                found = None if texts is None else metric.statistics(texts, golds)
            else:
                found = made.surprise(golds, labels=self.task.labels)
            if found is not None:
                stats[metric.name] = found
        self._keep_scores(condition, stats, seed=seed)
        return stats

    def _keep_scores(self, condition: Condition, stats: dict[str, Array], *, seed: int) -> None:
        named = [metric for metric in self.metrics if metric.name in stats]
        simple = [metric for metric in named if stats[metric.name].shape[1] == 1 or not metric.of_answers]
        lines = [
            {"id": sample.id, "user_id": sample.user_id, "history_items": len(sample.rows)}
            | {metric.name: float(metric.value(stats[metric.name][i])) for metric in simple}
            for i, sample in enumerate(self.samples)
        ]
        write_json(self.folder / f"{_file_name(condition, seed)}.scores.json", lines)


def _file_name(condition: Condition, seed: int) -> str:
    return f"{condition.name.replace(':', '-')}.seed-{seed}"


def _decoding(task: Task, config: EvaluationConfig) -> str:
    if config.decoding == "score" and not task.labels:
        raise ConfigError(
            f"decoding=score needs a task with labels; {task.name} writes free text. Use decoding=generate."
        )
    return ("score" if task.labels else "generate") if config.decoding == "auto" else config.decoding


def _golds(samples: Sequence[EncodedSample]) -> list[str]:
    golds = [sample.target for sample in samples if sample.target is not None]
    if len(golds) < len(samples):
        raise MissingData(
            f"{len(samples) - len(golds)} of {len(samples)} samples have no answer to compare with; "
            f"a split with hidden answers cannot be scored here. `personaplug predict` answers it all the same."
        )
    return golds
