"""Fit of a label prior: it learns which items are similar, and how far to trust them beside a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plugs import LLM

from personaplug.config import PAPER, TrainingConfig
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import HashEncoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, encode_samples
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.training.label_prior_fit import LabelPriorFit

LABELS = ("low", "middle", "high")
KINDS = ("musical", "western", "cartoon")
THEMES = ("maps", "trains", "pianos", "farms", "spies", "schools", "ships", "letters")
CONFIG = TrainingConfig(validation_share=0.2)


def _samples(*, users: int, seed: int = 0) -> list[Sample]:
    """Return a question of each user, who gives each kind of film another label, whatever its theme."""
    rng, samples = np.random.default_rng(seed), []
    for user in range(users):
        label_of = dict(zip(KINDS, rng.permutation(LABELS), strict=True))
        films = [(kind, theme) for kind in KINDS for theme in THEMES]
        films = [films[i] for i in rng.permutation(len(films))[:13]]
        items = [
            HistoryItem(theme, (("film", f"a {kind} about {theme}"), ("rating", label_of[kind])), "rating")
            for kind, theme in films[1:]
        ]
        kind, theme = films[0]
        query = f"a {kind} about {theme}"
        samples.append(
            Sample(f"q{user}", f"u{user}", prompt=query, query=query, history=tuple(items), target=label_of[kind])
        )
    return samples


def _fit(folder: Path, *, prior: str, users: int = 120) -> tuple[LabelPriorFit, list[EncodedSample]]:
    encoder = HashEncoder(64)
    table = EmbeddingStore.open(folder / "vectors", encoder)
    samples = encode_samples(_samples(users=users), table, labels=LABELS, with_answer=False)
    spec = PlugSpec(LLM, 1.0, encoder.identity, LABELS)
    torch.manual_seed(0)
    config = replace(PAPER, persona_tokens=0, label_prior=prior)  # type: ignore[arg-type]  # one of two literals
    plug = PersonaPlug(config, spec=spec, encoder=encoder)
    assert plug.label_prior is not None
    return LabelPriorFit(Personalizer(plug, table=table), plug.label_prior, LABELS), samples


def test_fit_finds_what_makes_items_similar(tmp_path: Path) -> None:
    counts, samples = _fit(tmp_path / "counts", prior="counts")
    loss_of_counts = counts.fit_alone(samples, config=CONFIG, seed=0)
    neighbors, samples = _fit(tmp_path / "neighbors", prior="neighbors")
    before = neighbors.loss(samples)
    loss = neighbors.fit_alone(samples, config=CONFIG, seed=0)
    assert loss < 0.5 < 0.9 < loss_of_counts  # all labels are equally frequent, so counts tell nothing: log 3 = 1.1
    assert loss < before
    others = samples[1:] + samples[:1]
    strangers = [s.with_items_of(o, np.arange(len(o.rows))) for s, o in zip(samples, others, strict=True)]
    assert neighbors.loss(strangers) > 1.1
    assert neighbors.prior.metric is not None
    assert not any(parameter.requires_grad for parameter in neighbors.prior.parameters())


def test_equal_seeds_give_equal_fits(tmp_path: Path) -> None:
    states = []
    for folder in ("one", "other"):
        fit, samples = _fit(tmp_path / folder, prior="neighbors", users=40)
        fit.fit_alone(samples, config=CONFIG, seed=3)
        states.append(fit.prior.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_fit_beside_a_model_changes_the_numbers_only(tmp_path: Path) -> None:
    fit, samples = _fit(tmp_path, prior="neighbors", users=60)
    fit.fit_alone(samples, config=CONFIG, seed=0)
    assert fit.prior.metric is not None
    metric, trust = fit.prior.metric.weight.clone(), fit.prior.near_trust.item()
    others = samples[1:] + samples[:1]
    strangers = [s.with_items_of(o, np.arange(len(o.rows))) for s, o in zip(samples, others, strict=True)]
    uniform = torch.full((len(samples), 3), 1 / 3).log()
    before = fit.loss(strangers, scores=uniform)
    after = fit.fit_beside(uniform, strangers)
    assert after < before
    assert fit.prior.near_trust.item() < trust / 2  # a stranger's answers tell nothing
    assert torch.equal(fit.prior.metric.weight, metric)


def test_loss_ignores_answers_that_are_no_labels(tmp_path: Path) -> None:
    fit, samples = _fit(tmp_path, prior="counts", users=10)
    expected = fit.loss(samples)
    assert fit.loss([*samples, replace(samples[0], target="else")]) == pytest.approx(expected)
