"""Small plugs and histories for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from personaplug.config import PAPER
from personaplug.encoders import Encoder, HashEncoder
from personaplug.encoders.style_features import style_features_of
from personaplug.infra.model_hub import LLMIdentity
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.model import PersonaPlug
from personaplug.plug.persona_head import PersonaHead
from personaplug.plug.saving import PlugSpec

WIDTH, OUT = 16, 8
LLM = LLMIdentity("small", None, "0123456789abcdef", OUT)
QUERIES = ["who likes films", "a long walk", "tea"]


def build_plug(
    encoder: Encoder | None = None, *, labels: tuple[str, ...] = (), llm: LLMIdentity = LLM, **settings: Any
) -> PersonaPlug:
    """Return the paper's plug with changed settings; equal arguments give equal weights."""
    encoder = encoder or HashEncoder(WIDTH)
    torch.manual_seed(1)
    spec = PlugSpec(llm, 0.25, encoder.identity, labels)
    return PersonaPlug(replace(PAPER, **settings), spec=spec, encoder=encoder).eval()


def build_history(*, lengths: tuple[int, ...] = (4, 2, 0)) -> HistoryBatch:
    """Return random items with labels 0 to 2 and style features."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(sum(lengths), WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    label_ids = rng.integers(0, 3, size=sum(lengths))
    style = style_features_of("word " * n for n in rng.integers(1, 9, size=sum(lengths)))
    kind_ids = torch.zeros(sum(lengths), dtype=torch.int64)
    columns = (torch.from_numpy(label_ids), torch.from_numpy(style), kind_ids)
    return HistoryBatch(torch.from_numpy(vectors), lengths, *columns)


def head_of(plug: PersonaPlug) -> PersonaHead:
    """Return the persona head of a plug."""
    assert plug.persona is not None
    return plug.persona
