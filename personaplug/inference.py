"""One answer for one user: a prompt and a file of the user's items in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from personaplug.config import EvaluationConfig
from personaplug.data import read_items
from personaplug.data.parsing import Flaw, options_of, query_of
from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import past_answers
from personaplug.errors import ConfigError
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.ngram_cache import check_ngrams
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run, open_models


def generate_one(
    run: Run,
    prompt: str,
    *,
    history: Path | None,
    seed: int | None = None,
    plain: bool = False,
    phrases: bool = False,
    config: EvaluationConfig,
) -> str:
    """Load a run and answer one prompt with it.

    Args:
        history: the user's items, as `read_items` takes them; None = a user without history.
        seed: which training; None = the first.
        plain: leave the plug out.
        phrases: mix the phrases of the user's own answers into what the model says, beside the persona.

    Raises:
        ConfigError: if the prompt lacks the wording that tells the plug where the query is, or the task has no phrases.
        RecordError: if an item cannot be read.
        MissingData: if the file of items is not there, or the run has no finished plug.
    """
    if phrases:
        check_ngrams(run.task)
    items = read_items(history, task=run.task) if history is not None else ()
    models = open_models(run.config)
    personalizer = None
    if not plain:
        chosen = run.config.training.seeds[0] if seed is None else seed
        personalizer = Personalizer(
            run.load_plug("plug", seed=chosen, models=models), persona_scale=config.persona_scale
        )
    return reply(prompt, items, run=run, models=models, personalizer=personalizer, config=config, phrases=phrases)


def reply(
    prompt: str,
    items: Sequence[HistoryItem],
    *,
    run: Run,
    models: Models,
    personalizer: Personalizer | None,
    config: EvaluationConfig,
    phrases: bool = False,
) -> str:
    """Answer a prompt as a user with these items; one of the task's labels where it has them.

    Args:
        phrases: mix those of the items' answers into what is written, beside a persona.
    Raises:
        ConfigError: if the prompt lacks the wording that tells the plug where the query is.
    """
    soft = None
    if personalizer is not None:
        query, options = _query(run.task, prompt), options_of(run.task, prompt)
        soft = personalizer.persona(query, personalizer.encode(items, encoder=models.encoder), options=options)
    if run.task.labels and config.decoding != "generate":
        scores = models.llm.score(PromptBatch([prompt], soft), run.task.labels)
        return run.task.labels[int(scores[0].argmax())]
    own = None
    if phrases and personalizer is not None and config.persona_scale:
        answers = past_answers(items, latest=personalizer.plug.config.max_history)
        own = [models.llm.build_ngram_cache(answers)]
    return models.llm.generate(PromptBatch([prompt], soft, ngrams=own), _wanted(run.task, config))[0].text


def _wanted(task: Task, config: EvaluationConfig) -> GenerationConfig:
    drawn = config.sample_temperature > 0
    if drawn and config.num_beams > 1:
        raise ConfigError(f"sample_temperature above 0 needs num_beams=1; found num_beams={config.num_beams}.")
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=drawn,
        temperature=config.sample_temperature if drawn else 1.0,
        seed=config.draw_seed,
    )


def _query(task: Task, prompt: str) -> str:
    try:
        return query_of(task, prompt)
    except Flaw:
        if task.query_pattern:
            wording = f"match the regular expression {task.query_pattern!r}, whose groups are the query"
        elif task.query_after:
            wording = f"hold {task.query_after!r} and the query after it"
        else:
            wording = "not be blank"
        raise ConfigError(f"A prompt of task {task.name} must {wording}; the prompt given does not.") from None
