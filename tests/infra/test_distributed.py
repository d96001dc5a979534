"""Data-parallel runs: two processes train the same plug as one, and an error in one process ends both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.errors import PersonaPlugError, StorageError
from personaplug.infra import tensor_files
from personaplug.infra.distributed import (
    all_reduce_sum,
    connect,
    disconnect,
    is_main,
    is_reporter,
    is_single_cpu_launch,
    local_world_size,
    main_first,
    on_main,
    rank,
    shard,
    sum_gradients,
    synchronized,
    world_size,
)
from personaplug.methods import needed_parts, parse_methods
from personaplug.run import Run, open_models
from personaplug.training.parts import train

TINY = ["llm=toy", "encoder=hash:32", "learning_rate=0.01", "dtype=float32", "controls=false"]
ODD = [*TINY, "placement=suffix", "batch_size=5", "views=1", "epochs=4", "save_steps=3", "eval_steps=5"]
ALONE = [*TINY, "controls=true", "batch_size=1", "max_steps=4", "retriever_samples=6", "retriever_candidates=2"]
ROWS = "plug,paper-plug,lora,ropg:2"
FILES = ("plug/seed-0/plug", "paper-plug/seed-0/plug", "lora/seed-0/adapter", "ropg/seed-0/retriever")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_simulation(
        SimulationConfig(users=12, queries_per_user=3, dev_users=6, min_items=0, max_items=6, cold_share=0.3), folder
    )
    return folder


def _train(
    out: Path, data: Path, *settings: str, rows: str = "plug", change: Callable[[Any], None] | None = None
) -> None:
    config = load_config(overrides=settings)
    run = Run.create(out, config=config, task=load_task(data))
    models = open_models(config)
    if change is not None:
        change(models.llm)
    reader = open_dataset(data, "train", task=run.task)
    train(run, reader, models=models, parts=needed_parts(parse_methods(rows)))


def _started(*words: object) -> subprocess.Popen[str]:
    """Start two processes like the documents do."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", "0", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _distance(file: Path, other_file: Path) -> float:
    """Return the largest difference between two files of tensors, relative to the norm of each tensor.

    The numbers of a label prior are left out if they differ by less than 0.001: their solver stops at a tolerance.
    """
    tensors, others = load_file(file), load_file(other_file)
    assert tensors.keys() == others.keys()
    pairs = [
        (value.double(), others[name].double())
        for name, value in tensors.items()
        if not (name.startswith("label_prior.") and (value - others[name]).abs().max() < 1e-3)
    ]
    return max(float((b - a).norm() / a.norm().clamp_min(1e-6)) for a, b in pairs)


def test_two_resumed_processes_train_the_same_plug_as_one(tmp_path: Path, data: Path) -> None:
    _train(tmp_path / "one", data, *ODD)
    words = ("-m", "personaplug", "train", "--data", data, "--out", tmp_path / "two", *ODD)
    folder = tmp_path / "two" / "plug" / "seed-0"
    broken = _started(*words)
    while not list(folder.glob("state-*")):
        assert broken.poll() is None, broken.communicate()
        time.sleep(0.01)
    second = next(
        child for child in psutil.Process(broken.pid).children(recursive=True) if child.environ().get("RANK") == "1"
    )
    second.kill()
    broken.communicate(timeout=60)
    assert broken.returncode != 0
    assert not (folder / "fit.json").exists()
    finished = _started(*words)
    out, errors = finished.communicate(timeout=120)
    assert finished.returncode == 0, errors
    assert _distance(tmp_path / "one" / f"{FILES[0]}.safetensors", folder / "plug.safetensors") < 1e-4
    assert len(out.splitlines()) == 1, "only one process prints"
    assert errors.count("36 samples") == errors.count("resuming after step") == 1
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 4 * 14 + 1))


def test_two_processes_share_work_and_errors(tmp_path: Path, data: Path) -> None:
    finished = _started(__file__, data, tmp_path)
    _, errors = finished.communicate(timeout=180)
    assert finished.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1))
    assert (first["share"], second["share"]) == ([[0, 2, 4], [7]], [[1, 3], []])
    assert first["sum"] == second["sum"] == [1.0, 20.0]
    assert first["gradients"] == second["gradients"] == [[5.0, 5.0], None, [3.0, 3.0]]
    assert (first["files"], second["files"]) == (["first"], ["first"])
    assert first["given"] == second["given"] == 0
    for kind in ("one fails", "main fails", "diverged", "full"):
        assert first[kind][0] == second[kind][0], kind
        assert (first[kind][1], second[kind][1]) == (True, False), "the main process reports errors of all ranks"
    assert first["one fails"][0] == "StorageError: no room in 1"
    assert "loss became nan in step 2" in first["diverged"][0]
    assert "No space left" in first["full"][0]
    _train(tmp_path / "one", data, *ALONE, rows=ROWS)
    for file in FILES:
        assert _distance(tmp_path / f"one/{file}.safetensors", tmp_path / f"two/{file}.safetensors") < 1e-4, file
    for items, lost in _few(tmp_path / "one").items():
        assert _few(tmp_path / "two")[items] == pytest.approx(lost, rel=1e-5)
    assert first["lessons"] == sum(1 for _ in (tmp_path / "one/ropg/seed-0/ranking_targets.jsonl").open())


def _few(run: Path) -> dict[str, dict[str, float]]:
    """Losses of held-out users with few items, with and without personas."""
    losses: dict[str, dict[str, float]] = json.loads((run / "plug/seed-0/fit.json").read_text())["loss_of_few_items"]
    return losses


def _in_one_of_two(data: Path, out: Path) -> dict[str, Any]:
    """Values and errors in one of two processes."""
    connect("cpu")
    assert world_size() == 2
    results: dict[str, Any] = {
        "share": [shard(range(5)), shard([7])],
        "sum": all_reduce_sum([rank(), 10]),
        "gradients": _gradients(),
        "given": on_main(rank),
    }
    main_first(lambda: (out / "first").touch() if is_main() else None)
    results["files"] = main_first(lambda: [path.name for path in out.glob("first")])
    results["one fails"] = _error(lambda: _fail(in_main=False))
    results["main fails"] = _error(lambda: on_main(lambda: _fail(in_main=True)))
    _train(out / "two", data, *ALONE, rows=ROWS)
    results["lessons"] = sum(1 for _ in (out / "two/ropg/seed-0/ranking_targets.jsonl").open())
    # only in the second process, from the second step on
    results["diverged"] = _error(lambda: _train(out / "diverged", data, *ODD, change=_break_loss))
    vars(tensor_files)["save_file"] = _full
    results["full"] = _error(lambda: _train(out / "full", data, *ODD))
    disconnect()
    return results


def _gradients() -> list[list[float] | None]:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    if not is_main():
        parameters[0].grad = torch.full((2,), 5.0)
    parameters[2].grad = torch.full((2,), 1.0 + rank())
    sum_gradients(parameters)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def _fail(*, in_main: bool) -> None:
    if in_main:
        raise StorageError(f"no room in {rank()}")
    with synchronized():
        if not is_main():
            raise StorageError(f"no room in {rank()}")


def _error(work: Callable[[], object]) -> tuple[str, bool]:
    try:
        work()
    except PersonaPlugError as error:
        return f"{type(error).__name__}: {error}", is_reporter(error)
    return "nothing", False


def _break_loss(llm: Any) -> None:
    plain, calls = llm.loss, iter(range(10**6))

    def loss(*args: Any, **named: Any) -> Any:
        losses, tokens = plain(*args, **named)
        return (losses * float("nan") if not is_main() and next(calls) else losses), tokens

    llm.loss = loss


def _full(_: Any, path: Path, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("command", ["evaluate", "bench", "quickstart", "generate", "encode", "estimate"])
def test_other_commands_refuse_several_processes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: float) -> None:
        raise SystemExit(143)

    # The first process prints the error and exits. Then the launcher kills the second process.
    monkeypatch.setattr(time, "sleep", stop)
    monkeypatch.setenv("WORLD_SIZE", "2")
    outputs = []
    for rank_index in ("0", "1"):
        monkeypatch.setenv("RANK", rank_index)
        result = CliRunner().invoke(main, [command])
        assert result.exit_code == (2, 143)[int(rank_index)]
        outputs.append(result.output)
    assert f"`personaplug {command}` runs in one process, but a launcher started 2" in outputs[0]
    assert outputs[1] == ""


def test_single_process_never_initializes_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (world_size(), local_world_size(), rank(), is_main(), is_single_cpu_launch()) == (1, 1, 0, True, False)
    connect("cpu")
    assert shard([1, 2]) == [1, 2]
    assert all_reduce_sum([0.1]) == [0.1]
    assert on_main(lambda: 3) == main_first(lambda: 3) == 3
    with pytest.raises(StorageError, match="no room in 0"):
        _fail(in_main=True)
    assert not torch.distributed.is_initialized()


def test_accelerate_cpu_launch_of_one_process_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not is_single_cpu_launch()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert is_single_cpu_launch()


if __name__ == "__main__":
    results = _in_one_of_two(Path(sys.argv[1]), Path(sys.argv[2]))
    (Path(sys.argv[2]) / f"{rank()}.json").write_text(json.dumps(results))
