"""Provenance of results: models, settings, versions, data, trainings and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from personaplug.analysis.trials import Provenance
from personaplug.config import EvaluationConfig
from personaplug.data.task import ReadReport
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, samples_fingerprint
from personaplug.infra.environment import machine_info, package_versions
from personaplug.run import Models, Run


def provenance(
    run: Run,
    samples: Sequence[EncodedSample],
    *,
    split: str,
    config: EvaluationConfig,
    models: Models,
    table: EmbeddingStore,
    report: ReadReport,
    cut_by_encoder: int,
) -> Provenance:
    """Return the facts about an evaluation that do not depend on a row.

    Args:
        samples: the scored samples, with their own histories.
        report: counts of skipped records and dropped history items.
        cut_by_encoder: number of texts of these samples that the encoder truncated.
    """
    users = len({sample.owner for sample in samples})
    return Provenance(
        task=run.task.name,
        split=split,
        model=models.llm.identity.describe(),
        encoder=models.encoder.identity.describe(),
        placement=run.config.plug.placement,
        versions=package_versions(),
        machine=machine_info(),
        config=asdict(run.config) | {"evaluation": asdict(config)},
        training=_trainings(run),
        users=users,
        data={
            "fingerprint": samples_fingerprint(samples, table),
            "skipped_records": report.skipped,
            "cut_history_items": report.cut_items,
            "texts_cut_by_encoder": cut_by_encoder,
        },
        dtype=models.llm.dtype,
        notes=_notes(run, samples, users=users, report=report),
    )


def _notes(run: Run, samples: Sequence[EncodedSample], *, users: int, report: ReadReport) -> list[str]:
    notes = [f"Intervals and p-values: bootstrap over {users} users."]
    if any(sample.user_id is None for sample in samples):
        notes.append(
            "The data names no users, so each sample counts as a user. Intervals may be too narrow, and a wrong user "
            "may be the same person."
        )
    trained_users = run.users_trained_on(sample.user_id for sample in samples)
    if trained_users:
        notes.append(
            f"{trained_users} of the {users} users also have samples in the training split. Their scores apply to "
            f"known users, not to new users."
        )
    if report.skipped:
        notes.append(f"{report.skipped} broken records were skipped.")
    if report.own_answers:
        notes.append(
            f"{report.own_answers} samples have their own question and answer in the history, so scores of rows that "
            f"use histories are too good."
        )
    return notes


def _trainings(run: Run) -> list[dict[str, Any]]:
    """Return the facts of each finished training of the run."""
    paths = sorted(run.folder.glob("*/seed-*/fit.json"))
    trainings = [(path.parent.parent.name, path.parent.name.removeprefix("seed-")) for path in paths]
    return [
        {"plug": name, "seed": seed, **(run.training_facts(name, seed=int(seed)) or {})} for name, seed in trainings
    ]
