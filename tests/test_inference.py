"""Answers for one user: required wording of prompts, and messages that do not quote the prompt."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from personaplug.config_parsing import load_config
from personaplug.config_resolution import resolved
from personaplug.data import LAMP_TASKS
from personaplug.data.records import Chat, HistoryItem
from personaplug.data.task import Task
from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError
from personaplug.inference import _check_items, generate, respond
from personaplug.infra.atomic_io import write_checked_json
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copy_head import CopyHead
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.run import Models, Run

SECRET = "zanzibar"
BLANK = Task("Own", "text", ("text",), "text", ("rouge_1",))


def answer(
    prompt: str,
    task: Task,
    toy: CausalLM,
    encoder: HashEncoder,
    *,
    plain: bool = False,
    copy_head: CopyHead | None = None,
    settings: tuple[str, ...] = ("max_new_tokens=2",),
) -> str:
    config = resolved(load_config(overrides=["num_beams=1", *settings]), task)
    torch.manual_seed(0)  # so that all calls have the same plug
    plug = PersonaPlug(config.plug, spec=PlugSpec(toy.identity, 0.25, encoder.identity, task.labels), encoder=encoder)
    values = tuple((name, "4") for name in task.field_names)
    return respond(
        prompt,
        [HistoryItem(str(n), values, task.answer_field) for n in range(99 if copy_head else 1)],
        run=Run(Path("unused"), config, task, Path("unused")),
        models=Models(encoder, toy),
        personalizer=None if plain else Personalizer(plug.eval(), persona_scale=config.evaluation.persona_scale),
        config=config.evaluation,
        copy_head=copy_head,
    )


@pytest.mark.parametrize("name", ["LaMP_3", "LaMP_4"])
def test_generate_answers_a_prompt_with_the_wording_of_the_task(name: str, toy: CausalLM, hashing: HashEncoder) -> None:
    task = LAMP_TASKS[name]
    text = answer(f"Tell me. {task.query_after}a long walk", task, toy, hashing)
    assert text in task.labels or not task.labels


@pytest.mark.parametrize(
    ("task", "prompt", "wording"),
    [
        (LAMP_TASKS["LaMP_3"], SECRET, "A prompt of task LaMP_3 must contain 'review: ', then the query"),
        (LAMP_TASKS["LaMP_3"], f"{SECRET} review: ", "must contain 'review: ', then the query"),
        (LAMP_TASKS["LaMP_1"], SECRET, "task LaMP_1 must match the regular expression 'without explanation"),
        (BLANK, " ", "A prompt of task Own must not be blank"),
    ],
)
def test_error_for_a_prompt_without_query_names_the_missing_wording(
    task: Task, prompt: str, wording: str, toy: CausalLM, hashing: HashEncoder
) -> None:
    with pytest.raises(ConfigError) as caught:
        answer(prompt, task, toy, hashing)
    assert wording in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "Flaw" not in "".join(traceback.format_exception(caught.value))


def test_plain_generation_needs_no_wording(toy: CausalLM, hashing: HashEncoder) -> None:
    assert answer("anything", LAMP_TASKS["LaMP_3"], toy, hashing, plain=True) in LAMP_TASKS["LaMP_3"].labels


def test_copy_head_is_used_only_with_a_persona(toy: CausalLM, hashing: HashEncoder) -> None:
    task, prompt, head = LAMP_TASKS["LaMP_4"], "Tell me. article: a long walk", toy.new_copy_head(seed=0)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor([0.0, -3.0, 12.0]))  # mostly copies the answers
    bare = answer(prompt, task, toy, hashing)
    copied = answer(prompt, task, toy, hashing, copy_head=head)
    assert copied in ("", "4", "44")
    assert copied != bare
    beams = ("max_new_tokens=2", "num_beams=4")
    assert answer(prompt, task, toy, hashing, copy_head=head, settings=beams) == copied, "decoding is without beams"
    for changes in ({"plain": True}, {"settings": ("max_new_tokens=2", "persona_scale=0")}):
        arguments: dict[str, Any] = changes
        assert answer(prompt, task, toy, hashing, copy_head=head, **arguments) == answer(
            prompt, task, toy, hashing, **arguments
        )


@pytest.mark.parametrize(
    ("history", "prompt"),
    [
        ([{"text": SECRET, "score": "4"}], "review: x"),
        ([HistoryItem("1", (("texts", SECRET), ("score", "4")), "score")], "review: x"),
        ([HistoryItem("1", (("text", SECRET), ("score", 4)), "score")], "review: x"),  # type: ignore[arg-type]
        ([], f"{SECRET} review: \ud83d"),
        ([], None),
        ([], 3),
        ([], [{"role": "user", "content": SECRET}]),
        ([], Chat(())),
        ([], Chat(SECRET)),  # type: ignore[arg-type]
        ([], Chat((("user", 3),))),  # type: ignore[arg-type]
        ([], Chat((["user", SECRET],))),  # type: ignore[arg-type]
        ([], Chat((("user", SECRET), ("assistant", SECRET)))),
    ],
)
def test_generate_refuses_invalid_items_and_prompts(
    history: Any, prompt: Any, toy: CausalLM, hashing: HashEncoder
) -> None:
    task = LAMP_TASKS["LaMP_3"]
    run = Run(Path("unused"), resolved(load_config(), task), task, Path("unused"))
    with pytest.raises(ConfigError, match=r"history must be a HistoryItem|valid Unicode") as error:
        generate(run, prompt, history=history, models=Models(hashing, toy))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ["LaMP_3", "LaMP_4"])
def test_items_of_all_kinds_are_accepted(name: str) -> None:
    task = LAMP_TASKS[name]
    fields = tuple((name, "4") for name in task.field_names)
    rejection = HistoryItem("1", fields, task.answer_field, kind="rejection")
    preference = HistoryItem("2", (("preference", "No horror."),), None, kind="preference")
    _check_items([rejection, preference], task)
    for item in (
        HistoryItem("3", preference.fields, None),
        HistoryItem("3", fields, task.answer_field, kind="preference"),
        HistoryItem("3", fields, task.answer_field, kind="kept"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="Item 2 of the history must be a HistoryItem"):
            _check_items([preference, item], task)


def test_wording_that_differs_from_training_logs_a_warning(
    toy: CausalLM, hashing: HashEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = LAMP_TASKS["LaMP_3"]
    config = resolved(load_config(overrides=["num_beams=1"]), task)
    run = Run(tmp_path, config, task, tmp_path / "vectors")
    wording = {"opening": "Rate it. review: ", "lead": "Rate it. review: ", "closing": "", "is_fixed": True}
    write_checked_json(tmp_path / "data.json", {"wordings": [wording]})
    plug = PersonaPlug(config.plug, spec=PlugSpec(toy.identity, 0.25, hashing.identity, task.labels), encoder=hashing)
    arguments: dict[str, Any] = {
        "run": run,
        "models": Models(hashing, toy),
        "personalizer": Personalizer(plug.eval()),
        "config": config.evaluation,
    }
    answer = respond("Rate it. review: tea", [], **arguments)
    assert not caplog.text
    respond("review: tea", [], **arguments)
    assert "'Rate it. review: {query}'" in caplog.text
    assert answer.distribution is not None
    probabilities = answer.distribution.probabilities
    assert (answer, answer.distribution.median in task.labels) == (
        max(task.labels, key=probabilities.__getitem__),
        True,
    )
    assert sum(probabilities.values()) == pytest.approx(1)
    assert answer.distribution.mean == pytest.approx(sum(float(label) * p for label, p in probabilities.items()))
