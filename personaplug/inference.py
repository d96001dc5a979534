"""Answer a prompt or a conversation for one user, and explain the answer by the user's items."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from personaplug.analysis.point_estimates import LabelDistribution, label_distribution
from personaplug.config import EvaluationConfig
from personaplug.data import read_items
from personaplug.data.parsing import Flaw, as_text
from personaplug.data.records import ITEM_KINDS, PREFERENCE, Chat, HistoryItem, Prompt, last_message
from personaplug.data.task import Task
from personaplug.data.task_prompts import TaskPrompts, TaskQuery, find_task
from personaplug.encoders import Encoder
from personaplug.encoders.encoded_sample import past_answers
from personaplug.errors import ConfigError
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.copied_answers import MAX_ANSWERS, check_model, copy_source
from personaplug.llm.copy_head import CopyHead, Copying
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.attribution import item_weights, leave_one_out
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run, open_models

logger = logging.getLogger(__name__)


class Answer(str):
    """The text of an answer and, for a closed set, the probability of each label."""

    distribution: LabelDistribution | None

    def __new__(cls, text: str, distribution: LabelDistribution | None = None) -> Answer:
        answer = super().__new__(cls, text)
        answer.distribution = distribution
        return answer


@dataclass(frozen=True, repr=False)
class ItemInfluence:
    """The influence of one history item on a persona and on an answer.

    Attributes:
        weight: the item's share of the persona.
        effect: decrease of the answer's log-probability without the item; None if no answer was given.
    """

    item: HistoryItem
    weight: float
    effect: float | None = None

    def __str__(self) -> str:
        effect = "" if self.effect is None else f"  effect {self.effect:+.3f}"
        picture = " (with a picture)" if self.item.picture else ""
        return f"weight {self.weight:.3f}{effect}  {self.item.text}{picture}"


def generate(
    run: Run,
    prompt: Prompt,
    *,
    history: str | Path | Sequence[HistoryItem] = (),
    models: Models | None = None,
    plug: PersonaPlug | None = None,
    seed: int | None = None,
    plain: bool = False,
    copy_head: CopyHead | None = None,
    config: EvaluationConfig | None = None,
) -> Answer:
    """Answer one prompt, or the last message of a conversation, with a trained run; see `respond`.

    Args:
        history: the user's items, or a file for `read_items`; empty for a new user.
        models: the run's models; None = load them.
        plug: the run's plug; None = load it.
        seed: training seed of the plug; None = the first seed.
        plain: answer without the plug.
        copy_head: the run's copy head (`load_copy_head`), for free text; None = copy nothing.
        config: None = the run's own config.
    Raises:
        ConfigError: if the prompt lacks the wording that marks the query, or an item does not belong to the run's task.
    """
    items = check_input(run, prompt, history)
    models, config = models or open_models(run.config), config or run.config.evaluation
    personalizer = None
    if not plain:
        plug = plug or load_plug(run, models, seed=seed)
        personalizer = Personalizer(plug, persona_scale=config.persona_scale)
    return respond(prompt, items, run=run, models=models, personalizer=personalizer, config=config, copy_head=copy_head)


def load_plug(run: Run, models: Models, *, seed: int | None = None) -> PersonaPlug:
    """Load the plug of one training of a run; a seed of None means the first seed."""
    return run.load_plug("plug", seed=run.config.training.seed_or_first(seed), models=models)


def run_for(prompt: Prompt, runs: Sequence[Run]) -> Run:
    """Return the run of the task that matches the wording of a prompt. A single run matches every prompt.

    Raises:
        ConfigError: if no task has the wording of the prompt, and no task is conversations.
    """
    if len(runs) == 1:
        return runs[0]
    prompts = [TaskPrompts(run.task, run.wordings) for run in runs]
    index, query = find_task(prompts, last_message(prompt))
    if not query.is_on_task:
        wordings = "; ".join(f"{p.task.name}: {' or '.join(map(repr, p.describe()['wordings']))}" for p in prompts)
        raise ConfigError(f"The prompt matches the wording of no task. The wordings are: {wordings}.")
    return runs[index]


def respond(
    prompt: Prompt,
    items: Sequence[HistoryItem],
    *,
    run: Run,
    models: Models,
    personalizer: Personalizer | None,
    config: EvaluationConfig,
    copy_head: CopyHead | None = None,
) -> Answer:
    """Answer a prompt for a user with these items. The answer is a label if the task has labels.

    Args:
        copy_head: copies tokens of the prompt and of the items' answers into generated text; this needs a persona.
            Decoding is then without beams.
    Raises:
        ConfigError: if the prompt lacks the wording that marks the query.
    """
    task, soft, copying = run.task, None, None
    if personalizer is not None:
        soft = persona_for(prompt, items, run=run, personalizer=personalizer, encoder=models.encoder)
    if task.labels and config.decoding != "generate":
        scores = models.llm.score(PromptBatch([prompt], soft), task.labels)
        return Answer(task.labels[int(scores[0].argmax())], label_distribution(task.labels, scores[0].tolist()))
    if copy_head is not None and personalizer is not None and config.persona_scale:
        answers = past_answers(items, latest=MAX_ANSWERS)
        copying = Copying(copy_head, [copy_source(check_model(models.llm), copy_head, answers)])
        config = replace(config, num_beams=1)
    generated = models.llm.generate(PromptBatch([prompt], soft, copying=copying), generation_config(task, config))
    return Answer(generated[0].text)


def persona_for(
    prompt: Prompt, items: Sequence[HistoryItem], *, run: Run, personalizer: Personalizer, encoder: Encoder
) -> SoftPrompt | None:
    """Return the soft tokens of a user with these items for a prompt.

    Raises:
        ConfigError: if the prompt lacks the wording that marks the query.
    """
    query, history = _query(run, last_message(prompt)), personalizer.encode(items, encoder=encoder)
    return personalizer.persona(query.text, history, options=query.options)


def explain(
    run: Run,
    prompt: Prompt,
    *,
    history: str | Path | Sequence[HistoryItem],
    answer: str | None = None,
    models: Models | None = None,
    plug: PersonaPlug | None = None,
) -> list[ItemInfluence]:
    """Return the influence of a user's items on the persona for a prompt, largest weight first.

    Args:
        history: the user's items, or a file for `read_items`.
        answer: also measure each item's effect on this answer, and sort by the effect. This runs the language model
            once for each item.
        models, plug: those of the run; None = load them.
    Raises:
        ConfigError: as for `generate`, or if the answer is not a label of the task.
    """
    task, items = run.task, check_input(run, prompt, history)
    if answer is not None and task.labels and answer not in task.labels:
        raise ConfigError(f"`answer` must be a label of {task.name}: {', '.join(task.labels)}. Found another text.")
    models = models or open_models(run.config)
    personalizer = Personalizer(plug or load_plug(run, models), persona_scale=run.config.evaluation.persona_scale)
    query, items = _query(run, last_message(prompt)), tuple(personalizer.used_items(items))
    encoded = personalizer.encode(items, encoder=models.encoder)
    weights = item_weights(personalizer, query.text, encoded).tolist()
    effects: list[float | None] = [None] * len(items)
    if answer is not None:
        softs = [personalizer.persona(query.text, part, options=query.options) for part in leave_one_out(encoded)]
        whole = personalizer.persona(query.text, encoded, options=query.options)
        likelihood, *without_item = _log_likelihoods(prompt, answer, [whole, *softs], run=run, models=models)
        effects = [likelihood - reduced for reduced in without_item]
    influences = list(map(ItemInfluence, items, weights, effects))
    return sorted(influences, key=lambda each: each.weight if each.effect is None else abs(each.effect), reverse=True)


@torch.no_grad()
def _log_likelihoods(
    prompt: Prompt, answer: str, softs: Sequence[SoftPrompt], *, run: Run, models: Models
) -> list[float]:
    """Return log p of an answer with each soft prompt."""
    rows, values = run.config.evaluation.evaluation_batch_size, list[float]()
    for start in range(0, len(softs), rows):
        part = softs[start : start + rows]
        batch = PromptBatch([prompt] * len(part), SoftPrompt.cat(part))
        losses, _ = models.llm.loss(batch, [answer] * len(part), labels=run.task.labels)
        values += (-losses.float()).tolist()
    return values


def check_input(run: Run, prompt: Prompt, history: str | Path | Sequence[HistoryItem]) -> tuple[HistoryItem, ...]:
    """Check a prompt and a history, which may be a file; return the items.

    Raises:
        ConfigError: if the prompt is not valid, or if an item does not belong to the run's task.
    """
    _check_texts(prompt)
    task = run.task
    items = read_items(history, task=task) if isinstance(history, str | Path) else tuple(history)
    _check_items(items, task)
    return tuple(replace(item, answer_labels=task.labels) for item in items)


def _check_texts(prompt: Prompt) -> None:
    """Raise ConfigError unless a prompt is a text, or a conversation that ends with a message of the user."""
    turns = prompt.turns if isinstance(prompt, Chat) else (("user", prompt),)
    is_valid = isinstance(turns, tuple) and all(isinstance(turn, tuple) and len(turn) == 2 for turn in turns)
    if not is_valid or not turns or turns[-1][0] != "user" or not all(map(_is_text, chain.from_iterable(turns))):
        raise ConfigError(
            "A prompt must be a text of valid Unicode, or a Chat of (role, text) pairs that ends with the user's "
            "message; found neither."
        )


def _is_text(value: object) -> bool:
    try:
        return as_text(value, "it") == value
    except Flaw:
        return False


def _check_items(items: Sequence[HistoryItem], task: Task) -> None:
    """Raise ConfigError if the fields of an item differ from the task's, because they would change the persona."""
    for number, item in enumerate(items, start=1):
        if not isinstance(item, HistoryItem) or not _is_item_of(task, item):
            raise ConfigError(
                f"Item {number} of the history must be a HistoryItem of task {task.name}, with texts for the fields "
                f"{', '.join(task.field_names)} in this order. Use `read_items` to read such items from a file."
            )


def _is_item_of(task: Task, item: HistoryItem) -> bool:
    is_preference = item.kind == "preference"
    fields, answer_name = ((PREFERENCE,), None) if is_preference else (task.field_names, task.answer_field)
    has_fields = tuple(name for name, _ in item.fields) == fields and item.answer_name == answer_name
    return has_fields and item.kind in ITEM_KINDS and all(isinstance(text, str) for _, text in item.fields)


def generation_config(task: Task, config: EvaluationConfig) -> GenerationConfig:
    """Return the generation settings for a task; raise ConfigError if sampling and beam search are combined."""
    do_sample = config.sample_temperature > 0
    if do_sample and config.num_beams > 1:
        raise ConfigError(f"sample_temperature above 0 needs num_beams=1; found num_beams={config.num_beams}.")
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=do_sample,
        temperature=config.sample_temperature if do_sample else 1.0,
        seed=config.draw_seed,
    )


def query_on_task(task: Task, prompt: str) -> TaskQuery:
    """Return the query of a prompt; raise ConfigError if the prompt lacks the wording that marks the query."""
    query = TaskPrompts(task).parse(prompt)
    if not query.is_on_task:
        wording = f"contain {task.query_after!r}, then the query" if task.query_after else "not be blank"
        if task.query_pattern:
            wording = f"match the regular expression {task.query_pattern!r}, whose groups are the query"
        raise ConfigError(f"A prompt of task {task.name} must {wording}; this prompt does not.")
    return query


def _query(run: Run, prompt: str) -> TaskQuery:
    query, trained = query_on_task(run.task, prompt), TaskPrompts(run.task, run.wordings)
    if not trained.parse(prompt).is_on_task:
        wordings = " or ".join(map(repr, trained.describe()["wordings"]))
        logger.warning("The prompt differs from the training prompts, which had the wording: %s", wordings)
    return query
