"""Requests of several users decode together: each model family gives the answers of single rows."""

from __future__ import annotations

from typing import Any

import model_families
import pytest
import torch

from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Slot
from personaplug.llm.soft_prompt import SoftPrompt

# Family, changes of its config, and how live tokens meet the keys of a cached prompt.
FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "apart"),
    ("gpt_oss", {"sliding_window": 8}, "apart"),  # attention sinks
    ("gemma4_text", {}, "apart"),  # vectors per layer, layers that share keys
    ("gemma4_unified_text", {}, "apart"),  # layers with different head sizes
    ("qwen3_5_text", {}, "apart"),  # gated DeltaNet
    ("falcon_h1", {}, "apart"),  # attention and Mamba-2 in one layer
    ("lfm2", {}, "apart"),  # short convolutions
    ("mamba2", {}, "apart"),  # no attention
    ("deepseek_v3", {}, "joined"),  # latent attention
    ("bloom", {}, "joined"),  # ALiBi
]
PROMPTS = ["What is it?", "A question of some length, with commas: yes or no?", "One word"]
LABELS = ["yes", "no way", "perhaps"]


@pytest.fixture(params=FAMILIES, ids=lambda family: str(family[0]))
def llm(request: pytest.FixtureRequest) -> CausalLM:
    family, changes, way = request.param
    if family not in model_families.CAUSAL:
        pytest.skip(f"this version of transformers has no {family}")
    llm = model_families.load(family, is_encoder_decoder=False, **changes)
    assert isinstance(llm, CausalLM)
    assert llm.check.prefix_way == way
    return llm


def _soft(llm: CausalLM) -> SoftPrompt:
    vectors = torch.randn(len(PROMPTS), 3, llm.identity.width, generator=torch.Generator().manual_seed(2))
    return SoftPrompt(vectors * llm.embedding_scale, placement="suffix")


def _slots(llm: CausalLM, **settings: Any) -> list[Slot]:
    prompts = [llm.prompt_tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    return [Slot(prompt, _soft(llm).row(row), **settings) for row, prompt in enumerate(prompts)]


def test_rows_that_join_and_leave_write_what_each_writes_alone(llm: CausalLM) -> None:
    batch, slots = ContinuousBatch(llm), _slots(llm, config=GenerationConfig(max_new_tokens=6))
    batch.add(slots[:2])
    batch.step()
    batch.step()
    batch.add(slots[2:])  # the states of running rows are stacked again
    while len(batch):
        batch.step()
    llm.prompt_layout = None  # whole sequences, without cached prompts
    rows, config = PromptBatch(PROMPTS, _soft(llm)).rows(), GenerationConfig(max_new_tokens=6)
    alone = [llm.answer_ids(row, config)[0] for row in rows]
    assert [tuple(slot.ids) for slot in slots] == [ids[:-1] if ids[-1] in llm.end_ids else ids for ids in alone]


def test_labels_have_the_scores_of_single_rows(llm: CausalLM) -> None:
    choices = llm.prompt_tokenizer.encode_labels(LABELS)
    slots = _slots(llm, config=GenerationConfig(max_new_tokens=8), choices=choices)
    ContinuousBatch(llm).add(slots)
    scores = torch.tensor([slot.scores for slot in slots])
    cached = llm.score(PromptBatch(PROMPTS, _soft(llm)), LABELS)
    llm.prompt_layout = None
    alone = torch.cat([llm.score(row, LABELS) for row in PromptBatch(PROMPTS, _soft(llm)).rows()])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, alone, rtol=1e-4, atol=1e-4)


def test_cached_prompt_is_unchanged_by_the_passes_after_it(llm: CausalLM) -> None:
    """Recurrent layers of transformers change their states in place."""
    llm.cache_prompts(PROMPTS)
    losses = [llm.loss(PromptBatch(PROMPTS, _soft(llm)), ["yes", "no", "ok"])[0]]
    llm.generate(PromptBatch(PROMPTS, _soft(llm)), GenerationConfig(max_new_tokens=4))
    llm.score(PromptBatch(PROMPTS, _soft(llm)), LABELS)
    losses.append(llm.loss(PromptBatch(PROMPTS, _soft(llm)), ["yes", "no", "ok"])[0])
    assert torch.equal(*losses)
