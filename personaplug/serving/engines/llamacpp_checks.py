"""Checks of a GGUF file at start: it is the plug's model, and soft tokens have the same effect as in training.

The tokens of a prompt come from the tokenizer of the run's model, as in training. The file must have the same tokens.
The file's embeddings must be those of the run's model, up to rounding and a constant factor.

Some model families multiply the embeddings of tokens by a constant. llama.cpp does this also for embeddings that it is
given, or only for tokens. So the probe tries the family's constants: with one of them, the embeddings of a text must
give the same probabilities as the text. Both computations have the same shapes, because another number of concurrent
tokens changes the order of sums, and a quantized model amplifies these differences.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplug.errors import ConfigError
from personaplug.infra.model_hub import read_embeddings
from personaplug.llm.chat_template import ChatTemplate
from personaplug.llm.prompt_tokenizer import Ids, PromptTokenizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.engines.llamacpp_embeddings import FileEmbeddings
from personaplug.serving.engines.llamacpp_model import LlamaModel, Span, unusable_file

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 4096  # as many as `LanguageModel.embedding_scale` samples
_MIN_COSINE = 0.9  # median over tokens, of embeddings and their rounded values; unrelated tokens of SmolLM2 have .47
_MAX_SCALE_ERROR = 0.1  # relative, after rounding
_PROBES = ("The quick brown fox jumps over the lazy dog, and then", "My sister plays the violin, but my brother")
_MAX_DIFFERENCE = 0.05  # of a token's log-probability between two computations of one prompt
_LIKELY = 20  # tokens to compare


class GGUFChecks:
    """Checks that a loaded GGUF file is the model of a plug.

    Args:
        folder: the tokenizer of the run's model, and its weights if they are at hand.
    """

    def __init__(self, model: LlamaModel, tokenizer: PromptTokenizer, *, spec: PlugSpec, folder: Path) -> None:
        self.model, self.tokenizer, self.spec, self.folder = model, tokenizer, spec, folder

    def run(self) -> float:
        """Run all checks; return the factor from the plug's soft tokens to the file's embeddings.

        Raises:
            ConfigError: if the file is not the plug's model, or if soft tokens do not work.
        """
        self._check_width()
        self._check_tokens()
        self._compare_templates()
        embeddings, factors = self._open_embeddings(), self._known_factors()
        plug_factor = self._plug_factor(embeddings, factors)
        return self._llama_factor(embeddings, factors) / plug_factor

    def _check_width(self) -> None:
        expected = self.spec.llm.width
        if self.model.width != expected:
            raise self._another_model(f"its embeddings have the width {self.model.width}, but the plug's {expected}")

    def _check_tokens(self) -> None:
        tokenizer, names = self.tokenizer.tokenizer, self.model.token_names()
        ids = [token for token in names if token < len(tokenizer)]
        expected = tokenizer.convert_ids_to_tokens(ids)
        differing = sum(names[token] != name for token, name in zip(ids, expected, strict=True))
        if differing or not ids:
            raise self._another_model(f"{differing} of its {len(names)} text tokens differ from the tokenizer's")

    def _compare_templates(self) -> None:
        """Warn if the file's chat template writes other tokens than the tokenizer's, which prompts use."""
        source = self.model.chat_template
        if source is None or self._frame_of(source) == [list(self.tokenizer.head), list(self.tokenizer.tail)]:
            return
        logger.warning(
            "the chat template of %s differs from the tokenizer's; prompts use the tokenizer's, as in training",
            self.model.path.name,
        )

    def _frame_of(self, source: str) -> list[list[int]]:
        """Return the tokens that a template writes around one message; none if it does not work."""
        other = copy.copy(self.tokenizer.tokenizer)
        other.chat_template = source
        try:
            template = ChatTemplate.of(other, self.tokenizer.texts, day=self.spec.llm.chat_date or "2000-01-01")
            return [] if template is None else template.frame(("user",)).parts
        except ConfigError:
            return []

    def _open_embeddings(self) -> FileEmbeddings:
        try:
            return FileEmbeddings(self.model.path, width=self.model.width)
        except ValueError as error:
            raise unusable_file(self.model.path, str(error)) from error

    def _known_factors(self) -> list[float]:
        """Return the factors of model families: 1, √D (Gemma), or the file's constant (Granite)."""
        constant = self.model.setting("embedding_scale")
        factors = [1.0, math.sqrt(self.model.width), *([] if constant is None else [float(constant)])]
        return list(dict.fromkeys(factors))

    def _plug_factor(self, embeddings: FileEmbeddings, factors: Sequence[float]) -> float:
        """Return the factor from the file's embeddings to those of the plug's model, which soft tokens resemble."""
        if any(self.folder.glob("*.safetensors")):
            measured = self._compare_rows(embeddings)
        else:
            ids = _spread(len(embeddings), _SAMPLED_ROWS)
            measured = self.spec.embedding_scale / float(np.sqrt(np.square(embeddings.rows(ids)).mean()))
        factor = min(factors, key=lambda factor: abs(math.log(measured / factor)))
        if abs(measured / factor - 1) > _MAX_SCALE_ERROR:
            raise self._another_model(f"its embeddings are {measured:.3g} times smaller than those of the plug's model")
        return factor

    def _compare_rows(self, embeddings: FileEmbeddings) -> float:
        """Check that the run's model has the same embeddings; return the factor from the file's to the plug's."""
        table = read_embeddings(self.folder)
        ids = _spread(min(len(table), len(embeddings)), _SAMPLED_ROWS)
        own, rows = table[torch.from_numpy(ids)].float().numpy(), embeddings.rows(ids)
        products, squares = (own * rows).sum(axis=1), np.square(rows).sum(axis=1)
        cosine = float(np.median(products / np.sqrt(squares * np.square(own).sum(axis=1) + 1e-12)))
        if not cosine >= _MIN_COSINE:
            raise self._another_model(f"its embeddings differ from the model's (median cosine {cosine:.2f})")
        # Some families apply a further factor outside of the embedding layer.
        further = self.spec.embedding_scale / float(np.sqrt(np.square(own).mean()))
        return further * float(products.sum() / squares.sum())

    def _llama_factor(self, embeddings: FileEmbeddings, factors: Sequence[float]) -> float:
        """Return the factor with which the file's embeddings have the same effect as their tokens."""
        probes = [self.tokenizer.encode_plain(text).ids for text in _PROBES]
        middles = [embeddings.rows(_third(0, ids, 1).ids) for ids in probes]
        expected, errors = self._probe(probes), dict[float, float]()
        for factor in factors:
            found = self._probe(probes, [rows * np.float32(factor) for rows in middles])
            errors[factor] = max(map(_difference, expected, found))
        best = min(errors, key=errors.__getitem__)
        if not errors[best] <= _MAX_DIFFERENCE:
            difference = f"their log-probabilities differ by {errors[best]:.2f}"
            raise unusable_file(
                self.model.path,
                f"a text and the embeddings of the text get different answers ({difference}). This llama.cpp does not "
                f"support soft tokens for this model family. Use --engine local",
            )
        self._check_isolation(probes, [rows * np.float32(best) for rows in middles])
        return best

    def _check_isolation(self, probes: Sequence[Ids], middles: Sequence[NDArray[np.float32]]) -> None:
        """Check that the soft tokens of the second prompt do not change the answer to the first one."""
        alike, other = self._probe(probes, middles), self._probe(probes, [middles[0], -middles[1]])
        if _difference(alike[0], other[0]) > _MAX_DIFFERENCE or _difference(alike[1], other[1]) <= _MAX_DIFFERENCE:
            raise unusable_file(self.model.path, "the answers of concurrent users are mixed up. Use --engine local")

    def _probe(self, prompts: Sequence[Ids], embeds: Sequence[NDArray[np.float32]] = ()) -> list[Tensor]:
        """Return the next logits (V,) of prompts that run side by side, with `embeds` for their middles if given."""
        self.model.clear()
        for part in range(3):
            spans = [_third(row, ids, part) for row, ids in enumerate(prompts)]
            if part == 1 and embeds:
                spans = [replace(span, ids=(), embeds=rows) for span, rows in zip(spans, embeds, strict=True)]
            found = self.model.decode(spans)
        self.model.clear()
        return [logits[0] for logits in found]

    def _another_model(self, difference: str) -> ConfigError:
        return unusable_file(
            self.model.path,
            f"it is not the plug's model {self.spec.llm.describe()}: {difference}. Convert that model to GGUF",
        )


def _third(row: int, ids: Ids, part: int) -> Span:
    """Return a third of a prompt: ids, embeddings and ids follow each other, as with `prefix`."""
    cuts = [len(ids) * cut // 3 for cut in range(4)]
    return Span(row, cuts[part], ids=ids[cuts[part] : cuts[part + 1]])


def _spread(size: int, count: int) -> NDArray[np.int64]:
    return np.linspace(0, size - 1, min(count, size)).astype(np.int64)


def _difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference of the likeliest tokens' log-probabilities."""
    expected, found = expected.log_softmax(dim=-1), found.log_softmax(dim=-1)
    likely = torch.cat([expected.topk(_LIKELY).indices, found.topk(_LIKELY).indices])
    return float((expected[likely] - found[likely]).abs().max())
