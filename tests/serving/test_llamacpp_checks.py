"""The engine llamacpp refuses GGUF files that are not the plug's model, and settings that do not fit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_model import SMOLLM, needs_llamacpp, open_gguf, spec_of
from live_server import CONFIG, ENCODER, LABELS

from personaplug.config import ModelConfig
from personaplug.errors import ConfigError, MissingExtra, MissingModel
from personaplug.infra.model_hub import find_gguf, find_model, find_tokenizer
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.loading import load_hf
from personaplug.llm.prompt_tokenizer import PromptTokenizer
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines import llamacpp_model
from personaplug.serving.engines.llamacpp import LlamaCppEngine
from personaplug.serving.engines.llamacpp_checks import GGUFChecks
from personaplug.serving.engines.llamacpp_embeddings import FileEmbeddings, _find_table
from personaplug.serving.engines.llamacpp_model import LlamaModel

FILES_OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def smollm() -> CausalLM:
    llm = load_hf(SMOLLM, dtype="float32")
    assert isinstance(llm, CausalLM)
    return llm


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaModel]:
    model = open_gguf(tokens=512)
    yield model
    model.close()


@pytest.fixture(scope="module")
def tokenizer_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run's model without its weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in FILES_OF_TOKENIZER:
        if (source := find_model(SMOLLM) / name).exists():
            shutil.copy(source, folder)
    return folder


def _run(model: LlamaModel, llm: CausalLM, spec: PlugSpec, folder: Path) -> float:
    return GGUFChecks(model, llm.prompt_tokenizer, spec=spec, folder=folder).run()


@needs_llamacpp
def test_the_plugs_model_passes_with_and_without_the_weights_of_the_run(
    model: LlamaModel, smollm: CausalLM, tokenizer_only: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for folder in (find_model(SMOLLM), tokenizer_only):
            assert _run(model, smollm, spec_of(smollm), folder) == 1.0
    assert not caplog.records
    assert find_tokenizer(str(tokenizer_only)) == tokenizer_only


@needs_llamacpp
def test_embeddings_of_the_file_are_those_of_the_run(model: LlamaModel, smollm: CausalLM) -> None:
    ids = [0, 1, 500, 20_000, 49_151]
    rows = FileEmbeddings(model.path, width=576).rows(ids)
    np.testing.assert_allclose(rows, smollm.embed.weight[ids].float().numpy(), rtol=2**-7)


@needs_llamacpp
def test_scale_of_the_plugs_model_is_applied(model: LlamaModel, smollm: CausalLM, tokenizer_only: Path) -> None:
    """A plug of a family that multiplies embeddings by the root of the width, such as Gemma."""
    spec = spec_of(smollm, scale=smollm.embedding_scale * 24)
    assert _run(model, smollm, spec, tokenizer_only) == pytest.approx(1 / 24)


@needs_llamacpp
def test_another_width_or_scale_is_refused(model: LlamaModel, smollm: CausalLM, tokenizer_only: Path) -> None:
    with pytest.raises(ConfigError, match=r"width 576, but the plug's 2048.*Convert that model to GGUF"):
        _run(model, smollm, spec_of(smollm, width=2048), tokenizer_only)
    with pytest.raises(ConfigError, match="not the plug's model"):
        _run(model, smollm, spec_of(smollm, scale=smollm.embedding_scale * 3), tokenizer_only)


@needs_llamacpp
def test_other_embeddings_are_refused(smollm: CausalLM, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(find_gguf(SMOLLM), other)
    start, size, _ = _find_table(other)
    table = np.memmap(other, np.uint8, "r+", offset=start, shape=(49_152, size // 49_152))
    table[:] = np.roll(table, 1000, axis=0)
    table.flush()
    model = LlamaModel(other, cells=512, sequences=2)
    with pytest.raises(ConfigError, match=r"other\.gguf .*its embeddings differ"):
        _run(model, smollm, spec_of(smollm), find_model(SMOLLM))
    model.close()


@needs_llamacpp
def test_other_tokens_are_refused(
    model: LlamaModel, smollm: CausalLM, tokenizer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = model.token_names()
    monkeypatch.setattr(model, "token_names", lambda: names | {700: names[701], 701: names[700]})
    with pytest.raises(ConfigError, match="2 of its 49135 text tokens differ"):
        _run(model, smollm, spec_of(smollm), tokenizer_only)


@needs_llamacpp
def test_embeddings_without_the_effect_of_their_tokens_are_refused(
    model: LlamaModel, smollm: CausalLM, tokenizer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = model.decode

    def ignoring(spans: Any) -> Any:
        return decode([span if span.embeds is None else replace(span, embeds=span.embeds * 0) for span in spans])

    monkeypatch.setattr(model, "decode", ignoring)
    with pytest.raises(ConfigError, match="the embeddings of the text get different answers"):
        _run(model, smollm, spec_of(smollm), tokenizer_only)


@needs_llamacpp
def test_mixed_up_sequences_are_refused(
    model: LlamaModel, smollm: CausalLM, tokenizer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda spans: decode(spans)[::-1])
    with pytest.raises(ConfigError, match="concurrent users are mixed up"):
        _run(model, smollm, spec_of(smollm), tokenizer_only)


@needs_llamacpp
def test_another_chat_template_is_logged(
    model: LlamaModel,
    smollm: CausalLM,
    tokenizer_only: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = smollm.prompt_tokenizer.tokenizer
    own = tokenizer.chat_template
    assert own == model.chat_template
    checks = GGUFChecks(model, smollm.prompt_tokenizer, spec=spec_of(smollm), folder=tokenizer_only)
    assert checks._frame_of(own) == [list(smollm.prompt_tokenizer.head), list(smollm.prompt_tokenizer.tail)]
    assert checks._frame_of("{{ messages[0].content }}") == [[], []]
    assert checks._frame_of("{{ nothing") == []
    assert tokenizer.chat_template == own
    with caplog.at_level(logging.WARNING):
        checks._compare_templates()
        assert not caplog.records
        monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
        other = PromptTokenizer(tokenizer, max_tokens=512, is_encoder_decoder=False)
        GGUFChecks(model, other, spec=spec_of(smollm), folder=tokenizer_only)._compare_templates()
    assert "differs from the tokenizer's; prompts use the tokenizer's" in caplog.text


@needs_llamacpp
def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.gguf cannot be used: it is not a GGUF file"):
        LlamaModel(tmp_path / "text.gguf", cells=512, sequences=2)
    (tmp_path / "cut.gguf").write_bytes(find_gguf(SMOLLM).read_bytes()[:1_000_000])
    with pytest.raises(ConfigError, match=r"llama\.cpp cannot load it \(gguf_init_from_reader: failed to read"):
        LlamaModel(tmp_path / "cut.gguf", cells=512, sequences=2)
    with pytest.raises(ConfigError, match="Use a smaller --max-rows"):
        LlamaModel(find_gguf(SMOLLM), cells=512, sequences=1000)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The models that llama.cpp has freed."""
    import llama_cpp

    freed, free = list[object](), llama_cpp.llama_model_free

    def note(model: Any) -> None:
        freed.append(model)
        free(model)

    monkeypatch.setattr(llama_cpp, "llama_model_free", note)
    return freed


@needs_llamacpp
def test_memory_of_a_refused_model_is_freed(smollm: CausalLM, freed: list[object]) -> None:
    plug = PersonaPlug(CONFIG, spec=replace(spec_of(smollm, width=2048), labels=LABELS), encoder=ENCODER)
    config = ServingConfig(store="s.db", engine="llamacpp", gguf=SMOLLM)
    with pytest.raises(ConfigError, match="not the plug's model"):
        LlamaCppEngine.open(ModelConfig(llm=SMOLLM), config, lambda _: plug)
    assert len(freed) == 1


@needs_llamacpp
def test_memory_of_an_unsupported_model_is_freed(freed: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "_why_unsupported", lambda model: "it is of another kind")
    with pytest.raises(ConfigError, match="cannot be used: it is of another kind"):
        open_gguf(tokens=512)
    assert len(freed) == 1


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_model, "find_spec", lambda name: None)
    llamacpp_model._library.cache_clear()
    with pytest.raises(MissingExtra, match=r"personaplug\[llamacpp\]"):
        LlamaModel(tmp_path / "x.gguf", cells=512, sequences=2)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingModel, match=r"absent\.gguf.*Give the path of a file"):
        find_gguf(str(tmp_path / "absent.gguf"))
    with pytest.raises(MissingModel, match=r"one \.gguf file, found none"):
        find_gguf("package:numpy")


@pytest.mark.parametrize("settings", [{"engine": "llamacpp"}, {"gguf": "x.gguf"}, {"engine": "http://a", "gguf": "x"}])
def test_engine_and_file_belong_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--engine llamacpp and --gguf FILE must be given together"):
        ServingConfig(store="s.db", **settings)
