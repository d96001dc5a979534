"""The card that a saved plug carries: what it fits, how it was trained, and what it does not promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from personaplug.config import PlugConfig
from personaplug.encoders import EncoderIdentity
from personaplug.infra.model_hub import LLMIdentity


def model_card(
    config: PlugConfig, llm: LLMIdentity, *, encoder: EncoderIdentity, values: int, facts: Mapping[str, Any]
) -> str:
    """The card of a plug, in Markdown.

    Args:
        llm, encoder: the two models that it fits.
        values: how many are trained.
        facts: what is to be told of the training (data, steps, losses).
    """
    settings = "\n".join(f"| {f.name} | {getattr(config, f.name)} |" for f in fields(config))
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items()) or "- (nothing was noted)"
    return f"""---
library_name: personaplug
base_model: {llm.name}
tags: [personalization, soft-prompt]
---

# A persona plug for {llm.name}

Turns a user's history into {config.persona_tokens} soft tokens, after {config.instruction_tokens} that are
the same for everybody, for a language model whose weights stay as they are. {values:,} trained values.

It fits these two models only, and checks that on loading:

- language model: {llm.describe()}, revision {llm.revision or "unknown"}
- encoder: {encoder.describe()}

```python
plug = PersonaPlug.from_pretrained("this folder", encoder=encoder, llm=backend.identity)
```

## Training

{told}

| setting | value |
|---|---|
{settings}

## What it does not promise

A gain over the plain model may be the task, learned by any soft token, and not the person: compare with the rows
instruction-only and wrong-user of `personaplug evaluate`. Persona tokens are made from a user's texts and can give some
of them away; treat them as personal data.
"""
