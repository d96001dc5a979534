"""The calculations of `benchmarks/concepts.py`, on a small database and with the toy model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import concepts as script
import numpy as np
import pytest
from PIL import Image

from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem
from personaplug.encoders.concepts import Concept, Nearest
from personaplug.encoders.pictures import PixelEncoder
from personaplug.llm.causal_lm import CausalLM

COLORS = {"bo": ("red", "white"), "mo": ("blue", "yellow"), "tea": ("green", "black")}


def published(folder: Path) -> Path:
    """Write a database in RAP's form, with a question on each concept."""
    (folder / "example_database").mkdir()
    (folder / "eval").mkdir()
    for name, (color, dot) in COLORS.items():
        image = Image.new("RGB", (60, 40), color)
        image.paste(dot, (10, 10, 30, 30))
        image.save(folder / "example_database" / f"{name}.png")
    database = {
        f"<{name}>": {
            "name": name,
            "image": f"example_database/{name}.png",
            "info": f"It is {color}.",
            "category": "cup",
        }
        for name, (color, _) in COLORS.items()
    }
    options = {"A": "Yes", "B": "No"}
    questions = {
        name: {
            str(number): {"question": f"Is sks {color}?", "option": options, "correct_answer": answer}
            for number, (color, answer) in enumerate([(COLORS[name][0], "A"), ("pink", "B")])
        }
        for name in COLORS
    }
    (folder / "example_database" / "database.json").write_text(json.dumps({"concept_dict": database}))
    (folder / "eval" / "yollava-text-only-qa.json").write_text(json.dumps(questions))
    return folder


def shown(cosine: float, without: float, *, concept: int = 0, is_near: bool = True) -> script.Shown:
    """Return a view of one of two concepts."""
    both = [Concept(HistoryItem(name, ()), row, name) for row, name in enumerate(("bo", "mo"))]
    own, other = both[concept], both[1 - concept]
    return script.Shown(concept, Nearest(own if is_near else other, cosine, 0.1), Nearest(other, without, 0.1))


def test_whole_measurement_runs_on_a_small_database(toy: CausalLM, tmp_path: Path) -> None:
    result = script.measure(published(tmp_path), llm=toy, encoder=PixelEncoder(), count=3, seed=0)
    assert result["concepts"] == [*COLORS]
    pixels = result["recognition"]["pixels"]
    assert pixels["accuracy"] > 0.8  # the three pictures have other colors
    assert pixels["mean_cosine"] > 0.5 > pixels["mean_cosine_without"]
    rows = result["text_questions"]["accuracy"]
    assert set(rows) >= {"plain", "facts of the mentioned concept", "facts of another concept", "facts of all concepts"}
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert result["recognition_asked_of_the_model"]["names"]["chance"]["accuracy"] == pytest.approx(1 / 3, abs=1e-3)


def test_views_depend_on_the_seed_alone() -> None:
    file = io.BytesIO()
    Image.radial_gradient("L").save(file, "PNG")
    picture = Picture(file.getvalue())
    first, again, other = (script.views(picture, count=2, seed=[seed, 0]) for seed in (0, 0, 1))
    assert first == again
    assert len({*first, *other}) == 4


def test_threshold_of_a_concept_comes_from_views_of_the_others() -> None:
    of_bo = [shown(0.9, 0.5), shown(0.8, 0.6), shown(0.65, 0.4)]
    of_mo = [shown(0.9, 0.7, concept=1), shown(0.95, 0.5, concept=1, is_near=False)]
    assert script.threshold_of(of_bo) == pytest.approx(0.625)  # the middle of the gap
    assert script.thresholds_of([*of_bo, *of_mo], concepts=2) == pytest.approx([0.8, 0.625])
    result = script.recognition([*of_bo, *of_mo], concepts=2)
    assert result["positive_recall"] == 0.6  # .9 and .8 of three views of bo, one of two views of mo
    assert result["negative_recall"] == 0.8  # a view that is nearest to another concept is no hit, but a mistake
    assert result["unknown_refused"] == 0.8


def test_area_under_the_curve_counts_ties_as_half() -> None:
    assert script._auc([1.0, 2.0], [1.0, 0.0]) == pytest.approx(0.875)
    assert np.isclose(script._auc([0.0], [1.0]), 0.0)
