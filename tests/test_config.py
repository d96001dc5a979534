"""Settings: parsing from YAML and the command line, validation, and writing."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from personaplug.config import PAPER, SECTIONS, Config
from personaplug.config_parsing import changed_settings, describe, json_schema, load_config, to_yaml, with_values
from personaplug.errors import ConfigError, MissingData
from personaplug.evaluation.experiment import EXPERIMENTS
from personaplug.run import Run, _differing


def test_words_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {epochs: 7, batch_size: 4}\npersona_tokens: 3\n")
    config = load_config(path, overrides=["epochs=9", "model.llm=toy"])
    assert (config.training.epochs, config.training.batch_size) == (9, 4)
    assert (config.plug.persona_tokens, config.model.llm) == (3, "toy")


def test_config_round_trips_through_yaml(tmp_path: Path) -> None:
    config = load_config(overrides=["seeds=0,1,2", "learning_rate=3e-4", "controls=false", "llm=toy:4"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert config.training.seeds == (0, 1, 2)
    assert config.training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("epochs=0", r"training.epochs must be a number \[from 1\]; found 0"),
        ("epochs=two", "training.epochs must be a whole number; found 'two'"),
        ("epochs=1.5", "a whole number"),
        ("epochs=true", "a whole number"),
        ("learning_rate=-1", "from 0"),
        ("learning_rate=nan", "must be a number"),
        ("learning_rate=2", "to 1"),
        ("validation_share=0.9", "to 0.5"),
        ("placement=middle", "one of prefix, suffix; found 'middle'"),
        ("seeds=a", "a whole number"),
        ("seeds=-1", "from 0"),
        ("seeds=99999999999999999999", "from 0 to 4294967295"),
        ("seeds=0,1,0", "training.seeds contains a value twice: 0,1,0"),
        ("sample_temperature=-0.1", "from 0 to 10"),
        ("drop_history_prob=1.5", "from 0 to 1"),
        ("max_tokens_per_microbatch=-1", "from 0"),
        ("max_history=600", "to 512"),
        ("epoch=3", "no setting 'epoch'; did you mean 'epochs'"),
        ("plug.epochs=3", "no setting 'plug.epochs'"),
        ("epochs", "key=value"),
        ("epochs=[", "not valid YAML"),
        ("llm=2024-13-45", "value of llm is not valid YAML: month"),
        (f"epochs={'9' * 5000}", "not valid YAML"),
        (f"llm={'[' * 2000}", "nested too deeply"),
        ("seeds=[[0]]", "a whole number"),
        ("seeds={a: 1}", "a whole number"),
        ("preset=[paper]", "preset must be one of"),
    ],
)
def test_invalid_setting_is_refused_with_a_message(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=[word])


def test_missing_or_invalid_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="section"):
        load_config(tmp_path / "list.yaml")


def test_error_names_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("llm: modèle\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training:\nplug: {persona_tokens: 2}\n")
    assert load_config(tmp_path / "c.yaml") == load_config(overrides=["persona_tokens=2"])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_setting_names_are_unique_and_defaults_are_in_range() -> None:
    names = [option.name for kind in SECTIONS.values() for option in fields(kind)]
    assert len(names) == len(set(names))
    config = Config()
    values = {
        f"{s}.{f.name}": getattr(getattr(config, s), f.name) for s, kind in SECTIONS.items() for f in fields(kind)
    }
    assert with_values(config, values) == config


def test_help_lists_all_settings() -> None:
    text = describe(tuple(SECTIONS))
    assert all(f"  {option.name}=" in text for kind in SECTIONS.values() for option in fields(kind))


def test_speed_settings_do_not_change_a_run() -> None:
    quick = load_config(overrides=["encoder_engine=auto", "device=cpu"])
    assert _differing(Config(), quick) == []
    assert _differing(Config(), load_config(overrides=["encoder=hash"])) == ["model.encoder"]


def test_preset_replaces_plug_and_training_and_explicit_values_override_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("preset: paper\ntraining: {epochs: 3}\nmodel: {llm: toy}\n")
    config = load_config(tmp_path / "c.yaml", overrides=["persona_tokens=2"])
    assert config.plug == replace(PAPER, persona_tokens=2)
    assert (config.training.train_eos, config.training.drop_history_prob, config.training.epochs) == ("always", 0, 3)
    assert config.model.llm == "toy"
    assert load_config(overrides=["preset=default"], base=config).plug == Config().plug
    with pytest.raises(ConfigError, match="preset must be one of default, paper; found 'pplug'"):
        load_config(overrides=["preset=pplug"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 3\nepochs: 4\n", "the key 'epochs' is given twice"),
        ("training: {epochs: 3, epochs: 4}\n", "the key 'epochs' is given twice"),
        ("training: {epochs: 3}\nmodel: {llm: toy}\ntraining: {batch_size: 4}\n", "the key 'training' is given twice"),
        ("epochs: 3\ntraining: {epochs: 4}\n", r"gives training\.epochs twice"),
    ],
)
def test_duplicate_key_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "c.yaml")
    assert (
        load_config(overrides=["epochs=3", "training.epochs=4"]).training.epochs == 4
    )  # a later word overrides an earlier one


def test_changed_settings_parse_to_the_same_config() -> None:
    for words, expected in (
        ([], "the defaults"),
        (["preset=paper"], "preset=paper"),
        (["preset=paper", "llm=toy", "epochs=2"], "preset=paper llm=toy epochs=2"),
        (["llm=a folder/x", "seeds=1,2", "controls=false"], "llm='a folder/x' seeds=1,2 controls=false"),
    ):
        config = load_config(overrides=words)
        assert changed_settings(config) == expected
        if words:
            assert load_config(overrides=shlex.split(expected)) == config
    assert changed_settings(load_config(overrides=["llm=toy", "epochs=2"]), "training") == "epochs=2"


def test_json_schema_accepts_valid_settings() -> None:
    schema = json_schema()
    assert schema["$defs"]["PlugConfig"]["properties"]["placement"]["enum"] == ["prefix", "suffix"]
    for file in sorted((EXPERIMENTS.parent / "configs").glob("*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert config.keys() <= schema["properties"].keys(), file


@pytest.mark.parametrize("content", ["[]", "{}", '{"task": null}', '{"task": {}, "vectors": 5}'])
def test_invalid_run_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json"):
        Run.open(tmp_path)


def test_defaults_have_the_type_of_their_setting() -> None:
    for section, settings in asdict(Config()).items():
        hints = get_type_hints(SECTIONS[section])
        floats = [name for name in settings if hints[name] is float]
        assert {name: type(settings[name]) for name in floats} == dict.fromkeys(floats, float)
