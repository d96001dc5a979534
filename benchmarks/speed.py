"""Training and evaluation speed of prefix training, beside the floor set by operations and this machine's matrix rate.

    python benchmarks/speed.py --data DIR [--json FILE] [key=value …]

The floor counts multiplications of the frozen model's linear layers and attention (forward, and backward to the inputs;
no weight has a gradient), of its output layer at label positions only, and of the trained encoder and projector. It
counts no memory traffic, norms, softmaxes or Python: what lies above it is theirs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from personaplug.answers import answer
from personaplug.backends.base import GenerationConfig
from personaplug.config import load_config
from personaplug.data import load_task, open_dataset
from personaplug.files import write_json
from personaplug.memory import peak_memory
from personaplug.objectives import PlugObjective
from personaplug.personalizer import Personalizer
from personaplug.plug import PersonaPlug
from personaplug.recipes import build_plug
from personaplug.run import Models, Run, machine, open_models, versions
from personaplug.samples import EncodedSample
from personaplug.training import fit
from personaplug.vectors import VectorTable


@dataclass(frozen=True)
class Work:
    """Multiply-adds, counted twice as usual, of one sample."""

    train: float
    score: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    config = load_config(overrides=["epochs=1", "controls=false", *given.settings])
    with tempfile.TemporaryDirectory() as place:
        run = Run.create(Path(place) / "run", config=config, task=load_task(given.data))
        models = open_models(config)
        table = run.open_vectors(models.encoder)
        samples = run.read_samples(open_dataset(given.data, "train", task=run.task), table, limit=given.samples)
        result = _measure(run, models, table, samples)
    _print(result)
    if given.json:
        write_json(given.json, result)


def _measure(run: Run, models: Models, table: VectorTable, samples: list[EncodedSample]) -> dict[str, Any]:
    rate_before = matrix_rate(models)
    plug = build_plug(run, models, seed=0)
    stamps: list[float] = []
    quiet = replace(run.config.training, validation_limit=1, validate_every=10**6, checkpoint_every=10**6)
    report = fit(
        PlugObjective(plug, models.backend, table=table),
        samples=samples,
        config=quiet,
        seed=0,
        folder=run.folder / "fit",
        title="train",
        on_step=lambda: stamps.append(time.monotonic()),
    )
    # The first step allocates; the steps after it are the steady state.
    train_rate = report.samples * (report.steps - 1) / report.steps / (stamps[-1] - stamps[0])
    train_peak = peak_memory()
    answers = answer(
        models.backend,
        samples,
        prompter=Personalizer(plug, table=table),
        task=run.task,
        decoding="score" if run.task.labels else "generate",
        generation=GenerationConfig(max_new_tokens=run.task.max_new_tokens),
        batch_size=run.config.evaluation.evaluation_batch_size,
    )
    rate = (rate_before + matrix_rate(models)) / 2
    work = count(models, plug, samples)
    return {
        "task": run.task.name,
        "model": models.backend.identity.describe(),
        "dtype": str(models.backend.model.dtype),
        "batch_size": run.config.training.batch_size,
        "prompt_tokens_mean": _mean_tokens(models, samples),
        "matrix_gflops_per_second": rate / 1e9,
        "train_samples_per_second": train_rate,
        "train_floor_samples_per_second": rate / work.train,
        "train_gflop_per_sample": work.train / 1e9,
        "evaluation_samples_per_second": len(samples) / answers.seconds,
        "evaluation_floor_samples_per_second": rate / work.score if run.task.labels else None,
        "train_peak_memory_bytes": train_peak,
        "evaluation_peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "machine": machine(),
    }


def matrix_rate(models: Models) -> float:
    """Multiply-adds (× 2) a second of the model's own widest product, at 1,024 tokens."""
    weight = max(
        (
            p
            for n, p in models.backend.model.named_parameters()
            if "embed" not in n and p.dim() == 2 and "lm_head" not in n and "shared" not in n
        ),
        key=torch.Tensor.numel,
    )
    x = torch.randn(1024, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = float("inf")
    for _ in range(5):
        began = time.monotonic()
        for _ in range(20):
            torch.nn.functional.linear(x, weight)
        best = min(best, (time.monotonic() - began) / 20)
    return 2.0 * x.shape[0] * int(weight.numel()) / best


def count(models: Models, plug: PersonaPlug, samples: list[EncodedSample]) -> Work:
    """The operations of prefix training, per sample; means of lengths stand for the lengths, which only lowers it."""
    config, renderer = models.backend.model.config, models.backend.renderer
    linear = sum(
        p.numel()
        for n, p in models.backend.model.named_parameters()
        if p.dim() == 2 and not any(word in n for word in ("embed", "lm_head", "shared"))
    )
    soft = plug.config.instruction_tokens + plug.config.persona_tokens
    prompt = _mean_tokens(models, samples) + soft
    target = sum(len(renderer.answer(s.target or "")) for s in samples) / len(samples)
    head = 2 * config.vocab_size * config.hidden_size
    # An answer's last token is never read. Each token attends to those before it: half of all pairs, twice multiplied.
    read = prompt + target - 1
    attention = 2 * config.num_hidden_layers * config.hidden_size * read**2
    # A label's first token comes from the prompt's last position: labels of one token add nothing to read.
    labels = renderer.answers(plug.fitting.labels)
    scored = prompt + sum(len(label) - 1 for label in labels)
    plugged = _of_plug(plug, samples)
    # To the inputs only, a product costs as much backward as forward; attention, with both factors, twice as much.
    return Work(
        train=2 * (2 * linear * read + head * target) + 3 * attention + 6 * plugged,
        score=2 * linear * scored + 2 * config.num_hidden_layers * config.hidden_size * prompt**2 + head + 2 * plugged,
    )


def _of_plug(plug: PersonaPlug, samples: list[EncodedSample]) -> float:
    """Trained weights times how often each is used for a sample; the frozen encoder under a query head is left out."""
    if not plug.config.persona_tokens:
        return 0.0
    mask = plug.query_encoder.features([s.query for s in samples]).get("attention_mask")  # type: ignore[operator]
    whole_copy = plug.config.query_encoder == "trained" and mask is not None
    tokens = float(mask.sum()) / len(samples) if whole_copy else 1.0
    items = sum(min(len(s.rows), plug.config.max_history) for s in samples) / len(samples)
    return _weights(plug.query_encoder) * tokens + _weights(plug.projector) * items


def _weights(module: torch.nn.Module) -> int:
    """Trained matrices that are multiplied with, not looked up in."""
    named = ((n, p) for n, p in module.named_parameters() if p.requires_grad and p.dim() == 2)
    return sum(p.numel() for n, p in named if "embeddings" not in n and not n.startswith("answer."))


def _mean_tokens(models: Models, samples: list[EncodedSample]) -> float:
    return sum(m.tokens for m in models.backend.measure([s.prompt for s in samples])) / len(samples)


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['task']}, {result['model']}, {result['dtype']}, {result['prompt_tokens_mean']:.0f} tokens a prompt, "
        f"batches of {result['batch_size']}"
    )
    print(f"matrix rate of this machine   {result['matrix_gflops_per_second']:.0f} GFLOP/s")
    for what in ("train", "evaluation"):
        rate, floor = result[f"{what}_samples_per_second"], result[f"{what}_floor_samples_per_second"]
        beside = f", {floor:.1f} at the floor, {floor / rate:.1f} × away" if floor else ""
        print(f"{what:<29} {rate:.1f} samples/s{beside}")
    print(
        f"peak memory                   {result['train_peak_memory_bytes'] / 1e9:.2f} GB training, "
        f"{result['evaluation_peak_memory_bytes'] / 1e9:.2f} GB evaluation"
    )
    print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "machine")}))


if __name__ == "__main__":
    main()
