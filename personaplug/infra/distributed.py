"""Several processes as one: who writes, who takes which share, what all add up, how an error of one ends all.

A launcher (`accelerate launch`, torchrun) starts the same command several times. All copies call what is here in the
same order. In a process that was started alone nothing here does anything; torch.distributed is not even initialised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from personaplug.errors import ConfigError, PersonaPlugError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
Error = TypeVar("Error", bound=Exception)

# How launchers say which process this is, of how many: torchrun and with it accelerate, then two kinds of MPI.
_NAMES = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
# The main process may encode items or ask the model for hours while the others wait for it.
_PATIENCE = timedelta(days=7)
_ALIKE = "raised_by_all_processes"


def number() -> int:
    """How many processes there are."""
    return _launched()[1]


def index() -> int:
    """Which of them this one is, from 0."""
    return _launched()[0]


def here() -> int:
    """How many of them share this machine's memory."""
    said = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
    return next((int(count) for count in said if count), 1) if number() > 1 else 1


def is_main() -> bool:
    """Whether this is the one that writes files and speaks."""
    return index() == 0


def left_alone() -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes: it starts one, and leaves the rest to MPI."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_ADDR" in os.environ
    return asked and not any(name in os.environ for name, _ in _NAMES)


def connect(device: str) -> None:
    """Meet the other processes, unless that is done; on GPUs each takes its own.

    Args:
        device: where the models are going to be: cpu or cuda.
    Raises:
        ConfigError: if processes cannot work together there.
    """
    if number() == 1:
        return
    import torch
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        return
    kind, _, one = device.partition(":")
    if one or (kind == "cuda" and torch.cuda.device_count() < here()):
        raise ConfigError(
            f"Each of several processes needs a GPU of its own: found {here()} processes on this machine, "
            f"{torch.cuda.device_count()} GPUs and model.device={device}. Start no more processes than there are GPUs, "
            f"with device=auto."
        )
    if PartialState(cpu=kind == "cpu", timeout=_PATIENCE).num_processes != number():
        raise ConfigError(
            f"{number()} processes were started, which work together on cpu or cuda; found model.device={device}. "
            f"Start one process, or choose another device."
        )


def disconnect() -> None:
    """Part from the other processes in good order."""
    if number() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def share(items: Sequence[T]) -> list[T]:
    """This process's part of what all do together; it may be empty."""
    place, count = _launched()
    return list(items[place::count])


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Each value, added up over all processes; the same to the last bit in all of them."""
    if number() == 1:
        return list(values)
    import torch

    held = torch.tensor(values, dtype=torch.float64)
    _add_up(held)
    return [float(value) for value in held]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the sum of all processes' gradients in the place of each one's own.

    A gradient that is missing in one process counts as zeros; one that is missing in all stays missing, so that the
    optimizer leaves its parameter alone as it does in one process.
    """
    if number() == 1:
        return
    import torch

    held = list(parameters)
    reached = all_reduce_sum([parameter.grad is not None for parameter in held])
    for parameter in (parameter for parameter, count in zip(held, reached, strict=True) if count):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _add_up(parameter.grad)


@contextmanager
def synchronized() -> Iterator[None]:
    """Run a block in all processes and wait for all; what one of them raises in it, all raise.

    Nothing in the block may itself wait for other processes: they would miss one that has failed before.
    """
    if number() == 1:
        yield
        return
    import torch

    own: Exception | None = None
    try:
        yield
    except (PersonaPlugError, OSError) as error:
        own = error
    if all_reduce_sum([own is not None])[0]:
        found: list[Any] = [None] * number()
        with _meeting():
            torch.distributed.all_gather_object(found, own)
        raise alike(next(error for error in found if error is not None)) from own


def on_main(work: Callable[[], T]) -> T:
    """What a piece of work gives that the main process does and the others wait for; what it raises, all raise."""
    if number() == 1:
        return work()
    import torch

    made: list[Any] = [None]
    with synchronized():
        if is_main():
            made = [work()]
    with _meeting():
        torch.distributed.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[no-any-return]


def main_first(work: Callable[[], T]) -> T:
    """What a piece of work gives that all processes do, the others when the main one's files are there."""
    made: list[T] = []
    for turn in (True, False):
        with synchronized():
            if is_main() is turn:
                made.append(work())
    return made[0]


def alike(error: Error) -> Error:
    """Mark an error as one that all processes raise."""
    error.__dict__[_ALIKE] = True
    return error


def tells(error: Exception) -> bool:
    """Whether this process is the one to tell an error: each tells its own, the main one those that all have."""
    if is_main():
        return True
    import torch

    # What fails before they meet are settings and arguments, which are the same in all.
    return torch.distributed.is_initialized() and _ALIKE not in error.__dict__


def _launched() -> tuple[int, int]:
    for place, count in _NAMES:
        if place in os.environ and count in os.environ:
            return int(os.environ[place]), int(os.environ[count])
    return 0, 1


def _add_up(tensor: Tensor) -> None:
    """Put the sum over all processes into a tensor, wherever it is."""
    import torch

    moved = tensor.to(_device()).contiguous()
    with _meeting():
        torch.distributed.all_reduce(moved)
    tensor.copy_(moved)


def _device() -> torch.device:
    """Where the processes exchange tensors: GPUs speak to each other directly."""
    from accelerate import PartialState

    return PartialState().device  # type: ignore[no-any-return]


@contextmanager
def _meeting() -> Iterator[None]:
    """Turn what the network says of a process that is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise alike(
            PersonaPlugError(
                "Another of the processes has ended, and so all do; its own message says why. The same command goes on "
                "from the last checkpoint."
            )
        ) from error
