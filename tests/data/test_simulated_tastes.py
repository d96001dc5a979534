"""Simulated users with tastes: pictures and texts tell one half each, and dev has new users, pictures and phrases."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from personaplug.analysis.metrics import get_metric
from personaplug.data import open_dataset
from personaplug.data.drawn_pictures import Plane
from personaplug.data.pictures import Picture
from personaplug.data.records import Sample
from personaplug.data.simulated_tastes import KEYWORDS_INPUT, drawn_picture, wording
from personaplug.data.simulation import Simulation, SimulationConfig, simulate, splits_of, write_simulation
from personaplug.data.tastes import ATTRIBUTES, COLOR_GROUPS, COLORS, SHAPES, TEXTURES, Taste, read_keywords

Image = pytest.importorskip("PIL.Image", reason="needs Pillow (extra: pictures)")

KEYWORDS = SimulationConfig(task="taste-keywords", users=40, queries_per_user=3, dev_users=20, max_items=14)
CATEGORY = SimulationConfig(task="taste-category", users=20, dev_users=10, max_items=12)


@pytest.fixture(scope="module")
def train() -> Simulation:
    return simulate(KEYWORDS, "train")


@pytest.fixture(scope="module")
def dev() -> Simulation:
    return simulate(KEYWORDS, "dev")


def pictures_of(samples: Sequence[Sample]) -> list[Picture]:
    return [item.picture for sample in samples for item in sample.history if item.picture]


def texts_of(samples: Sequence[Sample]) -> list[str]:
    return [item.content.removeprefix("text: ") for sample in samples for item in sample.history]


def phrases_of(text: str, phrases: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for name, each in phrases.items() if any(phrase in text for phrase in each)]


def pixels(picture: Picture) -> Plane:
    return np.asarray(Image.open(io.BytesIO(picture.read())), dtype=np.float64) / 255


def test_texts_have_one_theme_and_one_mood_and_no_keyword(train: Simulation, dev: Simulation) -> None:
    for simulation, is_dev in ((train, False), (dev, True)):
        words = wording(is_dev=is_dev)
        texts = [text for text in texts_of(simulation.samples) if text]
        assert not any(read_keywords(text) for text in texts)
        assert all(len(phrases_of(text, dict(words.themes))) == 1 for text in texts)
        assert all(len(phrases_of(text, dict(words.moods))) == 1 for text in texts)


def test_most_items_have_the_users_theme_and_no_user_shows_it_always(train: Simulation) -> None:
    themes = dict(wording(is_dev=False).themes)
    shares = []
    for sample in train.samples:
        own = read_keywords(str(sample.target))["theme"]
        shown = [phrases_of(text, themes)[0] for text in texts_of([sample]) if text]
        shares.append(Counter(shown)[own] / len(shown))
    assert 0.78 < float(np.mean(shares)) < 0.88  # 0.8, and a sixth of the others by chance


def test_some_items_are_a_text_alone_and_some_a_picture_alone(train: Simulation) -> None:
    items = [item for sample in train.samples for item in sample.history]
    without_picture = sum(item.picture is None for item in items) / len(items)
    without_text = sum(not dict(item.fields)["text"] for item in items) / len(items)
    assert 0.07 < without_picture < 0.13
    assert 0.07 < without_text < 0.13
    assert all(item.picture or dict(item.fields)["text"] for item in items)


def test_dev_has_new_users_pictures_and_phrases(train: Simulation, dev: Simulation) -> None:
    assert {sample.user_id for sample in train.samples}.isdisjoint(sample.user_id for sample in dev.samples)
    assert set(pictures_of(train.samples)).isdisjoint(pictures_of(dev.samples))
    for name in ("themes", "moods"):
        seen, new = (getattr(wording(is_dev=is_dev), name) for is_dev in (False, True))
        for key in seen:
            assert len(seen[key]) >= len(new[key]) >= 3
            assert set(seen[key]).isdisjoint(new[key])


def test_different_pictures_are_few_so_that_encoding_is_cheap(train: Simulation, dev: Simulation) -> None:
    shown = pictures_of(train.samples) + pictures_of(dev.samples)
    assert len(set(shown)) <= 4 * len(COLORS) * len(SHAPES) * len(TEXTURES) == 720


@pytest.mark.parametrize("color", COLORS)
def test_picture_has_its_color_on_a_grey_background(color: str) -> None:
    seen = []
    for shape in SHAPES:
        picture = pixels(drawn_picture((color, shape, "plain"), 0, "train", 0))
        spread = picture.max(axis=-1) - picture.min(axis=-1)
        vivid = picture[spread > 0.4]
        assert 0.005 < len(vivid) / spread.size < 0.8
        assert np.median(spread[spread <= 0.4]) < 0.1
        seen.append(np.median(vivid, axis=0))
    red, green, blue = np.mean(seen, axis=0)
    order = {"red": red > 2 * max(green, blue), "blue": blue > max(red, green), "green": green > 2 * max(red, blue)}
    assert order.get(color, True)
    assert (red > blue) == (color in (*COLOR_GROUPS["warm"], "lime", "pink"))


def test_pictures_of_one_look_differ_and_a_seed_repeats_them() -> None:
    look = ("teal", "stars", "striped")
    first, second = (drawn_picture(look, 0, "train", variant) for variant in (0, 1))
    assert drawn_picture.__wrapped__(look, 0, "train", 0) == first != second
    assert drawn_picture(look, 1, "train", 0) != first


def test_texture_adds_edges() -> None:
    def edges(texture: str) -> float:
        planes = [pixels(drawn_picture(("red", "squares", texture), 0, "train", variant)) for variant in range(6)]
        return float(np.mean([np.abs(np.diff(plane, axis=0)).mean() for plane in planes]))

    assert min(edges(texture) for texture in TEXTURES if texture != "plain") > 1.5 * edges("plain")


def test_a_train_question_may_ask_for_a_color_or_a_texture_and_the_target_has_it(train: Simulation) -> None:
    asked = {sample.id: read_keywords(sample.query) for sample in train.samples}
    assert 0.15 < sum(map(bool, asked.values())) / len(asked) < 0.35
    assert {name for each in asked.values() for name in each} == {"color", "texture"}
    for sample in train.samples:
        target = read_keywords(str(sample.target))
        assert target == {**target, **asked[sample.id]}
        assert list(target) == list(ATTRIBUTES)
        assert sample.prompt == KEYWORDS_INPUT + sample.query


def test_asked_split_asks_dev_users_for_a_color_that_is_not_theirs(dev: Simulation) -> None:
    asked = simulate(KEYWORDS, "asked").samples
    own = {sample.owner: sample for sample in dev.samples}
    assert len(asked) == len(dev.samples)
    for sample in asked:
        plain, target = read_keywords(str(own[sample.owner].target)), read_keywords(str(sample.target))
        assert sample.history == own[sample.owner].history
        assert read_keywords(sample.query) == {"color": target["color"]}
        assert {name for name in target if target[name] != plain[name]} == {"color"}
    assert not any(read_keywords(sample.query) for sample in dev.samples)


def test_collection_is_the_group_of_the_color_and_the_theme() -> None:
    assert Taste("teal", "stars", "plain", "city", "calm").collection == "fresh city"
    simulation = simulate(CATEGORY, "train")
    assert len(simulation.task.labels) == 18
    assert {sample.target for sample in simulation.samples} <= set(simulation.task.labels)
    assert len({sample.target for sample in simulation.samples}) > 6


@pytest.mark.parametrize("config", [KEYWORDS, CATEGORY])
def test_oracle_is_right(config: SimulationConfig) -> None:
    for split in splits_of(config.task):
        simulation = simulate(config, split)
        golds = [str(sample.target) for sample in simulation.samples]
        oracle = [simulation.oracle["mode"][sample.id] for sample in simulation.samples]
        metrics = [get_metric(name, labels=simulation.task.labels) for name in simulation.task.metrics]
        assert {metric.score(oracle, golds) for metric in metrics} == {1}


def test_seed_determines_everything_and_users_do_not_depend_on_their_number() -> None:
    few = SimulationConfig(task="taste-keywords", users=3, dev_users=3, max_items=9)
    more = SimulationConfig(task="taste-keywords", users=5, dev_users=5, max_items=9)
    other = SimulationConfig(task="taste-keywords", users=3, dev_users=3, max_items=9, seed=1)
    for split in splits_of("taste-keywords"):
        samples = simulate(few, split).samples
        assert simulate(few, split).samples == samples == simulate(more, split).samples[: len(samples)]
        assert simulate(other, split).samples != samples


def test_written_splits_read_back_equal_with_their_pictures(tmp_path: Path) -> None:
    config = SimulationConfig(task="taste-keywords", users=3, dev_users=2, max_items=9)
    write_simulation(config, tmp_path / "d")
    for split in splits_of("taste-keywords"):
        folder, name = (tmp_path / "d-asked", "dev") if split == "asked" else (tmp_path / "d", split)
        simulation, reader = simulate(config, split), open_dataset(folder, name)
        assert tuple(reader) == simulation.samples
        assert reader.task == simulation.task
    assert json.loads((tmp_path / "d" / "task.json").read_text())["image_field"] == "picture"
    files = {path.stem for path in (tmp_path / "d" / "pictures").iterdir()}
    samples = (*simulate(config, "train").samples, *simulate(config, "dev").samples)
    assert files == {picture.digest.hex() for picture in pictures_of(samples)}
