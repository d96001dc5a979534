"""LoRA adapters: attaching and detaching, sums of adapters, training and storage of users' adapters."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, small_llm
from torch import Tensor, nn

from personaplug.baselines.lora import TASK, LoraAdapters
from personaplug.baselines.user_lora import (
    FREE_PROMPT,
    Pair,
    UserCosts,
    UserLoraStore,
    fit_user,
    has_history_pairs,
    history_pairs,
    without_evaluated_items,
)
from personaplug.config import AdapterConfig
from personaplug.data import LAMP_TASKS
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingExtra, PersonaPlugError, ShapeMismatch, TrainingDiverged, UserError
from personaplug.infra.checksums import read_json
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import load_tiny_llm

CONFIG = AdapterConfig(lora_rank=2, lora_targets="auto", lora_learning_rate=3e-2, user_epochs=3)
PROMPTS = ["a", "What does this user think of long films?"]
TARGETS = ["n", "maybe so"]
SECRET = "zanzibar"  # part of user texts; must not be in error messages


def pairs_of(user: str, *, count: int = 6) -> list[Pair]:
    return [(f"{user} sees film {number}", f"{user}{number % 2}") for number in range(count)]


def losses(llm: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = llm.loss(PromptBatch(PROMPTS), TARGETS)[0]
    return values


def answers(llm: Any) -> list[Any]:
    config = GenerationConfig(max_new_tokens=4)
    return [losses(llm), llm.score(PromptBatch(PROMPTS), ["yes", "no"])] + [
        generation.text for generation in llm.generate(PromptBatch(PROMPTS), config)
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def snapshot(model: nn.Module) -> list[Any]:
    """Return everything that attaching could change: modules, weights, attributes and modes, in order."""
    return [
        [(path, type(module).__name__, module.training) for path, module in model.named_modules()],
        [(path, hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()) for path, p in model.named_parameters()],
        [(path, p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)],
        sorted(vars(model)),
    ]


def base_weights(model: nn.Module) -> dict[str, str]:
    return {
        path: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for path, p in model.named_parameters()
        if "lora_" not in path
    }


def randomize(adapters: LoraAdapters, name: str, *, size: float = 0.3) -> None:
    """Give an adapter random weights that change the model's outputs."""
    generator = torch.Generator().manual_seed(["task", "user"].index(name))
    adapters.load(
        name, {path: size * torch.randn(v.shape, generator=generator) for path, v in adapters.state(name).items()}
    )


def count_parameters(adapters: LoraAdapters) -> int:
    return sum(value.numel() for value in adapters.state("user").values())


@pytest.fixture
def llm() -> Any:
    return load_tiny_llm()


@pytest.fixture
def adapters(llm: Any) -> Iterator[LoraAdapters]:
    with LoraAdapters.attach(llm, config=CONFIG) as attached:
        yield attached


# ---- attaching and detaching


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_detach_restores_the_model_after_training(family: str) -> None:
    llm = small_llm(family)
    before, expected_outputs = snapshot(llm.model), answers(llm)
    random = torch.random.get_rng_state()
    adapters = LoraAdapters.attach(llm, config=CONFIG)
    assert torch.equal(random, torch.random.get_rng_state())
    randomize(adapters, "task")
    assert fit_user(adapters, llm, pairs_of("u"), config=CONFIG, seed=0).steps == 6
    assert same(expected_outputs, answers(llm))  # no adapter is active outside a block
    adapters.detach()
    assert snapshot(llm.model) == before
    assert same(expected_outputs, answers(llm))
    adapters.detach()  # a second call has no effect
    LoraAdapters.attach(llm, config=CONFIG).detach()
    assert snapshot(llm.model) == before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fresh_adapters_change_nothing_but_trained_ones_do(family: str) -> None:
    llm = small_llm(family)
    expected_outputs = answers(llm)
    with LoraAdapters.attach(llm, config=CONFIG) as adapters:
        with adapters.active("task", "user"):
            assert same(expected_outputs, answers(llm))
        randomize(adapters, "user")
        with adapters.active("user"):
            assert not torch.isclose(losses(llm), expected_outputs[0]).any()


@pytest.mark.parametrize(
    ("family", "layers", "count"),
    [("llama", "q_proj,v_proj", 4), ("qwen", "self_attn.q_proj , down_proj", 4), ("gpt2", "c_attn", 2),
     ("neox", "query_key_value", 2), ("t5", "q,v", 12), ("gpt2", "auto", 2), ("t5", "auto", 12), ("neox", "auto", 2)],
)  # fmt: skip
def test_named_layers_get_adapters(family: str, layers: str, count: int, recwarn: pytest.WarningsRecorder) -> None:
    llm = small_llm(family)
    with LoraAdapters.attach(llm, config=replace(CONFIG, lora_targets=layers)) as adapters:
        assert len(adapters.state("user")) == 2 * count
    assert not recwarn.list


def test_exception_in_a_block_detaches_the_adapters(llm: Any) -> None:
    before = snapshot(llm.model)

    def fail() -> None:
        with LoraAdapters.attach(llm, config=CONFIG) as adapters, adapters.active("user"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert snapshot(llm.model) == before


def test_failed_attach_restores_the_model(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(llm.model)
    monkeypatch.setattr(LoraAdapters, "reset", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LoraAdapters.attach(llm, config=CONFIG)
    assert snapshot(llm.model) == before


@pytest.mark.parametrize("layers", ["nose", "q_proj,nose", "lm_head", "proj", ",", "norm"])
def test_error_for_an_unknown_layer_lists_the_models_layers(llm: Any, layers: str) -> None:
    before = snapshot(llm.model)
    with pytest.raises(ConfigError, match=r"down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\."):
        LoraAdapters.attach(llm, config=replace(CONFIG, lora_targets=layers))
    assert snapshot(llm.model) == before


def test_lora_targets_auto_raises_for_an_unknown_type_of_model(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llm.model.config), "model_type", "homemade")
    with pytest.raises(ConfigError, match=r"no default layers for models of type 'homemade'.*q_proj"):
        LoraAdapters.attach(llm, config=CONFIG)


def test_second_attach_raises(llm: Any, adapters: LoraAdapters) -> None:
    with pytest.raises(UserError, match="already"):
        LoraAdapters.attach(llm, config=CONFIG)
    assert len(adapters.state("task")) == 8  # the first adapters still work
    with adapters.active("task"):
        losses(llm)


def test_attach_raises_without_a_transformers_model() -> None:
    nothing: Any = object()
    with pytest.raises(UserError, match="transformers language model"):
        LoraAdapters.attach(nothing, config=CONFIG)


def test_error_without_peft_names_the_extra(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"pip install 'personaplug\[lora\]'"):
        LoraAdapters.attach(llm, config=CONFIG)


# ---- active and trainable adapters


def test_nested_active_blocks_restore_the_outer_adapters(llm: Any, adapters: LoraAdapters) -> None:
    plain = losses(llm)
    randomize(adapters, "task")
    randomize(adapters, "user")
    seen: dict[str, Tensor] = {}
    with adapters.active("task"):
        seen["task"] = losses(llm)
        with adapters.active("task", "user"):
            seen["both"] = losses(llm)
            with adapters.active():
                assert torch.equal(losses(llm), plain)
            with suppress(RuntimeError), adapters.active("user"):
                seen["user"] = losses(llm)
                raise RuntimeError
            assert torch.equal(losses(llm), seen["both"])
        assert torch.equal(losses(llm), seen["task"])
        with adapters.active("task", "task"):  # a repeated name applies once
            assert torch.equal(losses(llm), seen["task"])
    assert torch.equal(losses(llm), plain)
    assert len({tuple(value.tolist()) for value in (plain, *seen.values())}) == 4


def test_two_active_adapters_equal_the_sum_of_their_updates(llm: Any, adapters: LoraAdapters) -> None:
    """Add scale · B·A of both adapters to the layers' matrices by hand (LoRA, section 4.1)."""
    randomize(adapters, "task")
    randomize(adapters, "user")
    with adapters.active("task", "user"):
        together = losses(llm)
    states = [adapters.state("task"), adapters.state("user")]
    adapters.detach()
    for path in {path.partition(".lora_")[0] for path in states[0]}:
        for state in states:
            update = (
                CONFIG.lora_alpha / CONFIG.lora_rank * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
            )
            llm.model.get_submodule(path).weight.data += update
    torch.testing.assert_close(losses(llm), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learner", ["task", "user"])
def test_only_the_trainable_adapter_gets_gradients(llm: Any, adapters: LoraAdapters, learner: str) -> None:
    randomize(adapters, "task")
    randomize(adapters, "user")
    with adapters.active("task", "user"), adapters.trainable(learner):
        llm.loss(PromptBatch(PROMPTS), TARGETS)[0].sum().backward()
    other = {"task": "user", "user": "task"}[learner]
    assert all(p.grad is not None and p.grad.any() for p in adapters.module(learner).parameters())
    assert all(p.grad is None for p in adapters.module(other).parameters())
    assert all(p.grad is None for path, p in llm.model.named_parameters() if "lora_" not in path)


def test_backward_after_an_active_block_gives_gradients(llm: Any, adapters: LoraAdapters) -> None:
    randomize(adapters, "task")
    with adapters.active("task"):
        loss = llm.loss(PromptBatch(PROMPTS), TARGETS)[0].sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.module("task").parameters())
    # Losses outside a block have no gradient.
    assert not llm.loss(PromptBatch(PROMPTS), TARGETS)[0].requires_grad


def test_unknown_or_detached_adapters_raise(llm: Any, adapters: LoraAdapters) -> None:
    with pytest.raises(ConfigError, match="did you mean 'user'"):
        adapters.state("users")
    with pytest.raises(ConfigError), adapters.active("task", "nobody"):
        pass
    adapters.detach()
    with pytest.raises(UserError, match="detached"), adapters.active("user"):
        pass


# ---- states


def test_state_loaded_again_is_bit_identical(adapters: LoraAdapters) -> None:
    randomize(adapters, "user")
    state = adapters.state("user")
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    assert all(map(torch.equal, state.values(), adapters.module("user").parameters()))
    adapters.reset("user", seed=3)
    assert not same(state, adapters.state("user"))
    adapters.load("user", state)
    assert same(state, adapters.state("user"))


def test_state_equals_pefts_own_checkpoint(llm: Any, adapters: LoraAdapters) -> None:
    from peft import get_peft_model_state_dict

    randomize(adapters, "user")
    expected = get_peft_model_state_dict(llm.model, adapter_name="user", save_embedding_layers=False)
    assert same(adapters.state("user"), dict(expected))


def test_state_is_a_copy(adapters: LoraAdapters) -> None:
    state = adapters.state("task")
    state["model.layers.0.self_attn.q_proj.lora_A.weight"].zero_()
    assert adapters.state("task")["model.layers.0.self_attn.q_proj.lora_A.weight"].any()


def test_reset_depends_on_its_seed_alone(adapters: LoraAdapters) -> None:
    drawn = {}
    for seed, disturbance in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(disturbance)
        before = torch.random.get_rng_state()
        adapters.reset("user", seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        drawn[seed, disturbance] = adapters.state("user")
    assert same(drawn[1, 5], drawn[1, 6])
    assert not same(drawn[1, 5], drawn[2, 5])
    assert all(value.any() == path.endswith(".lora_A.weight") for path, value in drawn[1, 5].items())


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_load_rejects_the_state_of_another_model(adapters: LoraAdapters, change: str) -> None:
    before = adapters.state("user")
    state = {path: value + 1 for path, value in before.items()}
    first = next(iter(state))
    if change == "missing":
        del state[first]
    elif change == "more":
        state["else"] = state[first]
    else:
        state[first] = state[first][:, :-1]
    with pytest.raises(ShapeMismatch, match="Train the adapter for this model"):
        adapters.load("user", state)
    assert same(before, adapters.state("user"))


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    llm = small_llm("llama")
    llm.model.to(torch.bfloat16)
    expected_outputs = losses(llm)
    with LoraAdapters.attach(llm, config=CONFIG) as adapters:
        assert {value.dtype for value in adapters.state("user").values()} == {torch.float32}
        with adapters.active("task", "user"):
            assert torch.equal(expected_outputs, losses(llm))
        before = loss_of(adapters, llm, pairs_of("u"))
        fit_user(adapters, llm, pairs_of("u"), config=CONFIG, seed=0)
        assert loss_of(adapters, llm, pairs_of("u")) < before
    assert {p.dtype for p in llm.model.parameters()} == {torch.bfloat16}


# ---- training a user


def loss_of(adapters: LoraAdapters, llm: Any, pairs: list[tuple[str, str]], *names: str) -> float:
    """Return −log p per token of the answers, with both adapters active unless others are named."""
    prompts, targets = (list(part) for part in zip(*pairs, strict=True))
    with torch.no_grad(), adapters.active(*(names or ("task", "user"))):
        losses, tokens = llm.loss(PromptBatch(prompts), targets)
    return float(losses.sum() / tokens.sum())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fit_user_changes_only_the_user_adapter(family: str) -> None:
    llm = small_llm(family)
    with LoraAdapters.attach(llm, config=CONFIG) as adapters:
        randomize(adapters, "task", size=0.05)
        weights, task = base_weights(llm.model), adapters.state("task")
        before = loss_of(adapters, llm, pairs_of("u"))
        fit = fit_user(adapters, llm, pairs_of("u"), config=CONFIG, seed=0)
        assert loss_of(adapters, llm, pairs_of("u")) < 0.9 * before
        assert (base_weights(llm.model), fit.steps) == (weights, 6)
        assert same(adapters.state("task"), task)
        assert all(value.any() for value in adapters.state("user").values())


def test_fit_user_does_not_depend_on_other_users_or_the_global_generator(llm: Any, adapters: LoraAdapters) -> None:
    randomize(adapters, "task")
    users = {name: pairs_of(name) for name in ("ann", "bob", "cem")}
    outcomes = []
    for order, disturbance in ((("ann", "bob", "cem"), 1), (("cem", "bob", "ann"), 2)):
        torch.manual_seed(disturbance)
        outcome = {}
        for name in order:
            before = torch.random.get_rng_state()
            fit_user(adapters, llm, users[name], config=CONFIG, seed=4)
            assert torch.equal(before, torch.random.get_rng_state())
            outcome[name] = adapters.state("user")
        outcomes.append(outcome)
    assert all(same(outcomes[0][name], outcomes[1][name]) for name in users)
    assert not same(outcomes[0]["ann"], outcomes[0]["bob"])
    fit_user(adapters, llm, users["ann"], config=CONFIG, seed=5)
    assert not same(outcomes[0]["ann"], adapters.state("user"))


def test_fit_user_trains_on_top_of_the_task_adapter(llm: Any, adapters: LoraAdapters) -> None:
    fit_user(adapters, llm, pairs_of("u"), config=CONFIG, seed=0)
    alone = adapters.state("user")
    randomize(adapters, "task")
    before = loss_of(adapters, llm, pairs_of("u"), "task")
    fit_user(adapters, llm, pairs_of("u"), config=CONFIG, seed=0)
    assert not same(alone, adapters.state("user"))
    assert loss_of(adapters, llm, pairs_of("u")) < before


def test_fit_user_trains_on_the_latest_items(llm: Any, adapters: LoraAdapters) -> None:
    pairs = pairs_of("u", count=11)
    config = replace(CONFIG, user_epochs=2, user_items=5, user_batch_size=2)
    assert fit_user(adapters, llm, pairs, config=config, seed=0).steps == 6
    state = adapters.state("user")
    fit_user(adapters, llm, pairs[-5:], config=config, seed=0)
    assert same(state, adapters.state("user"))


def test_fit_user_without_pairs_leaves_a_fresh_adapter(llm: Any, adapters: LoraAdapters) -> None:
    randomize(adapters, "user")
    expected_outputs = losses(llm)
    fit = fit_user(adapters, llm, [], config=CONFIG, seed=0)
    assert (fit.steps, fit.seconds) == (0, 0.0)
    with adapters.active("user"):
        assert torch.equal(losses(llm), expected_outputs)


def test_fit_user_trains_under_no_grad(llm: Any, adapters: LoraAdapters) -> None:
    before = loss_of(adapters, llm, pairs_of("u"))
    with torch.no_grad():
        fit_user(adapters, llm, pairs_of("u"), config=CONFIG, seed=0)
    assert loss_of(adapters, llm, pairs_of("u")) < before


def test_diverging_fit_user_raises_and_leaves_a_fresh_adapter(llm: Any, adapters: LoraAdapters) -> None:
    state = {path: torch.full_like(value, math.inf) for path, value in adapters.state("task").items()}
    adapters.load("task", state)
    with pytest.raises(TrainingDiverged, match="lower lora_learning_rate") as caught:
        fit_user(adapters, llm, pairs_of(SECRET), config=CONFIG, seed=0)
    assert SECRET not in str(caught.value)
    assert all(value.any() == path.endswith(".lora_A.weight") for path, value in adapters.state("user").items())
    assert not losses(llm).isnan().any()  # and no adapter stays active


# ---- training pairs of a user


def item(answer_name: str | None = None, **fields: str) -> HistoryItem:
    return HistoryItem("1", tuple(fields.items()), answer_name)


_LAMP_2 = "Which tag does this movie relate to? Just answer with the tag name. description: "
_CASES: dict[str, tuple[str, str, HistoryItem, Pair]] = {
    "LaMP_1": (
        'Just answer with [1] or [2] without explanation. [1]: "A" [2]: "B"',
        "A B",
        item(title="My paper", abstract="We show."),
        (FREE_PROMPT, "My paper"),
    ),
    "LaMP_2": (
        f"{_LAMP_2}Two friends. description: again",
        "Two friends. description: again",
        item("tag", description="A long war.", tag=" action "),
        (f"{_LAMP_2}A long war.", "action"),
    ),
    "LaMP_3": (
        "What is the score of the following review? review: Nice.",
        "Nice.",
        item("score", text="Broke at once.", score="1"),
        ("What is the score of the following review? review: Broke at once.", "1"),
    ),
    "LaMP_4": (
        "Generate a headline for the following article: Rain fell.",
        "Rain fell.",
        item("title", title="Sun!", text="The sun shone."),
        ("Generate a headline for the following article: The sun shone.", "Sun!"),
    ),
    "LaMP_5": (
        "Generate a title for the following abstract of a paper: We prove it.",
        "We prove it.",
        item("title", title="On it", abstract="It is so."),
        ("Generate a title for the following abstract of a paper: It is so.", "On it"),
    ),
    "LaMP_7": (
        "Paraphrase the following tweet: I am at home.",
        "I am at home.",
        item("text", text="gonna sleep lol"),
        (FREE_PROMPT, "gonna sleep lol"),
    ),
}


@pytest.mark.parametrize("name", sorted(LAMP_TASKS))
def test_every_lamp_task_has_a_history_pair(name: str, llm: Any, adapters: LoraAdapters) -> None:
    prompt, query, one, expected = _CASES[name]
    pairs = history_pairs(LAMP_TASKS[name], prompt, query, [one])
    assert pairs == [expected]
    assert has_history_pairs(LAMP_TASKS[name]) == (name not in ("LaMP_1", "LaMP_7"))
    assert fit_user(adapters, llm, pairs, config=replace(CONFIG, user_epochs=1), seed=0).steps == 1


def test_history_pairs_join_several_values() -> None:
    task = Task("own", "label", ("title", "text"), "kind", ("accuracy",), labels=("x", "y"))
    items = [item("kind", title="T", text="words", kind="x"), item("kind", title="T", text=" ", kind="y")]
    assert history_pairs(task, "whole input", "whole input", items) == [("T words", "x"), ("T", "y")]


def test_history_pairs_of_a_query_pattern_use_the_free_prompt() -> None:
    task = Task("own", "label", ("text",), "kind", ("accuracy",), labels=("x",), query_pattern="of (.*)$")
    assert history_pairs(task, "kind of a", "a", [item("kind", text="words", kind="x")]) == [(FREE_PROMPT, "words")]


@pytest.mark.parametrize("answer", ["sad", "", " ", "Action"])
def test_history_pairs_drop_answers_outside_the_labels(answer: str) -> None:
    prompt, query, one, _ = _CASES["LaMP_2"]
    items = [item("tag", description="Some.", tag=answer), item("tag", description=" ", tag="comedy"), one]
    assert len(history_pairs(LAMP_TASKS["LaMP_2"], prompt, query, items)) == 1


def test_history_pairs_drop_blank_texts() -> None:
    for name, blank in (("LaMP_7", item("text", text=" ")), ("LaMP_4", item("title", title=" ", text="x"))):
        prompt, query, *_ = _CASES[name]
        assert history_pairs(LAMP_TASKS[name], prompt, query, [blank]) == []


@pytest.mark.parametrize("query", ["", "something else"])
def test_history_pairs_reject_a_prompt_that_does_not_end_with_its_query(query: str) -> None:
    with pytest.raises(PersonaPlugError, match="end with its query") as caught:
        history_pairs(LAMP_TASKS["LaMP_3"], f"review: {SECRET}", query, [item("score", text=SECRET, score="1")])
    assert SECRET not in str(caught.value)


def asking(query: str, target: str | None = None) -> Sample:
    return Sample("s", "u", f"review: {query}", query, target)


@pytest.mark.parametrize(
    ("query", "left"),
    [("  the FILM, was good", False), ("The film wasgood!", False), ("Ｔhe film was good", False),
     ("The film was", True), ("The film was good 5", True)],
)  # fmt: skip
def test_without_evaluated_items_drops_items_with_the_query(query: str, left: bool) -> None:
    kept, other = item("score", text="Another film.", score="2"), item("score", text="The film was good.", score="5")
    assert without_evaluated_items([kept, other], [asking("x"), asking(query)]) == ([kept, other] if left else [kept])


def test_without_evaluated_items_compares_each_value() -> None:
    paper = item("title", title="On rain", text="It rains.", place="Oslo")
    for query in ("it rains", "IT RAINS. OSLO", "oslo"):
        assert without_evaluated_items([paper], [asking(query)]) == []
    assert without_evaluated_items([paper], [asking("On rain")]) == [
        paper
    ]  # the answer of an item is not compared with queries


def test_without_evaluated_items_compares_answer_only_items_with_targets() -> None:
    tweet, rated = item("text", text="So tired."), item("score", text="5", score="1")
    assert without_evaluated_items([tweet], [asking("I am weary", "so tired")]) == []
    assert without_evaluated_items([tweet], [asking("so tired")]) == []
    assert without_evaluated_items([rated], [asking("I am weary", "5")]) == [rated]


def test_without_evaluated_items_compares_symbols_without_letters() -> None:
    smile, frown = item("text", text=":) :)"), item("text", text=":(")
    assert without_evaluated_items([smile, frown], [asking(":):)"), asking(" ")]) == [frown]


# ---- the store


def test_user_store_returns_the_stored_adapter(llm: Any, adapters: LoraAdapters, tmp_path: Path) -> None:
    key = ["ann", {"seed": 0, "lora_rank": 2}]
    assert UserLoraStore(tmp_path / "users").get(key) is None
    fit_user(adapters, llm, pairs_of("ann"), config=CONFIG, seed=0)
    trained = adapters.state("user")
    UserLoraStore(tmp_path / "users").put(key, trained, seconds=1.5, items=6)
    stored = UserLoraStore(tmp_path / "users").get(["ann", {"lora_rank": 2, "seed": 0}])
    assert stored is not None
    assert same(trained, stored)
    adapters.load("user", stored)
    assert UserLoraStore(tmp_path / "users").get(["ann", {"lora_rank": 2, "seed": 1}]) is None


def test_user_store_files_contain_no_user_id(adapters: LoraAdapters, tmp_path: Path) -> None:
    UserLoraStore(tmp_path).put([SECRET, 1], adapters.state("user"), seconds=1.5, items=6)
    described, weights = sorted(tmp_path.iterdir())
    assert (described.suffix, weights.suffix, described.stem) == (".json", ".safetensors", weights.stem)
    record = {"seconds": 1.5, "items": 6, "bytes": 2 * count_parameters(adapters)}
    assert read_json(described, remedy="") == record
    assert not [path for path in tmp_path.iterdir() if SECRET.encode() in path.name.encode() + path.read_bytes()]


def test_user_store_costs_are_means_over_loaded_adapters(adapters: LoraAdapters, tmp_path: Path) -> None:
    store = UserLoraStore(tmp_path)
    assert store.costs() is None
    for name, seconds in (("ann", 1.0), ("bob", 3.0), ("cem", 90.0)):
        store.put([name], adapters.state("user"), seconds=seconds, items=1)
    again = UserLoraStore(tmp_path)
    for name in ("ann", "bob", "ann", "dan"):
        again.get([name])
    assert again.costs() == UserCosts(users=2, seconds=2.0, bytes=2 * count_parameters(adapters))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{}"])
def test_user_store_returns_none_for_damaged_files(
    suffix: str, content: bytes | None, adapters: LoraAdapters, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = UserLoraStore(tmp_path)
    store.put([SECRET], adapters.state("user"), seconds=1.0, items=1)
    path = next(tmp_path.glob(f"*{suffix}"))
    path.unlink() if content is None else path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert UserLoraStore(tmp_path).get([SECRET]) is None
    assert ("trained again" in caplog.text) == (content is not None)
    assert SECRET not in caplog.text
    store.put([SECRET], adapters.state("user"), seconds=1.0, items=1)
    assert UserLoraStore(tmp_path).get([SECRET]) is not None


def test_prompt_cache_is_cleared_when_active_adapters_change(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm("llama")
    soft = SoftPrompt(torch.randn(2, 3, llm.identity.width), placement="suffix")

    def suffix_losses() -> Tensor:
        with torch.no_grad():
            values: Tensor = llm.loss(PromptBatch(PROMPTS, soft), TARGETS)[0]
        return values

    with LoraAdapters.attach(llm, config=CONFIG) as adapters:
        for matrix in adapters.module(TASK).parameters():
            nn.init.normal_(matrix, std=0.5)
        llm.cache_prompts(PROMPTS)
        untouched = suffix_losses()
        with adapters.active(TASK):
            changed = suffix_losses()
            llm.cache_prompts(PROMPTS)
            torch.testing.assert_close(suffix_losses(), changed)
            with monkeypatch.context() as patch:
                patch.setattr(llm, "prompt_layout", None)
                torch.testing.assert_close(suffix_losses(), changed, rtol=1e-4, atol=1e-4)
        assert (changed - untouched).abs().min() > 1e-3
        torch.testing.assert_close(suffix_losses(), untouched)
        with adapters.active(TASK):
            llm.cache_prompts(PROMPTS)
    torch.testing.assert_close(suffix_losses(), untouched)
