"""Read past answers with the frozen model, so that a copy head can copy their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personaplug.data.task import Task
from personaplug.errors import ConfigError
from personaplug.llm.base import LanguageModel
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copy_head import CopyHead, CopySource
from personaplug.llm.padding import group_by_length
from personaplug.llm.prompt_tokenizer import Ids

MAX_ANSWERS = 32
"""The answers of this many of a user's latest items are read."""

MAX_TOKENS = 128
"""The first tokens of an answer that are read, which bounds the time and memory for a history."""

_MAX_CHARACTERS = 2048  # of an answer; a very long answer would block the server


@dataclass(frozen=True, repr=False)
class ReadAnswer:
    """The tokens of an answer, (n,), and the state before each token, (n, W), in the model's dtype."""

    tokens: Tensor
    states: Tensor


def check_answers(task: Task) -> None:
    """Raise ConfigError unless the history items of a task have free-text answers, so that they can be copied."""
    if task.labels:
        raise ConfigError(
            f"A copy head needs free-text answers, but task {task.name} has a closed set of labels. Leave it out; a "
            f"plug already reads the user's labels."
        )
    if task.answer_field is None:
        raise ConfigError(
            f"A copy head needs history items with answers, but task {task.name} has no answer_field. Leave it out."
        )


def check_model(llm: LanguageModel) -> CausalLM:
    """Return the model if it can have a copy head; raise ConfigError otherwise."""
    if not isinstance(llm, CausalLM) or llm.prompt_layout is None or not llm.prompt_layout.values:
        raise ConfigError(
            f"A copy head needs a decoder-only model with a prompt cache and attention layers; {llm.identity.name} is "
            f"none. Leave it out."
        )
    return llm


@torch.no_grad()
def read_answers(llm: CausalLM, texts: Sequence[str], *, layer: int) -> list[ReadAnswer]:
    """Read each answer alone, after an empty prompt; the end-of-text token is included if the answer is not cut."""
    head = llm.prompt_tokenizer.encode_prompt("").ids or (llm.prompt_tokenizer.end_id,)
    answers = [_tokens(llm, text) for text in texts]
    read: dict[Ids, ReadAnswer] = {}
    for group in group_by_length(list(dict.fromkeys(answers)), len):
        # The last token predicts nothing, so it is left out.
        for ids, state in zip(group, llm.compute_prompt_states([head + ids[:-1] for ids in group]), strict=True):
            values = state.values(layer)[len(head) - 1 :].clone()
            read[ids] = ReadAnswer(torch.tensor(ids, device=values.device), values)
    return [read[ids] for ids in answers]


@torch.no_grad()
def answer_sources(llm: CausalLM, head: CopyHead, texts: Sequence[str]) -> list[CopySource]:
    """Return the compressed source of each past answer."""
    read = read_answers(llm, texts, layer=head.layer)
    return [head.own.source(answer.states, answer.tokens).compressed() for answer in read]


def copy_source(llm: CausalLM, head: CopyHead, answers: Sequence[str]) -> CopySource:
    """Return the source of a user's past answers, the latest `MAX_ANSWERS` of them."""
    return CopySource.cat(answer_sources(llm, head, answers[-MAX_ANSWERS:]))


def _tokens(llm: CausalLM, text: str) -> Ids:
    ids = llm.prompt_tokenizer.encode_target_uncached(text[:_MAX_CHARACTERS], end=len(text) <= _MAX_CHARACTERS)
    return ids[:MAX_TOKENS]
