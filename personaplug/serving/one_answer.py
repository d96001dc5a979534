"""Answer one prompt with an engine, without a server and without a store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from personaplug.analysis.point_estimates import LabelDistribution
from personaplug.config import EvaluationConfig
from personaplug.data.records import HistoryItem
from personaplug.errors import EngineFailure
from personaplug.inference import Answer, check_input, persona_for
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Run
from personaplug.serving.config import ServingConfig
from personaplug.serving.engines import find_engine
from personaplug.serving.engines.base import Engine, EngineRequest
from personaplug.serving.openai_protocol import ChatRequest
from personaplug.serving.setup import open_parts


def answer_once(
    run: Run,
    prompt: str,
    *,
    history: str | Path | Sequence[HistoryItem],
    config: ServingConfig,
    evaluation: EvaluationConfig,
    plain: bool = False,
    probabilities: bool = False,
) -> Answer:
    """Answer one prompt, as `inference.generate` does, with the engine of a serving config. It decodes without beams.

    Args:
        history: the user's items, or a file for `read_items`; empty for a new user.
        plain: answer without the plug.
        probabilities: return the probability of each label, if the engine supports this.
    Raises:
        ConfigError: as for `inference.generate`, or if the engine refuses the plug.
        RequestError: if the engine refuses the prompt.
    """
    items = check_input(run, prompt, history)
    encoder, load_plug = open_parts(run, seed=config.seed)
    longest = evaluation.max_new_tokens or run.task.max_new_tokens
    config = replace(config, max_new_tokens=longest)  # the engine would cut longer texts at the server's limit
    engine, plug = find_engine(config.engine).open(run.config.model, config, load_plug)
    personalizer = Personalizer(plug, persona_scale=evaluation.persona_scale)
    soft = None if plain else persona_for(prompt, items, run=run, personalizer=personalizer, encoder=encoder)
    choices = run.task.labels if evaluation.decoding != "generate" else ()
    body = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0 if choices else evaluation.sample_temperature,
            "seed": evaluation.draw_seed,
            "max_tokens": longest,
            "personaplug": {"probabilities": probabilities},
        }
    )
    reply = asyncio.run(_reply(engine, EngineRequest(body, soft, choices)))
    distribution = reply.get("personaplug")
    text = str(reply["choices"][0]["message"]["content"]).strip()
    return Answer(text, None if distribution is None else LabelDistribution(**distribution))


async def _reply(engine: Engine, request: EngineRequest) -> dict[str, Any]:
    """Start an engine, let it answer one request, and close it."""
    await engine.start()
    try:
        reply = await engine.respond(request)
    finally:
        await engine.close()
    with suppress(ValueError):
        found = json.loads(reply.body) if isinstance(reply.body, bytes) else None
        if reply.status == 200 and isinstance(found, dict):
            return found
    raise EngineFailure(f"The engine refused the request (status {reply.status}).")
