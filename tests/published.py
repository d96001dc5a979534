"""One small record of each published benchmark format, with invented texts, and helpers to write and compare them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from personaplug.data.benchmarks.personal_llm import REWARD_MODELS
from personaplug.data.records import Sample

SECRET = "zanzibar"


def write(path: Path, values: Any) -> Path:
    """Write a value as JSON, or the values of a list one per line if the name contains .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ".jsonl" in path.name
    text = "".join(json.dumps(value) + "\n" for value in values) if lines else json.dumps(values)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def shape(samples: list[Sample]) -> list[tuple[str, list[str]]]:
    return [(sample.id, [item.id for item in sample.history]) for sample in samples]


# ---- a small record of each format


def question(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": f"How do I feed {SECRET} {number}?",
        "narrative": "I keep it on a balcony.",
        "category": "pets",
        "profile": [{"id": f"p{index}", "text": f"post {index}", "category": "pets"} for index in (1, 2, 3)],
        "rubric_aspects": [{"aspect": "space", "reason": "small home", "evidence": "balcony"}, {"aspect": "cost"}],
        **changes,
    }


def paper(number: int, **changes: Any) -> dict[str, Any]:
    profile = [
        {"id": f"a{year}", "title": f"Title {year}", "abstract": f"Text {year}", "year": year} for year in (2003, 2001)
    ]
    return {"name": f"author {number}", "input": f"Abstract of {SECRET} {number}", "output": f"Text {number}",
            "profile": profile, **changes}  # fmt: skip


def review(number: int) -> dict[str, Any]:
    profile = [{"description": "kettle", "overall": "4.0", "summary": "fine", "reviewText": "It boils."}]
    return {"reviewerId": f"R{number}", "input": "Review a pan", "output": "It fries.", "profile": profile}


def post(number: int) -> dict[str, Any]:
    profile = [{"author": "me", "content": "A long tale.", "id": "t1", "summary": "A tale"}]
    return {"author": f"u{number}", "input": "Post on rain", "output": "It rained.", "profile": profile}


def labelled(label: str | list[str] = "odd", **changes: Any) -> dict[str, Any]:
    return {"text": f"{SECRET} is {label}", "label": [label] if isinstance(label, str) else label, **changes}


def users() -> dict[str, Any]:
    train = {f"t{number}": labelled("odd" if number % 2 else "even") for number in range(1, 4)}
    return {
        "7": {"train": train, "val": {"v1": labelled("odd")}, "test": {"s1": labelled("even")}},
        "9": {"train": {"t1": labelled("even")}, "val": {}, "test": {"s1": labelled("odd")}},
    }


def choice(number: int, **changes: Any) -> dict[str, Any]:
    """Return a row in which reward model m gives response 1 + (m + row) % 8 the best score."""
    row: dict[str, Any] = {"prompt_id": number, "prompt": f"Tell of {SECRET} {number}"}
    for index in range(8):
        row[f"response_{index + 1}"] = f"answer {index + 1} to {number}"
        row[f"response_{index + 1}_model"] = "some-model"
        for model, name in enumerate(sorted(REWARD_MODELS)):
            mean, deviation = REWARD_MODELS[name]
            row[f"response_{index + 1}_{name}"] = mean + deviation * (5.0 if index == (model + number) % 8 else 0.0)
    return {**row, **changes}
