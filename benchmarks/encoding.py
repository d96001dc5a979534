"""Measure bulk encoding of history items, compared with raw sentence-transformers on the same texts.

    python benchmarks/encoding.py --data DIR [--data DIR …] [--texts 100000] [--once 100000] [--json FILE] [key=value …]

The texts are items of real histories in reading order, with their repeats. Both encoders take the same slice in turn,
so that noise of a shared machine affects both. One round encodes the slices with their repeats, another round encodes
each text once. The result also has seconds of processor time. With OMP_NUM_THREADS=1, these hardly depend on other
work on the machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

# Like the command line, before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
from sentence_transformers import SentenceTransformer

from personaplug.config import Config
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.encoders import Encoder, open_encoder
from personaplug.encoders.base import Vectors
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.infra.model_hub import PACKAGED_MODELS, find_model

GOAL = 1.5
_WARM_UP = 600  # texts; enough to trigger the work of the first large call


@dataclass(frozen=True)
class Slice:
    """Wall-clock and processor seconds of one slice. Ratios are raw over ours."""

    texts: int
    raw_seconds: float
    our_seconds: float
    raw_processor_seconds: float
    our_processor_seconds: float
    smallest_cosine: float

    @property
    def ratio(self) -> float:
        return self.raw_seconds / self.our_seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--once", type=int, default=100_000, help="texts of the second round, at most")
    parser.add_argument("--slice", type=int, default=4096, help="texts per slice")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="config settings, such as encoder_engine=torch")
    arguments = parser.parse_args()
    config = load_config(overrides=[*PACKAGED_MODELS, "encoder_engine=auto", *arguments.settings])
    texts = list(islice(_items(arguments.data), arguments.texts))
    if len(texts) < arguments.texts:
        print(f"the data has {len(texts):,} items, fewer than --texts {arguments.texts:,}")
    result = _measure(config, texts, once=arguments.once, size=arguments.slice)
    _print(result)
    if arguments.json:
        write_json(arguments.json, result | {"data": [folder.name for folder in arguments.data]})


def _items(folders: Sequence[Path]) -> Iterator[str]:
    """Yield the texts of items. Take a sample from each set in turn, so that any number of texts mixes all sets."""
    readers = [iter(open_dataset(folder, "train", task=load_task(folder))) for folder in folders]
    while readers:
        for reader in list(readers):
            sample = next(reader, None)
            if sample is None:
                readers.remove(reader)
            else:
                yield from (item.text for item in sample.history)


def _measure(config: Config, texts: Sequence[str], *, once: int, size: int) -> dict[str, Any]:
    encoder = open_encoder(config.model.encoder, device="cpu", engine=config.model.encoder_engine)
    raw = SentenceTransformer(str(find_model(config.model.encoder)), device="cpu", local_files_only=True)
    distinct = list(dict.fromkeys(texts))
    start = time.monotonic()
    encoder.encode([f"warm-up {number}" for number in range(_WARM_UP)])
    start_seconds = time.monotonic() - start
    _raw(raw, ["warm-up"] * 32)
    rounds = {
        name: _round(raw, encoder, part, size=size, name=name)
        for name, part in (("as they come", texts), ("each once", distinct[:once]))
    }
    compiled = getattr(encoder, "_compiled", None)
    return {
        "encoder": encoder.identity.describe(),
        "engine": f"openvino, {compiled.precision}" if compiled else "torch",
        "texts": len(texts),
        "duplicates_share": 1 - len(distinct) / len(texts),
        "mean_characters": sum(map(len, texts)) / len(texts),
        "start_seconds": start_seconds,
        "rounds": {name: _summary(slices) for name, slices in rounds.items()},
        "versions": package_versions(("personaplug", "torch", "transformers", "sentence-transformers", "openvino")),
        "machine": machine_info(),
    }


def _round(raw: SentenceTransformer, encoder: Encoder, texts: Sequence[str], *, size: int, name: str) -> list[Slice]:
    slices = []
    for number, start in enumerate(range(0, len(texts), size)):
        part = texts[start : start + size]
        sides: list[tuple[str, Callable[[], Vectors]]] = [
            ("raw", lambda part=part: _raw(raw, part)),  # type: ignore[misc]
            ("ours", lambda part=part: encoder.encode(part)),  # type: ignore[misc]
        ]
        # Alternate the order, because the first encoder may warm up caches for the second.
        timed = {side: _timed(encode) for side, encode in (sides if number % 2 == 0 else sides[::-1])}
        (raw_vectors, *raw_seconds), (our_vectors, *our_seconds) = timed["raw"], timed["ours"]
        cosine = float((raw_vectors * our_vectors).sum(axis=1).min())
        slices.append(Slice(len(part), raw_seconds[0], our_seconds[0], raw_seconds[1], our_seconds[1], cosine))
        print(f"{name}, slice {number + 1}: {len(part)} texts, {slices[-1].ratio:.2f} ×", flush=True)
    return slices


def _raw(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    vectors: Vectors = np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))
    return vectors


def _timed(encode: Callable[[], Vectors]) -> tuple[Vectors, float, float]:
    """Return the vectors, the wall-clock seconds and the processor seconds."""
    start, processor_start = time.monotonic(), time.process_time()
    return encode(), time.monotonic() - start, time.process_time() - processor_start


def _summary(slices: Sequence[Slice]) -> dict[str, Any]:
    count = sum(one.texts for one in slices)
    raw_seconds, our_seconds = sum(one.raw_seconds for one in slices), sum(one.our_seconds for one in slices)
    return {
        "texts": count,
        "raw_items_per_second": count / raw_seconds,
        "our_items_per_second": count / our_seconds,
        "ratio": raw_seconds / our_seconds,
        "processor_ratio": sum(one.raw_processor_seconds for one in slices)
        / sum(one.our_processor_seconds for one in slices),
        "median_slice_ratio": median(one.ratio for one in slices),
        "smallest_cosine": min(one.smallest_cosine for one in slices),
        "slices": [asdict(one) | {"ratio": one.ratio} for one in slices],
    }


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['texts']:,} texts of {result['mean_characters']:.0f} characters on average, "
        f"{result['duplicates_share']:.0%} of them duplicates; engine {result['engine']}, "
        f"{result['start_seconds']:.1f} s to start and to encode {_WARM_UP} short texts"
    )
    head = f"{'raw items/s':>12} {'ours':>8} {'ratio':>7} {'slices':>14} {'processor':>13} {'smallest cosine':>17}"
    print(f"{'':<14} {head}")
    for name, summary in result["rounds"].items():
        ratios = [one["ratio"] for one in summary["slices"]]
        print(
            f"{name:<14} {summary['raw_items_per_second']:>12.0f} {summary['our_items_per_second']:>8.0f} "
            f"{summary['ratio']:>6.2f}× {f'{min(ratios):.2f} to {max(ratios):.2f}':>14} "
            f"{summary['processor_ratio']:>12.2f}× {summary['smallest_cosine']:>17.6f}"
        )
    worst = min(summary["ratio"] for summary in result["rounds"].values())
    print(f"goal {GOAL} × raw: {'reached' if worst >= GOAL else 'MISSED'}")


if __name__ == "__main__":
    main()
