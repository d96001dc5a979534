"""Settle what a config leaves to the task: what its items hold, what it asks, and how fast its plug learns."""

from __future__ import annotations

from collections.abc import Sequence

from personaplug.analysis.metrics import get_metric
from personaplug.config import CHAT_LEARNING_RATES, LEARNING_RATES, Config
from personaplug.config_parsing import with_values
from personaplug.data.task import Task
from personaplug.errors import ConfigError


def resolved(config: Config, task: Task) -> Config:
    """Return the config with what it leaves to the task (`auto`, or 0) settled.

    Raises:
        ConfigError: if it asks for something that the task does not have.
    """
    for metric in task.metrics:  # before hours of training, not after
        get_metric(metric, labels=task.labels)
    answered = task.has_labelled_items
    if config.plug.answer_channel == "label" and task.labels and not answered:
        raise ConfigError(
            f"answer_channel=label reads the answers in a history, and the items of {task.name} hold none."
        )
    if config.plug.options == "compare" and not task.has_options:
        raise ConfigError(
            f"options=compare needs prompts with an option for each label, found by a group of the task's "
            f"query_pattern each; {task.name} declares none. Leave it out, or give options=auto."
        )
    if config.plug.label_prior == "own" and not (answered and config.training.train_eos == "auto"):
        raise ConfigError(
            f"label_prior=own counts the answers in a history and adds to labels' scores: it needs items that hold "
            f"answers from a closed set, and train_eos=auto; {task.name} has {'' if answered else 'no '}such items, "
            f"and train_eos={config.training.train_eos}. Leave it out."
        )
    settled = {}
    if config.plug.answer_channel == "auto":
        settled["plug.answer_channel"] = "label" if answered else "text" if task.labels else "style"
    if config.plug.instruction_start == "auto":
        settled["plug.instruction_start"] = "random" if task.labels else "words"
    if config.plug.options == "auto":
        settled["plug.options"] = "compare" if task.has_options else "ignore"
    return with_learning_rates(with_values(config, settled), [task])


def with_learning_rates(config: Config, tasks: Sequence[Task]) -> Config:
    """Return the config with the rates of a task, or of several that share a plug: a conversation decides."""
    rates = CHAT_LEARNING_RATES if any(task.kind == "chat" for task in tasks) else LEARNING_RATES
    missing = {f"training.{name}": rate for name, rate in rates.items() if not getattr(config.training, name)}
    return with_values(config, missing)
