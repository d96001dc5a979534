"""One answer for one user: a prompt and a file of the user's items in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from personaplug.backends.base import GenerationConfig
from personaplug.config import EvaluationConfig
from personaplug.data import read_items
from personaplug.personalizer import Personalizer
from personaplug.records import HistoryItem
from personaplug.run import Models, Run, open_models
from personaplug.data.base import query_of


def generate_one(
    run: Run,
    prompt: str,
    *,
    history: Path | None,
    seed: int | None = None,
    plain: bool = False,
    config: EvaluationConfig,
) -> str:
    """Load a run and answer one prompt with it.

    Args:
        history: the user's items, one JSON object a line; None = a user without history.
        seed: which training; None = the first.
        plain: leave the plug out.
    Raises:
        BadRecord: if an item cannot be read, or the prompt lacks the wording that the task's query follows.
        MissingData: if the run has no finished plug.
    """
    items = read_items(history, task=run.task) if history is not None else ()
    models = open_models(run.config)
    personalizer = None
    if not plain:
        chosen = run.config.training.seeds[0] if seed is None else seed
        personalizer = Personalizer(run.load_plug("plug", seed=chosen, models=models))
    return reply(prompt, items, run=run, models=models, personalizer=personalizer, config=config)


def reply(
    prompt: str,
    items: Sequence[HistoryItem],
    *,
    run: Run,
    models: Models,
    personalizer: Personalizer | None,
    config: EvaluationConfig,
) -> str:
    """Answer a prompt as a user with these items; one of the task's labels where it has them."""
    soft = None
    if personalizer is not None:
        soft = personalizer.persona(query_of(run.task, prompt), items, encoder=models.encoder)
    if run.task.labels and config.decoding != "generate":
        scores = models.backend.score([prompt], run.task.labels, soft=soft)
        return run.task.labels[int(scores[0].argmax())]
    wanted = GenerationConfig(max_new_tokens=config.max_new_tokens or run.task.max_new_tokens, num_beams=config.num_beams)
    return models.backend.generate([prompt], soft=soft, config=wanted)[0].text
