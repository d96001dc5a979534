"""Measure the cost of checksums: read a run's files with and without them, in turn, in one run.

    python benchmarks/checksums.py [--users N] [--json FILE]

Reports seconds of processor time, the minimum of the rounds, because other work on the machine only adds to it. `read`
is the first part of every evaluation and training. It reads a simulated data set, finds the items in a full embedding
store, and gathers each history's vectors once from a newly opened store. `gather` is only the last of these steps, and
`gather again` gathers the same vectors a second time. `plug` loads weights of the default plug's size.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.encoders import HashEncoder
from personaplug.encoders.base import Vectors
from personaplug.encoders.embedding_store import EmbeddingStore, RowIds
from personaplug.encoders.encoded_sample import encode_samples
from personaplug.infra import tensor_files
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions

WIDTH = 384  # of MiniLM
ROUNDS = 15


class NoiseEncoder(HashEncoder):
    """Returns random vectors, because this benchmark does not depend on their values."""

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        vectors = np.random.default_rng(0).normal(size=(len(texts), self.width)).astype(np.float32)
        unit_vectors: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit_vectors


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Read without checksums inside a `with` block."""
    with (
        patch.object(EmbeddingStore, "_check", lambda *_, **__: None),
        patch("personaplug.encoders.embedding_store._checked_rows", lambda rows, _, salt: [row[:2] for row in rows]),
        patch.object(tensor_files, "checksum", lambda _: None),
        patch.object(tensor_files, "_is_finite", lambda _: True),
        patch.object(tensor_files, "KEY", "none"),
    ):
        yield


def spent(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(place: Path, users: int) -> dict[str, Any]:
    """Return the seconds of each part without and with checksums."""
    write_simulation(SimulationConfig(users=users, queries_per_user=2, dev_users=2, min_items=40, max_items=60), place)
    encoder, task = NoiseEncoder(WIDTH), load_task(place)
    rows = [s.rows for s in encode_samples(open_dataset(place, "train", task=task), _store(place, encoder))]
    tensors = {str(i): torch.randn(1024, 1024) for i in range(7)}
    tensor_files.save_tensors(place / "x.safetensors", tensors)
    parts: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for name, context in (("without", unchecked()), ("with", contextlib.nullcontext())):
            with context:
                store = _store(place, encoder)
                samples = spent(partial(encode_samples, open_dataset(place, "train", task=task), store))
                first = spent(partial(_gather, store, rows))
                again = spent(partial(_gather, store, rows))
                plug = spent(partial(_read, place / "x.safetensors"))
            seconds = {"read": samples + first, "gather": first, "gather again": again, "plug": plug}
            for part, value in seconds.items():
                parts.setdefault(part, {}).setdefault(name, []).append(value)
    table = {part: {name: round(min(values), 5) for name, values in each.items()} for part, each in parts.items()}
    facts = {"items": sum(map(len, rows)), "vectors": len(_store(place, encoder)), "width": WIDTH, "rounds": ROUNDS}
    return facts | {"seconds": table, "plug_bytes": sum(tensor.nbytes for tensor in tensors.values())}


def _gather(store: EmbeddingStore, rows: Sequence[RowIds]) -> None:
    for row_ids in rows:
        store.gather(row_ids)


def _read(path: Path) -> None:
    for tensor in tensor_files.load_tensors(path, remedy="").values():
        tensor.clone()  # the file is memory-mapped, and only a copy reads it


def _store(place: Path, encoder: HashEncoder) -> EmbeddingStore:
    return EmbeddingStore.open(place / "vectors", encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        results = measure(Path(place), arguments.users)
    for part, seconds in results["seconds"].items():
        more = seconds["with"] / seconds["without"] - 1
        print(f"{part:<13} {seconds['without']:.4f} s without, {seconds['with']:.4f} s with checksums ({more:+.1%})")
    if arguments.json:
        write_json(arguments.json, results | {"versions": package_versions(), "machine": machine_info()})


if __name__ == "__main__":
    main()
