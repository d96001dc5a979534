"""Resolve settings that depend on the task: `auto` values, and rates of 0."""

from __future__ import annotations

from collections.abc import Sequence

from personaplug.analysis.metrics import get_metric
from personaplug.config import CHAT_LEARNING_RATES, LEARNING_RATES, PARTS_WARMUP_RATIO, WARMUP_RATIO, Config
from personaplug.config_parsing import with_values
from personaplug.data.task import Task
from personaplug.errors import ConfigError


def resolved(config: Config, task: Task) -> Config:
    """Return the config with all `auto` values, and rates of 0, resolved for the task.

    Raises:
        ConfigError: if a setting needs something that the task does not have.
    """
    for metric in task.metrics:  # fail before hours of training, not after
        get_metric(metric, labels=task.labels)
    has_labels = task.has_labelled_items
    if config.plug.answer_channel == "label" and task.labels and not has_labels:
        raise ConfigError(
            f"answer_channel=label needs history items with answers, but task {task.name} has none. Use "
            f"answer_channel=text."
        )
    if config.plug.options == "compare" and not task.has_options:
        raise ConfigError(
            f"options=compare needs a task whose query_pattern has a group for each label; {task.name} declares none. "
            f"Remove this setting, or give options=auto."
        )
    scores_labels = has_labels and config.training.train_eos == "auto"
    if config.plug.label_prior in ("counts", "neighbors") and not scores_labels:
        raise ConfigError(
            f"label_prior={config.plug.label_prior} needs history items with answers from a closed set, and "
            f"train_eos=auto. Task {task.name} has {'' if has_labels else 'no '}such items; found "
            f"train_eos={config.training.train_eos}. Remove label_prior."
        )
    values = {}
    if config.plug.answer_channel == "auto":
        values["plug.answer_channel"] = "label" if has_labels else "text" if task.labels else "style"
    if config.plug.instruction_start == "auto":
        values["plug.instruction_start"] = "random" if task.labels else "words"
    if config.plug.options == "auto":
        values["plug.options"] = "compare" if task.has_options else "ignore"
    if config.plug.label_prior == "auto":
        values["plug.label_prior"] = "neighbors" if scores_labels and config.plug.persona_tokens else "none"
    return with_rates(with_values(config, values), [task])


def with_rates(config: Config, tasks: Sequence[Task]) -> Config:
    """Replace a learning rate or a warmup ratio of 0 by the default of the tasks.

    If any task is a conversation, use the learning rates of conversations. If any has pictures or vectors, use their
    warmup ratio.
    """
    has_parts = any(task.image_field or task.vector_field for task in tasks)
    rates = CHAT_LEARNING_RATES if any(task.kind == "chat" for task in tasks) else LEARNING_RATES
    rates = rates | {"warmup_ratio": PARTS_WARMUP_RATIO if has_parts else WARMUP_RATIO}
    missing = {f"training.{name}": rate for name, rate in rates.items() if not getattr(config.training, name)}
    return with_values(config, missing)
