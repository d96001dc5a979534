"""Measure the cost of a training step, compared with the released PPlug code's and with a lower bound by operations.

    python benchmarks/speed.py --data DIR [--json FILE] [--batch 64] [--rounds 3] [--parts history,…] [key=value …]

All methods use the same model, samples and batch in one run. They take turns, so that noise of the machine affects all:

a  reference-like  like the released code: prompt padded to 266 tokens, query to 276, history to 512 items; each item
                   projected to the model's width; nothing cached; backward pass through the whole prompt
b  prefix          this package, with the paper's method and placement
c  suffix          this package, with cached prompts

The lower bound (floor) counts multiplications at the matrix rate that is measured in the same run: the frozen model's
linear layers and attention (forward, and backward to the inputs, because weights have no gradient), its output layer at
label positions only, and the trained parts. It excludes memory traffic, norms, softmaxes and Python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Like the command line, before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import Tensor

from personaplug.config import PAPER, Config
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import last_message
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.infra.model_hub import PACKAGED_MODELS
from personaplug.llm.base import GenerationConfig
from personaplug.llm.padding import pad
from personaplug.llm.soft_prompt import IGNORED
from personaplug.methods.predictions import predict_samples
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run, open_models
from personaplug.training.batching import micro_batches
from personaplug.training.objectives import PlugObjective
from personaplug.training.parts import build_plug

PROMPT, QUERY, HISTORY = 266, 276, 512  # the fixed lengths of the released code: 256 tokens + answer, 256 + 20, items
WAYS = {
    "a reference-like": ("placement=prefix", "query_encoder=trained"),
    "b prefix": ("placement=prefix", "query_encoder=trained"),
    "b prefix, query head": ("placement=prefix", "query_encoder=head"),
    "c suffix": ("placement=suffix", "query_encoder=trained"),
    "c suffix, query head": ("placement=suffix", "query_encoder=head"),
}
PARTS = ("answers", "history", "epoch", "evaluation")
ITEMS = (16, 64, 256, 512)


class ReferenceObjective(PlugObjective):
    """Computes the same loss at the released code's fixed sizes, including all padding."""

    def loss(self, samples: Sequence[EncodedSample]) -> tuple[Tensor, Tensor]:
        llm: Any = self.llm
        soft = self._soft([sample.query for sample in samples], samples)
        prompts = [llm.prompt_tokenizer.encode_prompt(sample.prompt).ids for sample in samples]
        answers = llm.prompt_tokenizer.encode_targets([sample.target or "" for sample in samples], labels=self.labels)
        longest = max(map(len, answers))
        fixed = PROMPT - soft.shape[1] - longest
        rows = [ids[:fixed] for ids in prompts]
        padding = [fixed - len(row) for row in rows]
        mask = torch.tensor([[1] * soft.shape[1] + [0] * n + [1] * (PROMPT - soft.shape[1] - n) for n in padding])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        text = llm.embed(torch.tensor([[0] * (fixed - len(row)) + list(row) for row in rows]))
        targets = pad(answers, fill=IGNORED, side="right")
        embeds = torch.cat([soft.to(text.dtype), text, llm.embed(targets.clamp(min=0))], dim=1)
        columns = torch.arange(PROMPT - longest - 1, PROMPT - 1)
        logits = llm.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=columns,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="sum")
        return loss, (targets != IGNORED).sum()

    def _soft(self, queries: list[str], samples: Sequence[EncodedSample]) -> Tensor:
        plug = self.personalizer.plug
        assert plug.persona is not None
        assert plug.persona.query_encoder is not None
        features = plug.persona.query_encoder.features(queries)
        tokens = ("input_ids", "attention_mask", "token_type_ids")
        padded = {name: _padded(value) if name in tokens else value for name, value in features.items()}
        query = plug.persona.query_encoder(padded)
        items = torch.zeros(len(samples), HISTORY, query.shape[-1])
        mask = torch.zeros(len(samples), HISTORY, dtype=torch.bool)
        for row, sample in enumerate(samples):
            latest = sample.rows[-HISTORY:]
            assert self.personalizer.table is not None
            items[row, : len(latest)] = torch.from_numpy(self.personalizer.table.gather(latest)).float()
            mask[row, : len(latest)] = True
        weights = torch.einsum("be,bne->bn", query, items).masked_fill(~mask, -1e9).softmax(dim=1)
        count = items.shape[0] * HISTORY
        label_ids, style = torch.full((count,), -1), torch.empty(count, 0)
        hidden = plug.persona.projector.hidden(
            items.flatten(0, 1), label_ids=label_ids, style=style, kind_ids=torch.zeros_like(label_ids)
        )
        projected = plug.persona.projector.out(hidden, weight_sums=torch.ones(count), tokens=slice(None))
        persona = torch.einsum("bn,bnkd->bkd", weights, projected.view(*weights.shape, *projected.shape[1:]))
        instruction = plug.instruction.expand(len(samples), -1, -1)
        return torch.cat([instruction, persona], dim=1) * plug.spec.embedding_scale


def _padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, QUERY - values.shape[1]))


class Way:
    """A training method: its objective, its optimizer and the times of its steps."""

    def __init__(self, name: str, run: Run, models: Models, *, table: EmbeddingStore, settings: Sequence[str]) -> None:
        self.name = name
        self.run = replace(run, config=load_config(overrides=[*settings, *WAYS[name]], base=run.config))
        self.plug = build_plug(self.run, models, seed=0)
        kind = ReferenceObjective if name.startswith("a") else PlugObjective
        self.objective = kind(self.plug, models.llm, table=table, labels=run.task.labels)
        self.optimizer = torch.optim.AdamW(
            self.objective.parameter_groups(self.run.config.training), lr=1e-4, fused=True
        )
        self.seconds: list[float] = []
        self.peak = 0

    def step(self, batch: Sequence[EncodedSample], *, lengths: Sequence[int]) -> float:
        """Train one step; return its seconds."""
        reset_peak_memory()
        start = time.monotonic()
        self.plug.train()
        self.optimizer.zero_grad()
        for part in micro_batches(
            batch, lengths=lengths, max_tokens=self.run.config.training.max_tokens_per_microbatch
        ):
            torch.autograd.backward(self.objective.loss(part)[0])
        self.optimizer.step()
        seconds = time.monotonic() - start
        self.seconds.append(seconds)
        self.peak = max(self.peak, peak_memory())
        return seconds

    def lengths(self, samples: Sequence[EncodedSample]) -> list[int]:
        """Return the tokens of each sample in a pass."""
        return [PROMPT] * len(samples) if self.name.startswith("a") else self.objective.live_lengths(samples)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, comma-separated")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    # Always the paper's plug, because the benchmark compares ways to train it.
    config = load_config(overrides=[*PACKAGED_MODELS, *arguments.settings], base=Config(plug=PAPER))
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", config=config, task=load_task(arguments.data))
        models = open_models(config)
        table = run.open_vectors(models.encoder)
        samples = run.read_samples(
            open_dataset(arguments.data, "train", task=run.task), table, limit=8 * arguments.batch
        )
        result = _about(run, models, samples, batch=arguments.batch)
        for tokens in (1, 10) if "answers" in parts else ():
            result[f"answers_of_{tokens}"] = _ways(
                run, models, table, _answering(samples, models, tokens=tokens), arguments=arguments, tokens=tokens
            )
        if "history" in parts:
            result["history"] = _histories(run, models, table, samples[: arguments.batch], arguments=arguments)
        if "epoch" in parts:
            result["epoch"] = _epochs(run, models, table, samples, arguments=arguments)
        if "evaluation" in parts:
            result["evaluation"] = _evaluation(
                run, models, table, samples[: arguments.batch], settings=arguments.settings
            )
    print(json.dumps({key: value for key, value in result.items() if key not in ("versions", "machine")}))
    if arguments.json:
        write_json(arguments.json, result)


def _about(run: Run, models: Models, samples: Sequence[EncodedSample], *, batch: int) -> dict[str, Any]:
    about: dict[str, Any] = {
        "task": run.task.name,
        "model": models.llm.identity.describe(),
        "dtype": models.llm.dtype,
        "batch_size": batch,
        "prompt_tokens_mean": _mean_tokens(models, samples),
        "versions": package_versions(),
        "machine": machine_info(),
    }
    print(
        f"{about['task']}, {about['model']}, {about['dtype']}, {about['prompt_tokens_mean']:.0f} tokens per prompt, "
        f"{batch} views per step, {about['machine']['processor']}, {about['machine']['threads']} threads"
    )
    return about


def _answering(samples: Sequence[EncodedSample], models: Models, *, tokens: int) -> list[EncodedSample]:
    """Return the samples (with labels of one token), or copies with answers of `tokens` tokens from their prompts."""
    if tokens == 1:
        return list(samples)
    # One of the tokens is the end of text.
    return [replace(one, target=models.llm.cut_text(last_message(one.prompt), tokens - 1)) for one in samples]


def _ways(
    run: Run,
    models: Models,
    table: EmbeddingStore,
    samples: Sequence[EncodedSample],
    *,
    arguments: argparse.Namespace,
    tokens: int,
) -> dict[str, Any]:
    batch = list(samples[: arguments.batch])
    models.llm.cache_prompts([sample.prompt for sample in batch])
    ways = [Way(name, run, models, table=table, settings=arguments.settings) for name in WAYS]
    rates = []
    for turn in range(arguments.rounds + 1):
        rates.append(matrix_rate(models))
        for way in ways:
            # The fast methods take many steps in the time of one slow step. The first turn allocates and warms up.
            for _ in range(1 if way.name[0] != "c" else 8):
                way.step(batch, lengths=way.lengths(batch))
            if turn == 0:
                way.seconds.clear()
    rate = statistics.median(rates)
    print(f"\nanswers of {tokens} token{'s' if tokens > 1 else ''}; matrix rate {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':<24}{'views/s':>9}{'to (a)':>9}{'lower bound':>14}{'distance':>10}{'peak memory':>13}")
    results: dict[str, Any] = {"matrix_gflops_per_second": rate / 1e9}
    slowest = statistics.median(ways[0].seconds)
    for way in ways:
        seconds = statistics.median(way.seconds)
        floor = rate / work(models, way.plug, batch, cached=way.name.startswith("c"), labels=run.task.labels)
        views = len(batch) / seconds
        results[way.name] = {
            "views_per_second": views,
            "times_reference": slowest / seconds,
            "floor_views_per_second": floor,
            "peak_memory_bytes": way.peak,
        }
        print(
            f"{way.name:<24}{views:>9.1f}{slowest / seconds:>8.1f}×{floor:>14.0f}{floor / views:>9.1f}×"
            f"{way.peak / 1e9:>10.2f} GB"
        )
    return results


def _histories(
    run: Run, models: Models, table: EmbeddingStore, batch: Sequence[EncodedSample], *, arguments: argparse.Namespace
) -> dict[str, float]:
    """Return the seconds of a suffix step by number of history items, which are drawn from the table."""
    rng = np.random.default_rng(0)
    way = Way("c suffix, query head", run, models, table=table, settings=arguments.settings)
    models.llm.cache_prompts([sample.prompt for sample in batch])
    longer = {
        items: [
            replace(
                one,
                rows=rng.integers(len(table), size=items),
                label_ids=np.full(items, -1, np.int16),
                style=no_style(items),
                kind_ids=all_answers(items),
            )
            for one in batch
        ]
        for items in ITEMS
    }
    times: dict[int, list[float]] = {items: [] for items in ITEMS}
    for turn in range(5 * arguments.rounds):
        for items in ITEMS:
            seconds = way.step(longer[items], lengths=way.lengths(batch))
            if turn:
                times[items].append(seconds)
    results = {str(items): statistics.median(times[items]) for items in ITEMS}
    print(f"\nsuffix, {len(batch)} views per step, by items of history")
    for count, median in results.items():
        print(f"{count:>6} items {median:>8.3f} s per step {median / results[str(ITEMS[0])]:>6.2f} ×")
    return results


def _epochs(
    run: Run, models: Models, table: EmbeddingStore, samples: Sequence[EncodedSample], *, arguments: argparse.Namespace
) -> dict[str, float]:
    """Return the seconds of an epoch with cached prompts, by number of samples."""
    way = Way("c suffix, query head", run, models, table=table, settings=arguments.settings)
    models.llm.cache_prompts([sample.prompt for sample in samples])
    results: dict[str, float] = {}
    print("\nsuffix, an epoch by samples")
    for count in (len(samples) // 4, len(samples) // 2, len(samples)):
        batches = [samples[start : start + arguments.batch] for start in range(0, count, arguments.batch)]
        seconds = results[str(count)] = sum(way.step(batch, lengths=way.lengths(batch)) for batch in batches)
        print(f"{count:>6} samples {seconds:>7.2f} s, {1000 * seconds / count:.2f} ms per sample")
    return results


def _evaluation(
    run: Run, models: Models, table: EmbeddingStore, samples: Sequence[EncodedSample], *, settings: Sequence[str]
) -> dict[str, float]:
    """Return the samples per second when scoring labels or generating, without and with cached prompts."""
    results: dict[str, float] = {}
    print("\nevaluation, samples/s")
    models.llm.clear_cache()
    for title in ("b prefix", "c suffix", "c suffix, prompts kept"):
        way = Way(title.partition(",")[0], run, models, table=table, settings=settings)
        personalizer = Personalizer(way.plug.eval(), table=table)
        start = time.monotonic()
        predict_samples(
            models.llm,
            samples,
            prompter=personalizer,
            task=run.task,
            decoding="score" if run.task.labels else "generate",
            generation=GenerationConfig(max_new_tokens=run.task.max_new_tokens),
            batch_size=run.config.evaluation.evaluation_batch_size,
        )
        results[title] = len(samples) / (time.monotonic() - start)
        print(f"{title:<24}{results[title]:>8.1f}")
    return results


def matrix_rate(models: Models) -> float:
    """Measure the floating-point operations per second of the model's largest matrix product, at 1,024 tokens."""
    weight = max((p for n, p in models.llm.model.named_parameters() if _linear(n, p)), key=torch.Tensor.numel)
    x = torch.randn(1024, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = float("inf")
    for _ in range(5):
        start = time.monotonic()
        for _ in range(20):
            torch.nn.functional.linear(x, weight)
        best = min(best, (time.monotonic() - start) / 20)
    return 2.0 * x.shape[0] * int(weight.numel()) / best


def work(
    models: Models, plug: PersonaPlug, samples: Sequence[EncodedSample], *, cached: bool, labels: Sequence[str]
) -> float:
    """Return the minimum operations of a view. Mean lengths replace the lengths, which only lowers the number."""
    config, prompt_tokenizer = models.llm.model.config, models.llm.prompt_tokenizer
    linear = sum(p.numel() for n, p in models.llm.model.named_parameters() if _linear(n, p))
    soft = plug.config.instruction_tokens + plug.config.persona_tokens
    prompt = _mean_tokens(models, samples)
    target = sum(map(len, prompt_tokenizer.encode_targets([s.target or "" for s in samples], labels=labels))) / len(
        samples
    )
    head: int = 2 * config.vocab_size * config.hidden_size
    # The model never reads an answer's last token.
    live: float = soft + target - 1 + (0 if cached else prompt)
    pairs = live * prompt + live**2 / 2 if cached else live**2 / 2
    attention: float = 4 * config.num_hidden_layers * config.hidden_size * pairs
    # A backward pass to the inputs only costs as much as the forward pass. Attention costs twice as much, because both
    # factors get a gradient. If the prompt is cached, half of these gradients are not needed.
    frozen: float = 2 * (2 * linear * live + head * target)
    return frozen + (2 if cached else 3) * attention + 6 * _of_plug(plug, samples)


def _of_plug(plug: PersonaPlug, samples: Sequence[EncodedSample]) -> float:
    """Return the sum of trained weights times their uses per view."""
    if plug.persona is None:
        return 0.0
    tokens, projector, query_encoder = 1.0, plug.persona.projector, plug.persona.query_encoder
    if query_encoder is not None:
        mask = query_encoder.features([s.query for s in samples]).get("attention_mask")
        tokens = tokens if mask is None else float(mask.sum()) / len(samples)
    items = sum(min(len(s.rows), plug.config.max_history) for s in samples) / len(samples)
    inner, outer = projector.inner.weight.numel(), projector.outer.weight.numel()
    query_weights = _weights(query_encoder) if query_encoder is not None else 0
    return float(query_weights * tokens + inner * items + outer)


def _weights(module: torch.nn.Module) -> int:
    """Count the weights of trained matrices, without lookup tables."""
    matrices = ((n, p) for n, p in module.named_parameters() if p.requires_grad and p.dim() == 2)
    return sum(p.numel() for n, p in matrices if "embeddings" not in n)


def _linear(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and not any(word in name for word in ("embed", "lm_head", "shared"))


def _mean_tokens(models: Models, samples: Sequence[EncodedSample]) -> float:
    return sum(m.tokens for m in models.llm.measure([s.prompt for s in samples])) / len(samples)


if __name__ == "__main__":
    main()
