"""Helpers for data-parallel runs: rank and world size, sharding, all-reduce, and error propagation to all ranks.

A launcher (`accelerate launch`, torchrun) starts one command several times. All ranks must call these functions in the
same order. In a single process, these functions do nothing and torch.distributed is not initialized.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from personaplug.errors import ConfigError, PersonaPlugError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
Error = TypeVar("Error", bound=Exception)

# The main process may encode items or generate answers for hours while the others wait.
_TIMEOUT = timedelta(days=7)
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SHARED = "raised_on_all_ranks"


def rank() -> int:
    """Return the index of this process, from 0."""
    return _launch_info()[0]


def world_size() -> int:
    """Return the number of processes."""
    return _launch_info()[1]


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return _launch_info()[2]


def is_main() -> bool:
    """Return whether this process writes files and prints."""
    return rank() == 0


def is_single_cpu_launch() -> bool:
    """Return whether `accelerate launch --cpu` started only one process, because it leaves other processes to MPI."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return on_cpu and "MASTER_ADDR" in os.environ and not _is_launched()


def connect(device: str) -> None:
    """Join the process group for models on `device`, if this process has not joined yet."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        return
    kind, _, index = device.partition(":")
    local, gpus = local_world_size(), torch.cuda.device_count()
    if index or (kind == "cuda" and gpus < local):
        raise ConfigError(
            f"Each process needs its own GPU; found {local} processes on this machine, {gpus} GPUs and "
            f"model.device={device}. Start at most {max(1, gpus)} processes, with device=auto."
        )
    if PartialState(cpu=kind == "cpu", timeout=_TIMEOUT).num_processes != world_size():
        raise ConfigError(
            f"Several processes need model.device cpu or cuda; found {world_size()} processes and "
            f"model.device={device}. Start one process, or choose another device."
        )


def disconnect() -> None:
    """Leave the process group."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def shard(items: Sequence[T]) -> list[T]:
    """Return the items of this rank: every n-th item for n ranks; the result may be empty."""
    return list(items[rank() :: world_size()])


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks. The result is bit-identical on all ranks."""
    if world_size() == 1:
        return list(values)
    import torch

    return [float(total) for total in _sum_over_ranks(torch.tensor(values, dtype=torch.float64))]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all ranks; a missing gradient counts as zeros.

    A gradient that is missing on all ranks stays None, so that the optimizer skips its parameter as in one process.
    """
    if world_size() == 1:
        return
    import torch

    parameters = list(parameters)
    counts = all_reduce_sum([parameter.grad is not None for parameter in parameters])
    for parameter, count in zip(parameters, counts, strict=True):
        if count:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = _sum_over_ranks(gradient)


@contextmanager
def synchronized() -> Iterator[None]:
    """Run a block on all ranks and wait for all ranks. An error on one rank is raised on all ranks.

    The block must not wait for other ranks, because it would wait forever for a rank that has failed.
    """
    if world_size() == 1:
        yield
        return
    from accelerate.utils import gather_object

    error: Exception | None = None
    try:
        yield
    except (PersonaPlugError, OSError) as caught:
        error = caught
    if all_reduce_sum([error is not None])[0]:
        with _lost_rank_errors():
            errors: list[Exception | None] = gather_object([error])
        raise mark_shared(next(error for error in errors if error is not None)) from error


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process, and return its result or raise its error on all ranks."""
    if world_size() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    results: list[Any] = [None]
    with synchronized():
        if is_main():
            results = [work()]
    with _lost_rank_errors():
        broadcast_object_list(results)
    return results[0]  # type: ignore[no-any-return]  # pickled between ranks


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on the main process, then on all other ranks, so that they can read its files.

    An error is raised on all ranks.
    """
    # If the main process fails, Accelerate's `main_process_first` lets the other ranks wait forever.
    with synchronized():
        if is_main():
            result = work()
    with synchronized():
        if not is_main():
            result = work()
    return result


def mark_shared(error: Error) -> Error:
    """Mark an error as raised on all ranks."""
    error.__dict__[_SHARED] = True
    return error


def is_reporter(error: Exception) -> bool:
    """Return whether this process prints an error.

    Each rank prints its own errors. The main process also prints errors that all ranks raise.
    """
    if is_main():
        return True
    import torch

    # Errors before the ranks connect concern settings and arguments, so they are the same on all ranks.
    return torch.distributed.is_initialized() and _SHARED not in error.__dict__


def _is_launched() -> bool:
    return not os.environ.keys().isdisjoint(_RANK_VARIABLES)


def _launch_info() -> tuple[int, int, int]:
    """Return rank, world size and local world size from the launcher's environment variables."""
    if not _is_launched():
        return 0, 1, 1  # avoids the import of torch, which takes seconds
    from accelerate.utils import get_cpu_distributed_information

    info = get_cpu_distributed_information()
    return info.rank, info.world_size, info.local_world_size


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    from accelerate import PartialState
    from accelerate.utils import reduce

    with _lost_rank_errors():
        total: Tensor = reduce(tensor.to(PartialState().device).contiguous(), "sum")
    return total.to(tensor.device)


@contextmanager
def _lost_rank_errors() -> Iterator[None]:
    """Convert the network error after the end of another rank to a clear message."""
    try:
        yield
    except RuntimeError as error:
        reason = "Another process has ended, so this process stops. See the message of the other process."
        hint = "Run the same command again to resume from the last checkpoint."
        raise mark_shared(PersonaPlugError(f"{reason} {hint}")) from error
