"""Stand-ins for a persona: random vectors and the mean of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from drawn_pictures import drawn

from personaplug.config import PAPER
from personaplug.data.records import Content, ItemContent
from personaplug.encoders import HashEncoder, open_encoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.encoders.joint import part_slice
from personaplug.encoders.strangers import strangers
from personaplug.infra.model_hub import LLMIdentity
from personaplug.methods.personas import MeanPersona, NoisePictures, RandomVectors, StrangersPictures
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec


def _samples(count: int) -> list[EncodedSample]:
    return [
        EncodedSample(
            str(k),
            str(k),
            None,
            "p",
            f"query {k}",
            None,
            np.arange(k, k + 3),
            np.zeros(3, np.int16),
            no_style(3),
            all_answers(3),
        )
        for k in range(count)
    ]


def _personalizer(folder: Path, hashing: HashEncoder) -> Personalizer:
    """Return an untrained plug with vectors of ten items."""
    table = EmbeddingStore.open(folder / "vectors", hashing)
    table.add([f"item {k}" for k in range(10)])
    spec = PlugSpec(LLMIdentity("toy", None, "0" * 16, 8), 0.25, hashing.identity)
    torch.manual_seed(0)
    return Personalizer(PersonaPlug(PAPER, spec=spec, encoder=hashing).eval(), table=table)


def test_random_vectors_have_unit_length_and_depend_on_the_content(tmp_path: Path, hashing: HashEncoder) -> None:
    table = EmbeddingStore.open(tmp_path / "one", hashing)
    table.add(["sun", "rain", "fog"])
    vectors = RandomVectors(table, seed=1)
    replaced = vectors.gather(table.add(["sun", "rain", "sun"]))
    np.testing.assert_allclose(np.linalg.norm(replaced.astype(np.float64), axis=1), 1, atol=1e-3)
    assert (replaced[0] == replaced[2]).all()
    assert not (replaced[0] == replaced[1]).all()
    assert not (RandomVectors(table, seed=2).gather(table.add(["sun"])) == replaced[0]).all()
    other = EmbeddingStore.open(tmp_path / "two", hashing)
    other.add(["fog", "hail", "rain", "sun"])
    assert (RandomVectors(other, seed=1).gather(other.add(["sun", "rain", "sun"])) == replaced).all()


def test_mean_persona_is_the_same_average_for_all_users(tmp_path: Path, hashing: HashEncoder) -> None:
    personalizer, samples = _personalizer(tmp_path, hashing), _samples(5)
    mean = MeanPersona(personalizer, samples, batch_size=2)
    with torch.no_grad():
        each = personalizer.soft_prompt(samples).vectors
    averaged = mean.soft_prompt(samples[:2]).vectors
    assert mean.soft_prompt(samples[:2]).label_bias is None
    torch.testing.assert_close(averaged[0], each.mean(dim=0))
    torch.testing.assert_close(averaged[0], averaged[1])
    assert not torch.allclose(each[0], each[1])


def test_mean_persona_averages_the_label_bias(tmp_path: Path, hashing: HashEncoder) -> None:
    plain = _personalizer(tmp_path, hashing)
    spec = replace(plain.plug.spec, labels=("1", "2", "3"))
    plug = PersonaPlug(replace(PAPER, label_prior="counts"), spec=spec, encoder=hashing).eval()
    personalizer = Personalizer(plug, table=plain.table)
    samples = [replace(sample, label_ids=np.full(3, k % 3, np.int16)) for k, sample in enumerate(_samples(5))]
    with torch.no_grad():
        each = personalizer.soft_prompt(samples).label_bias
    averaged = MeanPersona(personalizer, samples, batch_size=2).soft_prompt(samples[:2]).label_bias
    assert each is not None
    assert averaged is not None
    torch.testing.assert_close(averaged, each.mean(dim=0).expand(2, -1))


def test_mean_persona_excludes_cold_start_tokens(tmp_path: Path, hashing: HashEncoder) -> None:
    personalizer, samples = _personalizer(tmp_path, hashing), _samples(5)
    plug = personalizer.plug
    whole = MeanPersona(personalizer, samples).mean.vectors
    plug.cold_start = ColdStart(torch.full_like(plug.population_prompt().vectors[0], 99.0), max_items=2)
    torch.testing.assert_close(MeanPersona(personalizer, [*samples, samples[0].latest(2)]).mean.vectors, whole)
    few = [sample.latest(2) for sample in samples]
    assert float(MeanPersona(personalizer, few).mean.vectors.min()) == 99.0 * plug.spec.embedding_scale


def test_noise_pictures_replace_pictures_and_nothing_else(tmp_path: Path) -> None:
    encoder = open_encoder("hash:16+pictures:pixels")
    table = EmbeddingStore.open(tmp_path, encoder)
    contents: list[Content] = ["a text", ItemContent("a text", drawn("red")), ItemContent("a text", drawn("blue"))]
    rows = table.add([*contents, ItemContent("another", drawn("red"))])
    vectors, noisy = table.gather(rows), NoisePictures(table, encoder, seed=1).gather(rows)
    pictures = part_slice(encoder.identity, "picture")
    np.testing.assert_array_equal(noisy[:, : pictures.start], vectors[:, : pictures.start])
    np.testing.assert_array_equal(noisy[0], vectors[0])
    np.testing.assert_allclose(np.linalg.norm(noisy.astype(np.float64), axis=1), 1, atol=2e-3)
    assert (np.abs(noisy - vectors)[1:, pictures].max(axis=1) > 0.05).all()
    np.testing.assert_array_equal(noisy[1, pictures], noisy[3, pictures])


def test_strangers_pictures_stand_beside_the_users_own_texts(tmp_path: Path) -> None:
    encoder = open_encoder("hash:16+pictures:pixels")
    colors = ["red", "blue", "green"]
    table = EmbeddingStore.open(tmp_path, encoder)
    rows = table.add([ItemContent(f"text {n}", drawn(color)) for color in colors for n in range(2)] + ["no picture"])
    samples = [
        replace(sample, rows=np.array([*rows[2 * k : 2 * k + 2], rows[-1]])) for k, sample in enumerate(_samples(3))
    ]
    spec = PlugSpec(LLMIdentity("toy", None, "0" * 16, 8), 0.25, encoder.identity)
    torch.manual_seed(0)
    personalizer = Personalizer(PersonaPlug(PAPER, spec=spec, encoder=encoder).eval(), table=table)
    control = StrangersPictures(personalizer, samples, encoder=encoder.identity, seed=3)
    stranger_of = dict(zip(range(3), strangers([sample.owner for sample in samples], seed=3), strict=True))
    swapped = [
        table.add([ItemContent(f"text {n}", drawn(colors[stranger_of[k]])) for n in range(2)] + ["no picture"])
        for k in range(3)
    ]
    expected = [replace(sample, rows=rows) for sample, rows in zip(samples, swapped, strict=True)]
    with torch.no_grad():
        soft, own = control.soft_prompt(samples[1:]), personalizer.soft_prompt(samples[1:])
        torch.testing.assert_close(soft.vectors, personalizer.soft_prompt(expected[1:]).vectors, atol=1e-3, rtol=1e-2)
    assert not torch.allclose(soft.vectors, own.vectors, atol=1e-2)
