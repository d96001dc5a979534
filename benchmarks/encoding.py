"""Bulk encoding of history items: items a second of ours beside raw sentence-transformers on the same texts.

    python benchmarks/encoding.py --data DIR [--data DIR …] [--texts 100000] [--once 100000] [--json FILE] [key=value …]

The texts are items of real histories in reading order, which repeat. Both sides encode the same slice in turn, so that
a shared machine's noise hits both; every slice is encoded with its repeats and, in another round, each text once.
Seconds of the processor are told too: with OMP_NUM_THREADS=1 they hardly depend on what else the machine does.
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

# As the command line sets it, before torch is loaded.
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
_WARM_UP = 600  # enough for what is made at the first large call


@dataclass(frozen=True)
class Slice:
    """One slice's times, by the clock and of the processor; ratios are raw over ours."""

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
    parser.add_argument("--once", type=int, default=100_000, help="most texts of the round that has each text once")
    parser.add_argument("--slice", type=int, default=4096, help="as many as are committed to a table at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="of the config, for instance encoder_engine=torch")
    given = parser.parse_args()
    config = load_config(overrides=[*PACKAGED_MODELS, "encoder_engine=auto", *given.settings])
    texts = list(islice(_items(given.data), given.texts))
    if len(texts) < given.texts:
        print(f"the data has {len(texts):,} items, fewer than the {given.texts:,} asked for")
    result = _measure(config, texts, once=given.once, size=given.slice)
    _print(result)
    if given.json:
        write_json(given.json, result | {"data": [folder.name for folder in given.data]})


def _items(folders: Sequence[Path]) -> Iterator[str]:
    """Items' texts as they are encoded: a sample from each set in turn, so that any number of them mixes all sets."""
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
    began = time.monotonic()
    encoder.encode([f"warm-up {number}" for number in range(_WARM_UP)])
    start_seconds = time.monotonic() - began
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
        # Who comes first changes, in case a slice warms something up for the next.
        timed = {side: _timed(encode) for side, encode in (sides if number % 2 == 0 else sides[::-1])}
        (theirs, *raw_seconds), (mine, *our_seconds) = timed["raw"], timed["ours"]
        cosine = float((theirs * mine).sum(axis=1).min())
        slices.append(Slice(len(part), raw_seconds[0], our_seconds[0], raw_seconds[1], our_seconds[1], cosine))
        print(f"{name}, slice {number + 1}: {len(part)} texts, {slices[-1].ratio:.2f} ×", flush=True)
    return slices


def _raw(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    found: Vectors = np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))
    return found


def _timed(encode: Callable[[], Vectors]) -> tuple[Vectors, float, float]:
    """Vectors, seconds by the clock, seconds of the processor."""
    began, used = time.monotonic(), time.process_time()
    return encode(), time.monotonic() - began, time.process_time() - used


def _summary(slices: Sequence[Slice]) -> dict[str, Any]:
    count = sum(one.texts for one in slices)
    theirs, mine = sum(one.raw_seconds for one in slices), sum(one.our_seconds for one in slices)
    return {
        "texts": count,
        "raw_items_per_second": count / theirs,
        "our_items_per_second": count / mine,
        "ratio": theirs / mine,
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
        f"{result['start_seconds']:.1f} s to start and for {_WARM_UP} short texts"
    )
    head = f"{'raw items/s':>12} {'ours':>8} {'ratio':>7} {'slices':>14} {'of processor':>13} {'smallest cosine':>17}"
    print(f"{'':<14} {head}")
    for name, found in result["rounds"].items():
        ratios = [one["ratio"] for one in found["slices"]]
        print(
            f"{name:<14} {found['raw_items_per_second']:>12.0f} {found['our_items_per_second']:>8.0f} "
            f"{found['ratio']:>6.2f}× {f'{min(ratios):.2f} to {max(ratios):.2f}':>14} "
            f"{found['processor_ratio']:>12.2f}× {found['smallest_cosine']:>17.6f}"
        )
    worst = min(found["ratio"] for found in result["rounds"].values())
    print(f"goal {GOAL} × raw: {'reached' if worst >= GOAL else 'MISSED'}")


if __name__ == "__main__":
    main()
