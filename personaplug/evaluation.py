"""Evaluation: conditions × seeds on the same samples → answers → scores per sample → intervals and paired comparisons.

Answers of a finished (condition, seed) are kept in the run and not made again by a repeated command.

A results object holds: task, split, model, encoder, placement, seeds, versions, machine, config, training, users, data,
dtype, notes, and

    rows   per condition: n, metrics, intervals, invalid_rate, truncated_rate (cut prompts), unfinished_rate (cut
           answers), lost_history_rate, prompt_tokens_mean, seconds, peak_memory_bytes, decoding, and over several
           seeds seed_spread and per_seed
    pairs  a, b, metric, difference (a's advantage whatever the metric's direction), low, high, p
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from personaplug.answers import Answers, answer, keep, kept
from personaplug.backends.base import GenerationConfig
from personaplug.conditions import Condition, with_history
from personaplug.config import EvaluationConfig
from personaplug.data.base import Reader, ReadReport, Task
from personaplug.errors import BadConfig, MissingData
from personaplug.files import write_json
from personaplug.metrics import get_metric, is_invalid
from personaplug.personalizer import Personalizer
from personaplug.run import Models, Run, machine, versions
from personaplug.samples import EncodedSample, samples_fingerprint
from personaplug.stats import bootstrap_interval, paired_bootstrap

PLACEMENT = "prefix"
ORACLE = "all-knowing"


def evaluate(
    run: Run,
    reader: Reader,
    *,
    split: str,
    conditions: Sequence[Condition],
    config: EvaluationConfig,
    models: Models,
    oracle: Path | None = None,
) -> dict[str, Any]:
    """Fill a results table.

    Args:
        run: with the trained plugs.
        reader: the split to score.
        oracle: predictions of an all-knowing predictor in LaMP's output format, for simulated users.
    Returns:
        The results object; see the module's docstring.
    Raises:
        MissingData: if a plug that a condition needs is not trained, or a sample has no answer to compare with.
        BadConfig: if labels are to be scored in a task without labels.
    """
    return _Evaluation(run, reader, split=split, config=config, models=models).table(conditions, oracle=oracle)


class _Evaluation:
    """The parts of one evaluation, held together."""

    def __init__(self, run: Run, reader: Reader, *, split: str, config: EvaluationConfig, models: Models) -> None:
        self.run, self.reader, self.split, self.config, self.models = run, reader, split, config, models
        self.task = run.task
        self.decoding = _decoding(self.task, config)
        self.generation = GenerationConfig(
            max_new_tokens=config.max_new_tokens or self.task.max_new_tokens, num_beams=config.num_beams
        )
        self.table_of_vectors = run.open_vectors(models.encoder)
        self.samples = run.read_samples(reader, self.table_of_vectors, limit=config.limit, seed=config.draw_seed)
        self.golds = _golds(self.samples)
        self.owners = [sample.owner for sample in self.samples]
        self.metrics = [
            get_metric(name, labels=self.task.labels, fallback=config.rating_fallback) for name in self.task.metrics
        ]
        self.measures = models.backend.measure([sample.prompt for sample in self.samples])
        self.folder = run.folder / "evaluations" / split

    def table(self, conditions: Sequence[Condition], *, oracle: Path | None) -> dict[str, Any]:
        scored = {condition.name: self._scored(condition) for condition in conditions}
        rows = [self._row(condition, *scored[condition.name]) for condition in conditions]
        statistics = {name: stats for name, (_, stats, _) in scored.items()}
        if oracle is not None:
            row, statistics[ORACLE] = self._oracle_row(oracle)
            rows.append(row)
        return self._about() | {"rows": rows, "pairs": self._pairs(statistics)}

    def _scored(self, condition: Condition) -> tuple[list[Answers], dict[str, np.ndarray], list[dict[str, float]]]:
        """Answers per seed, statistics averaged over seeds, and each seed's own metrics."""
        seeds = self.run.config.training.seeds if condition.plug else (self.run.config.training.seeds[0],)
        answers = [self._answers(condition, seed=seed) for seed in seeds]
        each = [{metric.name: metric.statistics(a.texts, self.golds) for metric in self.metrics} for a in answers]
        means = {metric.name: np.mean([stats[metric.name] for stats in each], axis=0) for metric in self.metrics}
        alone = [
            {metric.name: float(metric.value(stats[metric.name].mean(axis=0))) for metric in self.metrics}
            for stats in each
        ]
        for seed, made, stats in zip(seeds, answers, each, strict=True):
            self._keep_scores(condition, made, stats, seed=seed)
        return answers, means, alone

    def _answers(self, condition: Condition, *, seed: int) -> Answers:
        shown = with_history(condition, self.samples, seed=self.config.draw_seed + seed)
        path = self.folder / f"{condition.name}.seed-{seed}.answers.json"
        depends_on = self._depends_on(condition, shown, seed=seed)
        made = kept(path, depends_on=depends_on)
        if made is None:
            made = answer(
                self.models.backend,
                shown,
                personalizer=self._personalizer(condition, seed=seed),
                task=self.task,
                decoding=self.decoding,
                generation=self.generation,
                batch_size=self.config.evaluation_batch_size,
                title=f"{condition.name} (seed {seed})" if condition.plug else condition.name,
            )
            keep(made, path, depends_on=depends_on)
        golds = [{"id": sample.id, "output": text} for sample, text in zip(self.samples, made.texts, strict=True)]
        write_json(self.folder / f"{condition.name}.seed-{seed}.json", {"task": self.task.name, "golds": golds})
        return made

    def _personalizer(self, condition: Condition, *, seed: int) -> Personalizer | None:
        if condition.plug is None:
            return None
        plug = self.run.load_plug(condition.plug, seed=seed, models=self.models)
        return Personalizer(plug, table=self.table_of_vectors)

    def _depends_on(self, condition: Condition, shown: Sequence[EncodedSample], *, seed: int) -> list[Any]:
        """Everything that this condition's answers come from."""
        backend = self.models.backend
        parts = [
            samples_fingerprint(shown, self.table_of_vectors),
            self.decoding,
            list(self.task.labels),
            asdict(self.generation),
            backend.identity.fingerprint,
            backend.dtype,
            self.run.config.model.max_prompt_tokens,
        ]
        if condition.plug is not None and self.run.trained(condition.plug, seed=seed):
            weights = self.run.plug_folder(condition.plug, seed=seed) / "plug.safetensors"
            parts.append(hashlib.sha256(weights.read_bytes()).hexdigest())
        return parts

    def _row(
        self,
        condition: Condition,
        answers: list[Answers],
        means: dict[str, np.ndarray],
        alone: list[dict[str, float]],
    ) -> dict[str, Any]:
        row = self._scores(condition.name, means) | {
            "invalid_rate": self._invalid_rate([made.texts for made in answers]),
            "truncated_rate": float(np.mean([measure.truncated for measure in self.measures])),
            "unfinished_rate": float(np.mean([made.unfinished for made in answers])),
            "lost_history_rate": self._lost_rate(condition),
            "prompt_tokens_mean": float(np.mean([m.tokens for m in self.measures])) + self._soft_tokens(condition),
            "seconds": round(float(np.mean([made.seconds for made in answers])), 2),
            "peak_memory_bytes": max(made.peak_memory_bytes for made in answers),
            "decoding": "scored" if self.decoding == "score" else "generated",
        }
        if len(alone) > 1:
            row["per_seed"] = alone
            row["seed_spread"] = {name: float(np.std([one[name] for one in alone], ddof=1)) for name in alone[0]}
        return row

    def _scores(self, name: str, means: dict[str, np.ndarray]) -> dict[str, Any]:
        values, intervals = {}, {}
        for metric in self.metrics:
            interval = bootstrap_interval(
                means[metric.name], self.owners, metric, resamples=self.config.resamples, seed=self.config.draw_seed
            )
            values[metric.name] = interval.value
            intervals[metric.name] = [interval.low, interval.high]
        return {"condition": name, "n": len(self.samples), "metrics": values, "intervals": intervals}

    def _oracle_row(self, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        told = {gold["id"]: gold["output"] for gold in json.loads(path.read_text(encoding="utf-8"))["golds"]}
        missing = sum(sample.id not in told for sample in self.samples)
        if missing:
            raise MissingData(f"{path} knows nothing of {missing} of {len(self.samples)} samples; is it of this split?")
        texts = [told[sample.id] for sample in self.samples]
        stats = {metric.name: metric.statistics(texts, self.golds) for metric in self.metrics}
        unused = dict.fromkeys(
            ("truncated_rate", "lost_history_rate", "prompt_tokens_mean", "seconds", "peak_memory_bytes")
        )
        told_of = {"invalid_rate": self._invalid_rate([texts]), **unused, "decoding": "known"}
        return self._scores(ORACLE, stats) | told_of, stats

    def _pairs(self, statistics: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        """Every later row against every earlier one, metric by metric."""
        pairs = []
        for b, a in combinations(statistics, 2):
            for metric in self.metrics:
                found = paired_bootstrap(
                    statistics[a][metric.name],
                    statistics[b][metric.name],
                    self.owners,
                    metric,
                    resamples=self.config.resamples,
                    seed=self.config.draw_seed,
                )
                pairs.append({"a": a, "b": b, "metric": metric.name, **asdict(found)})
        return pairs

    def _about(self) -> dict[str, Any]:
        run, report = self.run, self.reader.report
        return {
            "task": self.task.name,
            "split": self.split,
            "model": self.models.backend.identity.describe(),
            "encoder": self.models.encoder.identity.describe(),
            "placement": PLACEMENT,
            "seeds": list(run.config.training.seeds),
            "versions": versions(),
            "machine": machine(),
            "config": asdict(run.config) | {"evaluation": asdict(self.config)},
            "training": _training_facts(run),
            "users": len(set(self.owners)),
            "data": {
                "fingerprint": samples_fingerprint(self.samples, self.table_of_vectors),
                "skipped_records": report.skipped,
                "cut_history_items": report.cut_items,
                "texts_cut_by_encoder": self.models.encoder.truncated,
            },
            "dtype": self.models.backend.dtype,
            "notes": self._notes(report),
        }

    def _notes(self, report: ReadReport) -> list[str]:
        notes = [f"Intervals and p-values: bootstrap over {len(set(self.owners))} users."]
        if any(sample.user_id is None for sample in self.samples):
            notes.append(
                "The data names no users: samples stand for users, so intervals may be too narrow and a wrong "
                "user may be the same person."
            )
        if self.run.config.plug.aggregator in ("dot", "mean"):
            notes.append("shuffled equals plug here: this aggregator takes no notice of the items' order.")
        if report.skipped:
            notes.append(f"{report.skipped} broken records were passed over.")
        if len(self.run.config.training.seeds) < 3:
            notes.append("Fewer than three training seeds: the spread between trainings is not covered.")
        return notes

    def _invalid_rate(self, answered: Sequence[Sequence[str]]) -> float:
        texts = [text for one in answered for text in one]
        return float(np.mean([is_invalid(text, kind=self.task.kind, labels=self.task.labels) for text in texts]))

    def _lost_rate(self, condition: Condition) -> float:
        """Share of the samples with a history whose row should have used it and got none of it."""
        if condition.history == "none":
            return 0.0
        seed = self.config.draw_seed + self.run.config.training.seeds[0]
        shown = with_history(condition, self.samples, seed=seed)
        had = [(len(before.rows), len(after.rows)) for before, after in zip(self.samples, shown, strict=True)]
        return float(np.mean([float(after == 0) for before, after in had if before] or [0.0]))

    def _soft_tokens(self, condition: Condition) -> int:
        plug = self.run.config.plug
        return plug.instruction_tokens + plug.persona_tokens if condition.plug else 0

    def _keep_scores(self, condition: Condition, made: Answers, stats: dict[str, np.ndarray], *, seed: int) -> None:
        simple = [metric for metric in self.metrics if stats[metric.name].shape[1] == 1]
        lines = [
            {"id": sample.id, "user_id": sample.user_id, "history_items": len(sample.rows)}
            | {metric.name: float(metric.value(stats[metric.name][i])) for metric in simple}
            for i, sample in enumerate(self.samples)
        ]
        write_json(self.folder / f"{condition.name}.seed-{seed}.scores.json", lines)


def _training_facts(run: Run) -> list[dict[str, Any]]:
    """What each training of the run was, for those that have ended."""
    facts = []
    for path in sorted(run.folder.glob("*/seed-*/fit.json")):
        facts.append(
            {
                "plug": path.parent.parent.name,
                "seed": path.parent.name.removeprefix("seed-"),
                **json.loads(path.read_text(encoding="utf-8")),
            }
        )
    return facts


def _decoding(task: Task, config: EvaluationConfig) -> str:
    if config.decoding == "score" and not task.labels:
        raise BadConfig(
            f"decoding=score needs a task with labels; {task.name} writes free text. Use decoding=generate."
        )
    return ("score" if task.labels else "generate") if config.decoding == "auto" else config.decoding


def _golds(samples: Sequence[EncodedSample]) -> list[str]:
    if not samples:
        raise MissingData("The split holds no samples.")
    golds = [sample.target for sample in samples if sample.target is not None]
    if len(golds) < len(samples):
        raise MissingData(
            f"{len(samples) - len(golds)} of {len(samples)} samples have no answer to compare with; "
            f"a split with hidden answers cannot be scored here."
        )
    return golds
