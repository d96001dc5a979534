"""Models of several families as encoders: the longest text, cut texts, static embeddings, prompts, odd texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from personaplug.encoders import SentenceEncoder
from personaplug.errors import ConfigError, EngineFailure
from personaplug.llm.tiny import tiny_tokenizer

WIDTH, ROWS = 16, 66  # rows of the position table
FAMILIES: dict[str, tuple[Callable[..., Any], int]] = {
    "roberta": (lambda **shape: RobertaModel(RobertaConfig(**shape)), ROWS - 2),
    "xlm-roberta": (lambda **shape: XLMRobertaModel(XLMRobertaConfig(**shape)), ROWS - 2),
    "mpnet": (lambda **shape: MPNetModel(MPNetConfig(**shape)), ROWS - 2),
    "bert": (lambda **shape: BertModel(BertConfig(**shape)), ROWS),
}
ODD = ["", " ", "\n\n", "a", "naïve 你好 🙂", "\x00", "x" * 1000]


def save_model(folder: Path, family: str, **options: Any) -> str:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(["bos_token", "pad_token", "eos_token", "unk_token"], special, strict=True))
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer_class(tokenizer_object=backend, **names).save_pretrained(folder / "parts")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = FAMILIES[family][0](
        vocab_size=len(alphabet), max_position_embeddings=ROWS, pad_token_id=1, bos_token_id=0, eos_token_id=2, **shape
    )
    model.save_pretrained(folder / "parts")
    return save_modules(folder, [Transformer(str(folder / "parts")), Pooling(WIDTH, pooling_mode="mean")], **options)


def save_modules(folder: Path, modules: list[nn.Module], **options: Any) -> str:
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder / "model"))
    return str(folder / "model")


def save_static(folder: Path, **options: Any) -> str:
    torch.manual_seed(0)
    return save_modules(folder, [StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=WIDTH)], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_cut_at_the_last_position_and_counted(family: str, tmp_path: Path) -> None:
    name, longest = save_model(tmp_path, family), FAMILIES[family][1]
    encoder = SentenceEncoder(name)
    assert encoder.identity.max_length == longest
    fits, cut = "x" * (longest - 2), "x" * (longest - 1)
    vectors = encoder.encode([fits, cut, "x" * 100_000, "x"])
    assert encoder.truncated == 2
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    np.testing.assert_allclose(vectors[2], vectors[0], atol=1e-6)
    np.testing.assert_allclose(encoder.query_encoder().encode([cut]), vectors[1:2], atol=1e-5)
    assert SentenceEncoder(name, max_length=longest).identity == encoder.identity
    with pytest.raises(ConfigError, match=f"must be 3 to {longest} tokens"):
        SentenceEncoder(name, max_length=longest + 1)


@pytest.mark.parametrize("save", [save_static, lambda folder: save_model(folder, "roberta")], ids=["static", "roberta"])
def test_odd_texts_have_unit_vectors(save: Callable[[Path], str], tmp_path: Path) -> None:
    encoder = SentenceEncoder(save(tmp_path))
    vectors = encoder.encode(ODD)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    queries = encoder.query_encoder()
    np.testing.assert_allclose(queries.encode(ODD), vectors, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(ODD[::-1], batch_size=1)[::-1], vectors, atol=1e-5)
    queries(queries.features(ODD))[:, 0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in queries.parameters() if p.grad is not None)


def test_static_embedding_reads_texts_of_any_length(tmp_path: Path) -> None:
    encoder = SentenceEncoder(save_static(tmp_path))
    assert (encoder.identity.max_length, encoder.width) == (None, WIDTH)
    vectors = encoder.encode(["ab " * 30_000, "ab ", ""])
    assert float(vectors[0] @ vectors[1]) > 0.999
    assert abs(float(vectors[1] @ vectors[2])) < 0.999
    assert encoder.truncated == 0


def test_static_embedding_can_limit_the_length(tmp_path: Path) -> None:
    encoder = SentenceEncoder(save_static(tmp_path), max_length=4)
    assert encoder.identity.max_length == 4
    vectors = encoder.encode(["abcd", "abcdef"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert encoder.truncated == 1


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({"query": "query: ", "passage": "passage: "}, None, "query: ", "passage: "),
        ({"query": "q ", "document": "d ", "corpus": "c "}, None, "q ", "d "),
        ({"any": "any: "}, "any", "any: ", "any: "),
        ({"any": "any: "}, None, "", ""),
    ],
)
def test_prompts_come_from_the_models_files(
    prompts: dict[str, str], default: str | None, query: str, document: str, tmp_path: Path
) -> None:
    encoder = SentenceEncoder(save_static(tmp_path, prompts=prompts, default_prompt_name=default))
    assert (encoder.identity.query_prompt, encoder.identity.prompt) == (query, document)
    bare = SentenceEncoder(encoder.identity.name, query_prompt="", document_prompt="")
    np.testing.assert_allclose(encoder.encode(["a"]), bare.encode([document + "a"]), atol=1e-6)
    np.testing.assert_allclose(encoder.query_encoder().encode(["a"]), bare.encode([query + "a"]), atol=1e-6)


def test_vectors_that_are_not_finite_raise(tmp_path: Path) -> None:
    encoder = SentenceEncoder(save_static(tmp_path))
    next(encoder._model.parameters()).data.fill_(torch.nan)
    with pytest.raises(EngineFailure, match="not finite"):
        encoder.encode(["a"])
    with pytest.raises(EngineFailure, match="not finite"):
        encoder.query_encoder().encode(["a"])
