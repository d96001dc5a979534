"""Conversations: cached prompts, losses, scores and generated answers with both placements of soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import small_llm
from torch import Tensor

from personaplug.data.records import Chat, turns_of
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import SoftPrompt

CHATS = [
    Chat((("system", "Be kind."), ("user", "first"), ("assistant", "reply"), ("user", "a much longer question?"))),
    Chat((("user", "hello"), ("assistant", "hi"), ("user", "and?"))),
    Chat((("system", "No."), ("user", "x"))),
]
TARGETS = ["yes indeed", "n", "ok then"]
LABELS = ["yes", "no", "perhaps"]
SPELLED = "To you: "
PLACEMENTS = ["none", "prefix", "suffix"]


def spelled_ids(llm: Any) -> Ids:
    return tuple(llm.prompt_tokenizer.tokenizer(SPELLED, add_special_tokens=False)["input_ids"])


def soft_tokens(llm: Any, placement: str) -> SoftPrompt | None:
    """Return soft tokens that have the same effect as the tokens of SPELLED."""
    if placement == "none":
        return None
    ids = spelled_ids(llm)
    vectors: Tensor = llm.spell(ids) if placement == "suffix" else llm.embed(torch.tensor([ids]))
    return SoftPrompt(vectors.expand(len(CHATS), -1, -1), placement=placement)


def model_logits(llm: Any, chat: Chat, target: Sequence[int], *, placement: str) -> Tensor:
    """Return the logits of a target from token ids alone, with SPELLED in place of the soft tokens."""
    row = llm.prompt_tokenizer.encode_chat(chat.turns)
    spelled = spelled_ids(llm)
    ids, before = row.ids, spelled if placement == "suffix" else ()
    if placement == "prefix":
        ids = (*ids[: row.soft_position], *spelled, *ids[row.soft_position :])
    logits: Tensor = llm.model_logits(ids, tuple(target), before=before)
    return logits


def greedy_text(llm: Any, chat: Chat, *, placement: str, tokens: int) -> str:
    """Return the greedy answer, decoded token by token."""
    ids: list[int] = []
    while len(ids) < tokens and (not ids or ids[-1] not in llm.end_ids):
        ids.append(int(model_logits(llm, chat, [*ids, 0], placement=placement)[-1].argmax()))
    return str(llm.prompt_tokenizer.decode([token for token in ids if token not in llm.end_ids]))


def count_computed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[Ids]:
    """Return a list to which the prompts are appended whose states are computed from now on."""
    computed: list[Ids] = []
    real = llm.prompt_states.compute

    def record(prompts: Sequence[Ids]) -> Any:
        computed.extend(prompts)
        return real(prompts)

    monkeypatch.setattr(llm.prompt_states, "compute", record)
    return computed


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("family", "chat"), [("llama", True), ("gemma", True), ("llama", False), ("t5", False)])
def test_results_of_conversations_equal_those_of_the_model_on_token_ids(
    family: str, chat: bool, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small_llm(family, chat=chat)
    batch = PromptBatch(CHATS, soft_tokens(llm, placement), [0] * len(CHATS))
    llm.cache_prompts(CHATS)
    computed = count_computed(llm, monkeypatch)

    losses, tokens = llm.loss(batch, TARGETS)
    scores = llm.score(batch, LABELS)
    texts = [response.text for response in llm.generate(batch, GenerationConfig(max_new_tokens=6))]

    for row, (prompt, target) in enumerate(zip(CHATS, TARGETS, strict=True)):
        ids = llm.prompt_tokenizer.encode_target(target)
        logits = model_logits(llm, prompt, ids, placement=placement)
        expected = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids), reduction="sum")
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-4)
        assert int(tokens[row]) == len(ids)
        assert texts[row] == greedy_text(llm, prompt, placement=placement, tokens=6)
    for column, label in enumerate(LABELS):
        label_losses, _ = llm.loss(batch, [label] * len(CHATS), labels=LABELS)
        torch.testing.assert_close(scores[:, column], -label_losses, rtol=1e-4, atol=1e-4)
    assert not computed, "the model reads each conversation once, when the cache is filled"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gemma", "t5"])
def test_beam_search_reads_a_conversation_as_its_lines(family: str, placement: str) -> None:
    llm = small_llm(family)
    between = " " if family == "t5" else "\n"
    lines = [between.join(text for _, text in turns_of(chat)) for chat in CHATS]
    blank = len(between.strip("\n"))  # it belongs to the text after it
    last = [len(line) - len(chat.turns[-1][1]) - blank for line, chat in zip(lines, CHATS, strict=True)]
    soft, config = soft_tokens(llm, placement), GenerationConfig(max_new_tokens=6, num_beams=3)
    chats = llm.generate(PromptBatch(CHATS, soft, [0] * len(CHATS)), config)
    texts = llm.generate(PromptBatch(lines, soft, last), config)
    assert [response.text for response in chats] == [response.text for response in texts]
    assert any(response.text for response in chats)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_soft_tokens_change_the_losses_of_conversations(family: str) -> None:
    llm = small_llm(family)
    losses = [llm.loss(PromptBatch(CHATS, soft_tokens(llm, placement)), TARGETS)[0] for placement in PLACEMENTS]
    assert all((losses[0] - other).abs().min() > 1e-3 for other in losses[1:])
    assert (losses[1] - losses[2]).abs().min() > 1e-3
