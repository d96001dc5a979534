"""Templates that print today's date: training, evaluation and serving print one recorded date."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_llama

from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import ConfigError, RunConflict
from personaplug.evaluation.evaluator import evaluate
from personaplug.llm.prompt_tokenizer import PromptTokenizer, today
from personaplug.llm.tiny import tiny_tokenizer
from personaplug.methods import parse_methods
from personaplug.plug.model import PersonaPlug
from personaplug.run import Run, dated, open_models
from personaplug.training.parts import train

DAY = "2024-02-05"
LLAMA_3 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}Today Date: {{ date_string }}\n{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
GRANITE = "Today's Date: {{ strftime_now('%B %-d, %Y') }}.{% for m in messages %}<u>{{ m.content }}{% endfor %}"
GPT_OSS = (
    "{%- macro header() %}Current date: {{ strftime_now('%Y-%m-%d') }}{% endmacro -%}{{ header() }}\n"
    "{% for m in messages %}<u>{{ m.content }}{% endfor %}"
)


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "date_text"),
    [(LLAMA_3, "Today Date: 05 Feb 2024\n"), (GRANITE, "February 5, 2024."), (GPT_OSS, "Current date: 2024-02-05\n")],
)
def test_template_prints_the_recorded_date(template: str, date_text: str) -> None:
    tokenizer = tokenizer_with(template)
    prompts = PromptTokenizer(tokenizer, max_tokens=512, is_encoder_decoder=False, chat_date=DAY)
    assert prompts.chat_date == DAY
    for ids in (prompts.encode_prompt("a").ids, prompts.encode_chat([("user", "a"), ("user", "b")]).ids):
        assert date_text in tokenizer.decode(ids)


def test_template_without_a_date_records_none() -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert PromptTokenizer(tokenizer, max_tokens=99, is_encoder_decoder=False, chat_date=DAY).chat_date is None


@pytest.mark.parametrize("template", [LLAMA_3, GRANITE, GPT_OSS])
def test_recorded_date_gives_the_same_prompt_as_the_template_on_that_day(template: str) -> None:
    tokenizer = tokenizer_with(template)
    before = datetime.date.today()
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    if before != datetime.date.today():
        pytest.skip("the date changed during the test")
    prompts = PromptTokenizer(tokenizer, max_tokens=512, is_encoder_decoder=False, chat_date=before.isoformat())
    assert tokenizer.decode(prompts.encode_prompt("a").ids) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("model"), tokenizer_with(LLAMA_3)
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_run_keeps_its_date(model: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_simulation(SimulationConfig(users=8, dev_users=3), data)
    words = [f"llm={model}", "encoder=hash:16", "device=cpu", "dtype=float32", "max_steps=2", "controls=false"]
    task = load_task(data)
    run = Run.create(out, config=load_config(overrides=[*words, f"chat_date={DAY}"]), task=task)
    models = open_models(run.config)
    train(run, open_dataset(data, "train", task=task), models=models)
    prompt = models.llm.prompt_tokenizer.encode_prompt("a").ids
    # On another day: the same command without a date.
    config = dated(load_config(overrides=words), out)
    again = Run.create(out, config=load_config(overrides=words), task=task)
    assert config.model.chat_date == again.config.model.chat_date == Run.open(out).config.model.chat_date == DAY
    assert open_models(again.config).llm.prompt_tokenizer.encode_prompt("a").ids == prompt
    results = evaluate(
        again,
        open_dataset(data, "dev", task=task),
        split="dev",
        methods=parse_methods("plain,plug"),
        config=again.config.evaluation,
        models=models,
    )
    assert f"prompts of {DAY}" in json.dumps(results.to_json()["model"])

    # Models with another date can neither train this run nor load its plug.
    others = open_models(load_config(overrides=words))
    assert others.llm.identity.chat_date == today()
    with pytest.raises(RunConflict, match=DAY):
        train(again, open_dataset(data, "train", task=task), models=others)
    run.load_plug("plug", seed=0, models=models).save_pretrained(tmp_path / "moved")
    moved = PersonaPlug.from_pretrained(tmp_path / "moved", encoder=models.encoder, llm=None)
    assert moved.spec.llm.chat_date == DAY
    with pytest.raises(ConfigError, match=f"chat_date={DAY}"):
        PersonaPlug.from_pretrained(tmp_path / "moved", encoder=models.encoder, llm=others.llm.identity)


def test_new_run_uses_todays_date(tmp_path: Path) -> None:
    assert dated(load_config(), tmp_path).model.chat_date == today()
    assert dated(load_config(overrides=[f"chat_date={DAY}"]), tmp_path).model.chat_date == DAY


@pytest.mark.parametrize("day", ["yesterday", "2024-13-01", "20240205", "2024-2-5"])
def test_invalid_date_is_refused(day: str) -> None:
    with pytest.raises(ConfigError, match="chat_date"):
        load_config(overrides=[f"chat_date={day}"])


def test_every_directive_prints_the_recorded_date() -> None:
    directives = [f"%{flag}{sign}" for flag in ("", "-") for sign in "aAbBCdDegGhHIjklmMnpPrRStTuUVwWyY"]
    tokenizer = tokenizer_with(
        "".join(f"{{{{ strftime_now('{one}') }}}}|" for one in directives) + "{{ messages[0].content }}"
    )
    prompts = PromptTokenizer(tokenizer, max_tokens=2048, is_encoder_decoder=False, chat_date=DAY)
    recorded_date = datetime.date.fromisoformat(DAY)
    assert (
        tokenizer.decode(prompts.encode_prompt("a").ids)
        == "".join(f"{recorded_date.strftime(one)}|" for one in directives) + "a"
    )
