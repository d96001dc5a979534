"""Settings for a training that takes a second."""

from __future__ import annotations

TINY = (
    "llm=toy",
    "encoder=hash:32",
    "batch_size=4",
    "epochs=2",
    "save_steps=3",
    "eval_steps=5",
    "learning_rate=0.01",
    "dtype=float32",
)
