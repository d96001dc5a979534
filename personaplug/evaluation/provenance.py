"""Provenance: what a results object says of where its numbers come from — models, settings, data, trainings, notes."""

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
    """What there is to know of an evaluation beside its rows.

    Args:
        samples: those that are scored, with their own histories.
        report: what was passed over or cut while they were read.
        cut_by_encoder: texts of theirs that were too long for the encoder.
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
            "The data names no users: samples stand for users, so intervals may be too narrow and a wrong user may be "
            "the same person."
        )
    known = run.users_trained_on(sample.user_id for sample in samples)
    if known:
        notes.append(
            f"{known} of the {users} users have samples in the training split too: for them this measures what is to "
            f"come of known users."
        )
    if report.skipped:
        notes.append(f"{report.skipped} broken records were passed over.")
    if report.own_answers:
        notes.append(
            f"{report.own_answers} samples have an item with the question's own text and answer in their history: "
            f"every score that reads histories is too good."
        )
    return notes


def _trainings(run: Run) -> list[dict[str, Any]]:
    """What each training of the run was, for those that have ended."""
    paths = sorted(run.folder.glob("*/seed-*/fit.json"))
    trainings = [(path.parent.parent.name, path.parent.name.removeprefix("seed-")) for path in paths]
    return [
        {"plug": name, "seed": seed, **(run.training_facts(name, seed=int(seed)) or {})} for name, seed in trainings
    ]
