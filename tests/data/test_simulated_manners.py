"""Simulated users with manners: dev has new users, combinations and topics, and the oracle has every manner."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from personaplug.analysis.metrics import MANNER_METRICS, get_metric
from personaplug.data import open_dataset
from personaplug.data.contractions import read_contractions
from personaplug.data.manner_wording import INSTRUCTIONS
from personaplug.data.manners import DIMENSIONS, Manners, read_manners, share_met
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulated_manners import all_topics
from personaplug.data.simulation import Simulation, SimulationConfig, simulate, splits_of, write_simulation
from personaplug.errors import ConfigError

CONFIG = SimulationConfig(task="manners", users=150, dev_users=80)
INSTRUCTED = tuple(f"instructed-{name}" for name in INSTRUCTIONS)
TOPIC_OF = {ask: topic.name for topic in all_topics() for ask in topic.asks}


@pytest.fixture(scope="module")
def train() -> Simulation:
    return simulate(CONFIG, "train")


@pytest.fixture(scope="module")
def dev() -> Simulation:
    return simulate(CONFIG, "dev")


def topic_of(text: str) -> str:
    """Return the topic of a question, which an instruction may follow."""
    return next(name for ask, name in TOPIC_OF.items() if text.startswith(ask))


def exchanges(sample: Sample) -> list[HistoryItem]:
    return [item for item in sample.history if item.kind == "answer"]


def preferences(sample: Sample) -> list[HistoryItem]:
    return [item for item in sample.history if item.kind == "preference"]


def manners_of(sample: Sample) -> str:
    """Return all manners that the items of a history show, as one text."""
    manners: dict[str, str] = {}
    for item in exchanges(sample):
        manners |= {name: value for name, value in read_manners(str(item.answer)).items() if value}
    return repr(sorted(manners.items()))


def first_of_users(samples: Sequence[Sample]) -> list[Sample]:
    return list({sample.owner: sample for sample in samples}.values())


def test_topics_are_120_with_sentences_that_rules_can_rewrite() -> None:
    topics = all_topics()
    assert len(topics) == len({topic.name for topic in topics}) == 120
    asks = [ask for topic in topics for ask in topic.asks]
    sentences = [sentence for topic in topics for sentence in topic.sentences]
    assert len(set(asks)) == len(asks)
    assert len(set(sentences)) == len(sentences) == 480
    assert all(5 <= len(ask.split()) <= 20 for ask in asks)
    assert not [one for one in asks if any(other != one and other.startswith(one) for other in asks)]
    for sentence in sentences:
        assert 6 <= len(sentence.split()) <= 14
        assert read_contractions(sentence) != "short"
        neutral = Manners("one").apply([sentence])
        assert read_manners(sentence) == {**read_manners(neutral), "length": "one", "casing": "normal"}
    first = [read_contractions(topic.sentences[0]) for topic in topics]
    assert first.count("full") > 0.95 * len(topics)


def test_oracle_meets_every_manner(train: Simulation, dev: Simulation) -> None:
    for simulation in (train, dev, *(simulate(CONFIG, split) for split in INSTRUCTED)):
        golds = [str(sample.target) for sample in simulation.samples]
        oracle = [simulation.oracle["mode"][sample.id] for sample in simulation.samples]
        assert simulation.expected == {"mode": {"manners": 1.0, "rouge_1": 1.0}}
        scores = {name: get_metric(name).score(oracle, golds) for name in simulation.task.metrics}
        assert set(scores.values()) == {1.0}


def test_dev_has_new_users_combinations_and_topics(train: Simulation, dev: Simulation) -> None:
    assert (len(train.samples), len(dev.samples)) == (600, 160)
    assert {sample.user_id for sample in train.samples}.isdisjoint(sample.user_id for sample in dev.samples)
    seen, new = ({manners_of(sample) for sample in each.samples} for each in (train, dev))
    assert len(new) > 60
    assert seen.isdisjoint(new)
    asked, unseen = ({topic_of(sample.prompt) for sample in each.samples} for each in (train, dev))
    assert len(unseen) > 30
    assert asked.isdisjoint(unseen)


def test_answers_have_the_manners_of_the_users_history(dev: Simulation) -> None:
    samples = dev.samples
    own = [share_met(str(exchanges(sample)[0].answer), str(sample.target)) for sample in samples]
    other = [
        share_met(str(exchanges(stranger)[0].answer), str(sample.target))
        for sample, stranger in zip(samples, samples[2:] + samples[:2], strict=True)
    ]
    assert sum(own) / len(own) > 0.97  # a few items show no contraction
    assert sum(other) / len(other) < 0.5


def test_history_never_has_the_topic_of_a_question(train: Simulation, dev: Simulation) -> None:
    for sample in (*train.samples, *dev.samples, *(s for name in INSTRUCTED for s in simulate(CONFIG, name).samples)):
        topics = [topic_of(item.fields[0][1]) for item in exchanges(sample)]
        context = [topic_of(text) for role, text in sample.context if role == "user"]
        assert 8 <= len(topics) <= 30
        assert len({*topics, *context, topic_of(sample.prompt)}) == len(topics) + len(context) + 1


def test_a_third_of_users_state_no_preference_and_the_others_one_to_all(train: Simulation) -> None:
    users = first_of_users(train.samples)
    counts = [len(preferences(sample)) for sample in users]
    assert 0.25 < counts.count(0) / len(counts) < 0.42
    assert set(range(9)) == set(counts)
    places = [sample.history.index(item) / len(sample.history) for sample in users for item in preferences(sample)]
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_a_tenth_of_the_questions_in_a_history_have_a_rejected_answer_first(train: Simulation, dev: Simulation) -> None:
    for samples in (train.samples, dev.samples):
        histories = [sample.history for sample in first_of_users(samples)]
        pairs = [(item, later) for history in histories for item, later in itertools.pairwise(history)]
        rejected = [(item, later) for item, later in pairs if item.kind == "rejection"]
        kept = sum(item.kind == "answer" for history in histories for item in history)
        assert 0.05 < len(rejected) / kept < 0.15
        for item, later in rejected:
            if later.kind == "answer":  # there is no preference between them
                assert item.fields[0] == later.fields[0]
                assert share_met(item.answer_text or "", later.answer_text or "") < 1


def test_some_train_prompts_have_an_instruction_some_a_context_and_all_a_rejected_answer(train: Simulation) -> None:
    samples = train.samples
    wordings = {wording for each in INSTRUCTIONS.values() for wording in each.wordings[:-1]}
    instructed = [sample for sample in samples if sample.prompt not in TOPIC_OF]
    assert 0.06 < len(instructed) / len(samples) < 0.14
    assert all(any(sample.prompt.endswith(f" {wording}") for wording in wordings) for sample in instructed)
    contexts = [sample.context for sample in samples if sample.context]
    assert 0.06 < len(contexts) / len(samples) < 0.14
    assert {tuple(role for role, _ in context) for context in contexts} == {("system",), ("user", "assistant")}
    assert all(sample.rejected and sample.rejected[0] != sample.target for sample in samples)


def test_dev_prompts_have_no_instruction_context_or_rejected_answer(dev: Simulation) -> None:
    assert all(sample.prompt in TOPIC_OF and not sample.context and not sample.rejected for sample in dev.samples)


@pytest.mark.parametrize("split", INSTRUCTED)
def test_instruction_overrides_one_manner_of_the_same_dev_user(split: str, dev: Simulation) -> None:
    dimension = split.removeprefix("instructed-")
    instruction = INSTRUCTIONS[dimension]
    plain = {sample.owner: sample for sample in reversed(dev.samples)}
    samples = simulate(CONFIG, split).samples
    assert len(samples) > 25
    for sample in samples:
        before = plain[sample.owner]
        assert sample.history == before.history
        assert sample.prompt == f"{before.prompt} {instruction.wordings[-1]}"
        asked, kept = read_manners(str(sample.target)), read_manners(str(before.target))
        assert asked[dimension] == instruction.values[dimension] != kept[dimension]
        others = set(kept) - {"length", "layout", "contractions"} - {dimension}
        assert {name: asked[name] for name in others} == {name: kept[name] for name in others}


def test_seed_determines_everything() -> None:
    few, more = (SimulationConfig(task="manners", users=count, dev_users=count) for count in (5, 8))
    other = SimulationConfig(task="manners", users=5, dev_users=5, seed=1)
    for split in splits_of("manners"):
        first, again = simulate(few, split), simulate(few, split)
        assert (first.samples, first.oracle) == (again.samples, again.oracle)
        assert simulate(more, split).samples[: len(first.samples)] == first.samples
        assert simulate(other, split).samples != first.samples


def test_cold_users_may_still_state_preferences() -> None:
    samples = simulate(SimulationConfig(task="manners", users=40, min_items=0, max_items=0), "train").samples
    assert not any(exchanges(sample) for sample in samples)
    assert any(preferences(sample) for sample in samples)


def test_written_splits_read_back_equal(tmp_path: Path) -> None:
    config = SimulationConfig(task="manners", users=12, dev_users=12)
    write_simulation(config, tmp_path / "d")
    folders = {name: (tmp_path / f"d-{name}", "dev") for name in (*INSTRUCTED, "closed")}
    for split in splits_of("manners"):
        folder, name = folders.get(split, (tmp_path / "d", split))
        simulation, reader = simulate(config, split), open_dataset(folder, name)
        assert tuple(reader) == simulation.samples
        assert reader.task == simulation.task
        oracle = json.loads((folder / f"{name}_oracle.json").read_text())
        assert {gold["id"]: gold["output"] for gold in oracle["golds"]} == simulation.oracle["mode"]


def test_instructed_split_without_samples_is_not_written(tmp_path: Path) -> None:
    write_simulation(SimulationConfig(task="manners", users=1, dev_users=1), tmp_path / "d")
    always = {"d", "d-closed"}
    assert always < {path.name for path in tmp_path.iterdir()} < always | {f"d-{name}" for name in INSTRUCTED}


def test_closed_questions_are_asked_of_the_dev_users_with_their_histories(dev: Simulation) -> None:
    closed = simulate(CONFIG, "closed").samples
    histories = {sample.user_id: sample.history for sample in dev.samples}
    assert {sample.user_id: sample.history for sample in closed} == histories
    assert len({sample.id.rpartition("-")[2] for sample in closed if sample.user_id == closed[0].user_id}) == 5
    assert all(sample.rejected and sample.target not in sample.rejected for sample in closed)


def test_history_longer_than_the_topics_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^max_items should be at most 40 together"):
        SimulationConfig(task="manners", max_items=37)


def test_users_differ_only_in_the_named_manners() -> None:
    differing = ("length", "layout", "emoji", "greeting")
    few = simulate(replace(CONFIG, differing=differing), "train")
    answers = [read_manners(str(item.answer)) for sample in few.samples for item in exchanges(sample)]
    values = {name: {each[name] for each in answers if each[name]} for name in DIMENSIONS}
    assert {name for name in DIMENSIONS if len(values[name]) > 1} == set(differing)


@pytest.mark.parametrize("differing", [("length", "casing"), ("emoji", "length", "layout", "casing"), ("tone",) * 4])
def test_too_few_unordered_or_unknown_manners_are_refused(differing: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^differing should be 4 or more of length, .*, in this order, found"):
        SimulationConfig(task="manners", differing=differing)


def test_each_manner_has_a_metric_and_obedience_is_the_main_one(dev: Simulation) -> None:
    assert dev.task.metrics == ("manners", "rouge_1", *(metric.name for metric in MANNER_METRICS))
    assert simulate(CONFIG, "instructed-emoji").task.metrics == ("manners_emoji", "manners")


def test_closed_share_replaces_train_questions_only() -> None:
    plain, mixed = (simulate(replace(CONFIG, closed_share=share), "train").samples for share in (0.0, 0.5))
    pairs = [(before, after) for before, after in zip(plain, mixed, strict=True) if before != after]
    assert 0.3 < len(pairs) / len(plain) < 0.7
    assert all((before.id, before.history) == (after.id, after.history) for before, after in pairs)
    assert all(after.rejected and after.target not in after.rejected for _, after in pairs)
    sums = [re.match(r"What is (\d+) (plus|minus) (\d+)\?", after.prompt) for _, after in pairs]
    for (_, after), numbers in zip(pairs, sums, strict=True):
        if numbers:
            left, right = int(numbers[1]), int(numbers[3])
            assert after.target == str(left + right if numbers[2] == "plus" else left - right)
    assert 0.2 < sum(map(bool, sums)) / len(pairs) < 0.5
    assert not any("alphabetical" in after.prompt or "come from" in after.prompt for _, after in pairs)
    assert simulate(replace(CONFIG, closed_share=0.5), "dev") == simulate(CONFIG, "dev")


@pytest.mark.parametrize(("task", "share"), [("manners", 1.0), ("manners", -0.1), ("rating", 0.2)])
def test_rejects_a_closed_share_out_of_range(task: Any, share: float) -> None:
    with pytest.raises(ConfigError, match="closed_share should be a share from 0 to below 1"):
        SimulationConfig(task, closed_share=share)
