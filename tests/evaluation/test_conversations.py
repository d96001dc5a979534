"""Rows on conversations, end to end with toy models: the prompts of each row, and choice metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaplug.analysis.tables import results_table
from personaplug.config_parsing import load_config
from personaplug.data import open_dataset
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.records import Chat, HistoryItem, Prompt, Sample, Turn, turns_of
from personaplug.data.task_registry import CHAT
from personaplug.evaluation.evaluator import evaluate
from personaplug.llm.base import PromptBatch
from personaplug.methods import find_method, needed_parts, parse_methods
from personaplug.methods.base import ModelInputs
from personaplug.methods.context import EvalContext
from personaplug.run import Run, open_models
from personaplug.training.parts import train

WORDS = ("tea", "rain", "cats", "bread")
USERS = ("ann", "bob", "cid")
SETTINGS = [
    *("llm=toy", "encoder=hash:32", "dtype=float32", "max_prompt_tokens=400", "batch_size=4", "epochs=1"),
    *("resamples=200", "evaluation_batch_size=4", "num_beams=1", "max_new_tokens=3", "profile_tokens=8"),
]
ROWS = "plain,stated,stated@wrong-user,bm25:2,bm25:2@wrong-user,stated+bm25:1,profile,plug,wrong-user,plug+bm25:1"


def _item(user: str, kind: Any, word: str, *, answer: str) -> HistoryItem:
    fields = (("question", f"What of {word}?"), ("answer", answer))
    return HistoryItem(f"{user}-{kind}-{word}", fields, "answer", kind=kind)


def _preference(user: str, text: str) -> HistoryItem:
    return HistoryItem(f"{user}-{text}", (("preference", text),), kind="preference")


def _history(user: str) -> tuple[HistoryItem, ...]:
    return (
        *(_item(user, "answer", word, answer=f"{user} likes {word}") for word in WORDS[:3]),
        _item(user, "rejection", "tea", answer=f"{user} hates tea"),
        _preference(user, f"I am {user}"),
        _item(user, "answer", "bread", answer=f"{user} likes bread"),
        _preference(user, f"{user} is brief"),
    )


def _sample(user: str, word: str) -> Sample:
    prompt = f"And what of {word}?"
    context: tuple[Turn, ...] = (("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"))
    rejected = {"tea": ("no", "never ever"), "rain": ("nothing",), "cats": ()}[word]
    context = context if word != "rain" else ()
    return Sample(
        *(f"{user}-{word}", user, prompt, prompt, f"{user} likes {word}"),
        history=_history(user),
        context=context,
        rejected=rejected,
    )


class Stage:
    """A run that was trained on conversations, and its evaluations."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        for split in ("train", "dev"):
            samples = [_sample(user, word) for user in USERS for word in WORDS[:3]]
            write_lamp(samples, self.data, split, task=CHAT)
        self.config = load_config(overrides=SETTINGS)
        self.run = Run.create(folder / "run", config=self.config, task=CHAT)
        self.models = open_models(self.config)
        parts = needed_parts(parse_methods(f"{ROWS},plug+copy-head"))
        train(self.run, open_dataset(self.data, "train"), models=self.models, parts=parts)

    def evaluate(self, rows: str, *settings: str) -> Any:
        return evaluate(
            self.run,
            open_dataset(self.data, "dev"),
            split="dev",
            methods=parse_methods(rows),
            config=load_config(overrides=settings, base=self.config).evaluation,
            models=self.models,
        )

    def context(self, *settings: str) -> EvalContext:
        config = load_config(overrides=settings, base=self.config).evaluation
        return EvalContext(self.run, open_dataset(self.data, "dev"), models=self.models, config=config)

    def inputs(self, row: str, *settings: str) -> ModelInputs:
        context, method = self.context(*settings), find_method(row)
        return method.build_inputs(context, context.assign(method.info.history, seed=0), seed=0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("chats"))


def _system(prompt: Prompt) -> str:
    return "".join(text for role, text in turns_of(prompt) if role == "system")


def _exchange(user: str, word: str) -> tuple[Turn, Turn]:
    return ("user", f"What of {word}?"), ("assistant", f"{user} likes {word}")


def _source(inputs: ModelInputs, index: int) -> str:
    """Return the user whose history a sample uses."""
    source = inputs.assignments[index].source
    assert source is not None
    return str(inputs.samples[source].user_id)


@pytest.mark.parametrize("row", ["stated", "stated@wrong-user"])
def test_stated_row_adds_only_preferences_to_the_prompt(stage: Stage, row: str) -> None:
    inputs, plain = stage.inputs(row), stage.inputs("plain")
    for index, (sample, bare) in enumerate(zip(inputs.samples, plain.samples, strict=True)):
        user = _source(inputs, index)
        assert (user == sample.user_id) == (row == "stated")
        stated = f"The user has said: I am {user}. {user} is brief."
        own = turns_of(bare.prompt)
        system = ("system", f"Be kind.\n\n{stated}") if own[0][0] == "system" else ("system", stated)
        assert sample.prompt == Chat((system, *(turn for turn in own if turn[0] != "system")))
    assert inputs.items_used == [2] * len(inputs.samples)
    assert inputs.cut_items_rate == 0


@pytest.mark.parametrize("row", ["bm25:2", "bm25:2@wrong-user"])
def test_retrieved_exchanges_are_accepted_answers_before_the_context(stage: Stage, row: str) -> None:
    inputs, plain = stage.inputs(row), stage.inputs("plain")
    for index, (sample, bare) in enumerate(zip(inputs.samples, plain.samples, strict=True)):
        user, word = _source(inputs, index), sample.id.split("-")[1]
        own = turns_of(bare.prompt)
        start = int(own[0][0] == "system")
        turns = turns_of(sample.prompt)
        exchange = turns[start : len(turns) - len(own) + start]
        assert (*turns[:start], *turns[start + len(exchange) :]) == own
        assert len(exchange) == 4
        # If scores are equal, the later item ranks higher. The best item comes last.
        assert exchange[2:] == (_exchange(user, f"{word}") if word in WORDS else ())
        assert all(text.startswith(("What of", f"{user} likes")) for _, text in exchange)
        assert _system(sample.prompt) == _system(bare.prompt)


def test_stated_and_retrieved_texts_are_combined(stage: Stage) -> None:
    inputs = stage.inputs("stated+bm25:1")
    sample = inputs.samples[0]
    assert sample.id == "ann-tea"
    assert sample.prompt == Chat(
        (
            ("system", "Be kind.\n\nThe user has said: I am ann. ann is brief."),
            *_exchange("ann", "tea"),
            ("user", "Hello"),
            ("assistant", "Hi"),
            ("user", "And what of tea?"),
        )
    )
    assert inputs.items_used == [3] * len(inputs.samples)


def test_profile_is_written_into_the_system_message(stage: Stage) -> None:
    for sample in stage.inputs("profile").samples:
        assert "About this user: " in _system(sample.prompt) or not _system(sample.prompt).removeprefix("Be kind.")


def test_training_prompts_with_exchanges_include_their_context(stage: Stage) -> None:
    from personaplug.training.trainings import Trainings

    trainings = Trainings(stage.run, open_dataset(stage.data, "train"), models=stage.models)
    retrieval = find_method("plug+bm25:1").requires[0].retrieval  # type: ignore[attr-defined]
    samples = trainings.samples_for(stage.run.config.plug, retrieval=retrieval, seed=0)
    assert samples[0].prompt == stage.inputs("plug+bm25:1").samples[0].prompt
    turns = turns_of(samples[0].prompt)
    assert turns[0] == ("system", "Be kind.")
    assert turns[1:3] == _exchange("ann", "tea")
    assert turns[3:] == (("user", "Hello"), ("assistant", "Hi"), ("user", "And what of tea?"))


@pytest.mark.parametrize(
    ("kinds", "items", "stated", "retrieved"), [("answers", 5, 0, 2), ("preferences", 2, 2, 0), ("all", 7, 2, 2)]
)
def test_item_kinds_setting_applies_to_every_row(
    stage: Stage, kinds: str, items: int, stated: int, retrieved: int
) -> None:
    setting = f"item_kinds={kinds}"
    count = len(stage.context().samples)
    assert stage.inputs("plug", setting).items_used == [items] * count
    assert stage.inputs("wrong-user", setting).items_used == [items] * count
    assert stage.inputs("stated", setting).items_used == [stated] * count
    assert stage.inputs("bm25:2", setting).items_used == [retrieved] * count
    assert stage.inputs("user-words", setting).items_used == [items] * count


def test_choice_and_margin_match_the_losses_of_the_model(stage: Stage) -> None:
    results = stage.evaluate(ROWS)
    llm = stage.models.llm
    for name in ("plain", "stated", "bm25:2@wrong-user"):
        hits, leads = [], []
        for sample in stage.inputs(name).samples:
            answers = [sample.target or "", *sample.rejected]
            losses, tokens = llm.loss(PromptBatch([sample.prompt] * len(answers)), answers)
            right, *rejected = (-losses / tokens).tolist()
            if rejected:
                hits.append(right > max(rejected))
                leads.append(right - max(rejected))
        row = results.by_name[name]
        assert len(hits) == 6, "samples without rejected answers do not count"
        assert row.metrics["choice"] == pytest.approx(np.mean(hits))
        assert row.metrics["margin"] == pytest.approx(np.mean(leads), abs=1e-4)
    for row in results.rows:
        assert list(row.metrics)[: len(CHAT.metrics) + 3] == [*CHAT.metrics, "nll", "choice", "margin"]
    gains = {pair.metric for pair in results.pairs if (pair.a, pair.b) == ("stated", "stated@wrong-user")}
    assert gains >= {"nll", "choice", "margin"}
    assert all(0 < (pair.p or 0) <= 1 for pair in results.pairs if pair.metric == "margin")
    table = results_table(results)
    assert "choice ↑" in table
    assert "margin ↑" in table
    assert "likelier per token than every rejected answer" in table


@pytest.fixture
def neutral(stage: Stage) -> Iterator[Stage]:
    """The stage with the divergence from the plain model as an additional metric."""
    run = stage.run
    stage.run = run.asked(replace(CHAT, metrics=("rouge_1", "divergence")))
    yield stage
    stage.run = run


def _divergences(stage: Stage, rows: str, *settings: str) -> dict[str, float]:
    results = stage.evaluate(rows, *settings)
    return {row.method.name: row.metrics["divergence"] for row in results.rows}


def test_divergence_is_zero_only_for_the_plain_model_and_scale_0(neutral: Stage) -> None:
    rows = "plain,stated,bm25:2,plug,wrong-user,plug+bm25:1"
    divergences = _divergences(neutral, rows)
    assert list(divergences) == rows.split(",")
    assert divergences.pop("plain") == 0
    assert min(divergences.values()) > 0
    scaled = [_divergences(neutral, "plug", f"persona_scale={scale}")["plug"] for scale in (0, 0.5)]
    assert scaled[0] == 0
    assert 0 < scaled[1] != divergences["plug"]


def test_divergence_is_cached_and_rows_without_it_are_reported(neutral: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    results = neutral.evaluate("plain,plug,plug+copy-head")
    assert "divergence" not in results.by_name["plug+copy-head"].metrics
    assert "divergence: missing for plug+copy-head." in results.about.notes
    assert "divergence ↓" in results_table(results)
    path = neutral.run.folder / "evaluations" / "dev" / "plug.seed-0"
    scores = json.loads(Path(f"{path}.scores.json").read_text())
    cached = json.loads(Path(f"{path}.predictions.json").read_text())["divergence"]
    assert [line["divergence"] for line in scores] == pytest.approx([total / tokens for total, tokens in cached])
    monkeypatch.setattr(neutral.models.llm, "divergence", None)
    again = neutral.evaluate("plain,plug")
    assert again.by_name["plug"].metrics == results.by_name["plug"].metrics


def test_likelihoods_of_each_sample_are_cached(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stage.evaluate("stated")
    path = stage.run.folder / "evaluations" / "dev" / "stated.seed-0"
    scores = json.loads(Path(f"{path}.scores.json").read_text())
    assert {"nll", "choice", "margin"} <= scores[0].keys()
    assert [line["choice"] is None for line in scores] == [line["id"].endswith("cats") for line in scores]
    cached = json.loads(Path(f"{path}.predictions.json").read_text())["nll"]
    assert [len(row) for row in cached[:3]] == [6, 4, 2]
    monkeypatch.setattr(stage.models.llm, "loss", None)
    again = stage.evaluate("stated")
    assert again.by_name["stated"].metrics == first.by_name["stated"].metrics


def test_results_record_the_item_kinds_setting(stage: Stage) -> None:
    assert "items shown preferences" in results_table(stage.evaluate("plain,stated", "item_kinds=preferences"))
    assert "items shown" not in results_table(stage.evaluate("plain,stated"))


def test_rows_with_a_suffix_plug_compute_each_conversation_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    states, read = stage.models.llm.prompt_states, list[tuple[int, ...]]()
    states.clear()
    real = states.compute

    def recorded(rows: Sequence[tuple[int, ...]]) -> Any:
        read.extend(rows)
        return real(rows)

    monkeypatch.setattr(states, "compute", recorded)
    for path in (stage.run.folder / "evaluations" / "dev").glob("*.predictions.json"):
        path.unlink()
    stage.evaluate("plug,wrong-user,shuffled")
    prompts = {stage.models.llm.prompt_tokenizer.encode_prompt(s.prompt).ids for s in stage.context().samples}
    assert sorted(read) == sorted(prompts)
