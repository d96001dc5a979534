"""Evaluate the rows of a table on one split of a run: inputs → predictions (cached) → scores → trial.

The run caches the predictions of each (method, seed), so a repeated command reuses them. `analysis/results_file.py`
describes the results.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metrics import (
    ERROR_MATCHED_ESTIMATES,
    LIKELIHOOD_METRICS,
    Array,
    LikelihoodMetric,
    Metric,
    get_metric,
    is_invalid,
)
from personaplug.analysis.results import Settings, build_results
from personaplug.analysis.results_file import Results
from personaplug.analysis.trials import Diagnostics, EvalSamples, Trial, number_users
from personaplug.config import EvaluationConfig
from personaplug.data.task import Reader, Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import MissingData
from personaplug.evaluation.instruments import TextInstruments, has_instruments, instruments_of
from personaplug.evaluation.measurements import Measurements, or_none
from personaplug.evaluation.provenance import provenance
from personaplug.infra.atomic_io import write_json
from personaplug.llm.base import Measure
from personaplug.methods import Method, ModelInputs, needed_parts
from personaplug.methods.context import EvalContext
from personaplug.methods.predictions import Predictions, load_predictions, save_predictions
from personaplug.run import Models, Run

logger = logging.getLogger(__name__)

ORACLE = MethodInfo("all-knowing", "oracle")


def evaluate(
    run: Run,
    reader: Reader,
    *,
    split: str,
    methods: Sequence[Method],
    config: EvaluationConfig,
    models: Models,
    oracle: Path | None = None,
    train: Reader | None = None,
) -> Results:
    """Fill a results table.

    Args:
        run: a run that contains the trained parts of the methods.
        reader: the split to score.
        oracle: file of the oracle's predictions for simulated users, in LaMP's output format.
        train: the training split; only needed for rows that must be fitted on it.
    Returns:
        The results; `to_json` returns the content of a results file.
    Raises:
        MissingData: if a row needs a part that is not trained, or a sample has no reference answer.
        ConfigError: if the config scores labels and the task has none, or a row does not fit the task.
    """
    _check_rows(methods, run, config)
    evaluator = Evaluator(run, reader, split=split, config=config, models=models, train=train)
    trials = [evaluator.trial(method, seed=seed) for method in methods for seed in evaluator.seeds_of(method)]
    if oracle is not None:
        trials.append(evaluator.oracle_trial(oracle))
    return with_remarks(build_results(evaluator.eval_samples, trials, settings=evaluator.settings), methods, run.task)


def predict(
    run: Run,
    reader: Reader,
    *,
    split: str,
    methods: Sequence[Method],
    config: EvaluationConfig,
    models: Models,
    train: Reader | None = None,
) -> list[Path]:
    """Predict a split, with or without reference answers; LaMP's test split has none.

    Args:
        train: as in `evaluate`.
    Returns:
        The path of a file for each method and seed, in LaMP's output format.
    Raises:
        MissingData: if a row needs a part that is not trained.
        ConfigError: if a row does not fit the task.
    """
    _check_rows(methods, run, config)
    evaluator = Evaluator(run, reader, split=split, config=config, models=models, train=train)
    return [evaluator.predict(method, seed=seed) for method in methods for seed in evaluator.seeds_of(method)]


def _check_rows(methods: Sequence[Method], run: Run, config: EvaluationConfig) -> None:
    """Check that all rows fit the task and settings and that their parts are trained, before the first row runs."""
    for method in methods:
        method.check(run.task)
        method.check_decoding(config.num_beams)
    for part in needed_parts(methods):
        for seed in run.config.training.seeds:
            run.check_trained(part.name, seed=seed)


def settings_of(task: Task, config: EvaluationConfig) -> Settings:
    """Return the settings that turn trials into results.

    The metrics are those of the task and the likelihood metrics. Scored ratings also have error metrics with matching
    point estimates, and free text has the instruments of texts.
    """
    is_scored_rating = task.kind == "rating" and bool(task.labels) and config.decoding != "generate"
    estimates = ERROR_MATCHED_ESTIMATES if is_scored_rating else ()
    names = dict.fromkeys([*task.metrics, *estimates, *LIKELIHOOD_METRICS, *instruments_of(task, config)])
    metrics = [get_metric(name, labels=task.labels) for name in names]
    return Settings(metrics, resamples=config.resamples, seed=config.draw_seed)


def with_remarks(results: Results, methods: Sequence[Method], task: Task) -> Results:
    """Add the remarks of the rows about this task to the notes of the results."""
    remarks = dict.fromkeys(remark for method in methods if (remark := method.remark(task)))
    return replace(results, about=replace(results.about, notes=[*results.about.notes, *remarks]))


class Evaluator:
    """Evaluates rows on one split of a run.

    Attributes:
        eval_samples: the samples of all trials.
        settings: settings that turn trials into results.
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
        self.run, self.config = run, config
        self.context = EvalContext(run, reader, models=models, config=config, train=train)
        self.settings = settings_of(run.task, config)
        self.instruments = TextInstruments(self.context) if has_instruments(run.task) else None
        self.folder = run.folder / "evaluations" / split
        about = provenance(
            run,
            self.context.samples,
            split=split,
            config=config,
            models=models,
            table=self.context.embeddings,
            report=reader.report,
            cut_by_encoder=self.context.truncated_texts,
        )
        self.eval_samples = EvalSamples(number_users(self.context.owners), self.context.history_sizes, about)

    def seeds_of(self, method: Method) -> tuple[int, ...]:
        """Return the seeds of a row; a row without randomness has one seed."""
        seeds = self.run.config.training.seeds
        return seeds if method.info.is_seeded else seeds[:1]

    def trial(self, method: Method, *, seed: int) -> Trial:
        """Predict and score one row with one seed.

        Raises:
            MissingData: if the row needs a part that is not trained.
            ConfigError: if the row does not fit the task.
        """
        references = _references(self.context.samples)
        inputs = self._inputs(method, seed=seed)
        predictions = self._predictions(method, inputs, seed=seed)
        predictions = self._with_likelihoods(method, inputs, predictions, seed=seed)
        statistics = self._statistics(predictions, references, seed=seed)
        if self.instruments is not None:
            measurements = self._measurements(method, inputs, seed=seed)
            statistics |= measurements.statistics(self.settings.metrics, references)
        self._write_scores(method, statistics, seed=seed)
        return self._trial(method, inputs, predictions, statistics=statistics, seed=seed)

    def predict(self, method: Method, *, seed: int) -> Path:
        """Predict one row with one seed without reference answers, and return the path of the predictions.

        Raises:
            MissingData: if the row needs a part that is not trained.
            ConfigError: if the row does not fit the task.
        """
        self._predictions(method, self._inputs(method, seed=seed), seed=seed)
        return self._path(method, seed, "json")

    def oracle_trial(self, path: Path) -> Trial:
        """Score the oracle's predictions for simulated users.

        Raises:
            MissingData: if the file lacks samples.
        """
        samples = self.context.samples
        outputs = {gold["id"]: gold["output"] for gold in json.loads(path.read_text(encoding="utf-8"))["golds"]}
        missing = sum(sample.id not in outputs for sample in samples)
        if missing:
            raise MissingData(
                f"{path} lacks predictions for {missing} of {len(samples)} samples. Give the oracle file of this split."
            )
        texts, references = [outputs[sample.id] for sample in samples], _references(samples)
        metrics = [metric for metric in self.settings.metrics if metric.of_answers]
        statistics = {metric.name: metric.statistics(texts, references) for metric in metrics}
        seed = self.run.config.training.seeds[0]
        statistics |= self._of_instruments(texts, references, seed=seed)
        return Trial(ORACLE, seed, statistics, invalid_rate=self._invalid_rate(texts), decoding="computed")

    # ---- inputs → predictions

    def _inputs(self, method: Method, *, seed: int) -> ModelInputs:
        for part in method.requires:
            self.run.check_trained(part.name, seed=seed)
        assignments = self.context.assign(method.info.history, seed=seed)
        return method.build_inputs(self.context, assignments, seed=seed)

    def _predictions(self, method: Method, inputs: ModelInputs, *, seed: int) -> Predictions:
        """Return the predictions of a row from the cache, or compute and cache them."""
        key = method.cache_key(self.context, inputs, seed=seed)
        path = self._path(method, seed, "predictions.json")
        predictions = None if key is None else load_predictions(path, key=key)
        if predictions is None:
            predictions = method.predict(self.context, inputs, seed=seed)
            if key is not None:
                save_predictions(predictions, path, key=key)
        samples = zip(self.context.samples, predictions.texts, strict=True)
        golds = [{"id": sample.id, "output": text} for sample, text in samples]
        write_json(self._path(method, seed, "json"), {"task": self.run.task.name, "golds": golds})
        return predictions

    def _with_likelihoods(
        self, method: Method, inputs: ModelInputs, predictions: Predictions, *, seed: int
    ) -> Predictions:
        """Add NLL and divergence to predictions. They need more passes of the model, after the predictions are saved.

        If a pass fails, the row has no such column.
        """
        complete, name = predictions, method.name
        if complete.nll is None and self.context.decoding != "score":
            measure = partial(method.reference_nll, self.context, inputs, seed=seed)
            complete = replace(complete, nll=or_none(measure, f"{name}: no likelihood of the reference answers"))
        if complete.divergence is None and any(map(_is_of_plain_answers, self.settings.metrics)):
            measure = partial(method.divergence, self.context, inputs, seed=seed)
            complete = replace(complete, divergence=or_none(measure, f"{name}: no divergence from the plain model"))
        if complete != predictions and (key := method.cache_key(self.context, inputs, seed=seed)) is not None:
            save_predictions(complete, self._path(method, seed, "predictions.json"), key=key)
        return complete

    def _measurements(self, method: Method, inputs: ModelInputs, *, seed: int) -> Measurements:
        return Measurements(self.context, method, inputs, stem=self._path(method, seed, ""), seed=seed)

    # ---- scores → trial

    def _statistics(self, predictions: Predictions, references: Sequence[str], *, seed: int) -> dict[str, Array]:
        """Return the per-sample statistics of each metric that applies to the row, (n, d)."""
        statistics: dict[str, Array] = {}
        for metric in self.settings.metrics:
            if metric.of_answers:
                texts = predictions.estimates(metric.estimate, labels=self.run.task.labels)
                statistics[metric.name] = metric.statistics(texts, references)
            elif (of_likelihoods := _of_likelihoods(metric, predictions)) is not None:
                statistics[metric.name] = of_likelihoods
        return statistics | self._of_instruments(predictions.texts, references, seed=seed)

    def _of_instruments(self, texts: Sequence[str], references: Sequence[str], *, seed: int) -> dict[str, Array]:
        return {} if self.instruments is None else self.instruments.statistics(texts, references, seed=seed)

    def _trial(
        self,
        method: Method,
        inputs: ModelInputs,
        predictions: Predictions,
        *,
        statistics: dict[str, Array],
        seed: int,
    ) -> Trial:
        diagnostics = Diagnostics(
            lost_history_rate=self._lost_history_rate(method, inputs, seed=seed),
            seconds=round(predictions.seconds, 2),
            fit_seconds=None if predictions.fit_seconds is None else round(predictions.fit_seconds, 2),
        )
        if inputs.prompt_lengths:
            diagnostics = self._with_prompt_facts(diagnostics, method, inputs, predictions)
        decoding = {"score": "scored", "generate": "generated"}[self.context.decoding]
        return Trial(
            method.info,
            seed,
            statistics,
            invalid_rate=self._invalid_rate(predictions.texts),
            decoding=decoding if method.info.has_language_model else "computed",
            diagnostics=diagnostics,
        )

    def _with_prompt_facts(
        self, diagnostics: Diagnostics, method: Method, inputs: ModelInputs, predictions: Predictions
    ) -> Diagnostics:
        """Add the diagnostics of rows with a language model."""
        tokens = _mean_tokens(inputs.prompt_lengths) + method.soft_tokens(self.context)
        cost = method.user_cost(self.context, inputs)
        return replace(
            diagnostics,
            truncated_rate=float(np.mean([length.truncated for length in inputs.prompt_lengths])),
            unfinished_rate=float(np.mean(predictions.unfinished)),
            cut_items_rate=inputs.cut_items_rate,
            prompt_tokens_mean=tokens,
            extra_prompt_tokens=tokens - _mean_tokens(self.context.prompt_lengths),
            peak_memory_bytes=predictions.peak_memory_bytes,
            bytes_per_user=cost.bytes if cost else None,
            seconds_per_user=cost.seconds if cost else None,
        )

    def _lost_history_rate(self, method: Method, inputs: ModelInputs, *, seed: int) -> float:
        """Return the share of the samples with a history whose history a personal row did not use."""
        if method.info.history == "none":
            return 0.0
        ignored_items = method.ignored_items(self.context, seed=seed)
        pairs = zip(inputs.items_used, self.context.history_sizes, strict=True)
        items_used = [items for items, size in pairs if size]
        return float(np.mean([items <= ignored_items for items in items_used])) if items_used else 0.0

    def _invalid_rate(self, texts: Sequence[str]) -> float:
        task = self.run.task
        return float(np.mean([is_invalid(text, task.labels) for text in texts]))

    # ---- files

    def _path(self, method: Method, seed: int, ending: str) -> Path:
        return self.folder / f"{method.name.replace(':', '-')}.seed-{seed}.{ending}"

    def _write_scores(self, method: Method, statistics: dict[str, Array], *, seed: int) -> None:
        """Write the scores of each sample, for metrics that are defined on a single sample."""
        metrics = [
            metric
            for metric in self.settings.metrics
            if metric.name in statistics and (statistics[metric.name].shape[1] == 1 or not metric.of_answers)
        ]
        lines = [
            {"id": sample.id, "user_id": sample.user_id, "history_items": len(sample.rows)}
            | {metric.name: float(metric.value(statistics[metric.name][index])) for metric in metrics}
            for index, sample in enumerate(self.context.samples)
        ]
        write_json(self._path(method, seed, "scores.json"), lines)


def _is_of_plain_answers(metric: Metric) -> bool:
    return isinstance(metric, LikelihoodMetric) and metric.of_plain_answers


def _of_likelihoods(metric: Metric, predictions: Predictions) -> Array | None:
    if not isinstance(metric, LikelihoodMetric):
        return None
    likelihoods = predictions.divergences() if metric.of_plain_answers else predictions.likelihoods()
    return None if likelihoods is None else metric.of_likelihoods(likelihoods)


def _mean_tokens(lengths: Sequence[Measure]) -> float:
    return float(np.mean([length.tokens for length in lengths]))


def _references(samples: Sequence[EncodedSample]) -> list[str]:
    references = [sample.target for sample in samples if sample.target is not None]
    if len(references) < len(samples):
        raise MissingData(
            f"{len(samples) - len(references)} of {len(samples)} samples have no reference answer, so this split "
            f"cannot be scored. Use `personaplug predict` to write predictions for it."
        )
    return references
