"""Logits in float32 from a model in half precision, wherever no gradient is asked for.

A product in bfloat16 is rounded when it has been added up: logits between 32 and 64 lie a quarter apart. Labels of a
closed set then tie, and the first of them wins; a row whose labels are close loses to the rounding what others do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CACHED = 2**10  # rows of the output layer that a processor multiplies from its cache
_AT_ONCE = 2**14  # elsewhere, where a kernel's start costs more than memory does


def use_fp32_logits(model: Any) -> None:
    """Let a transformers model's output layer multiply in float32 outside of training; its weights stay as they are.

    The layer's rows are turned to float32 a few at a time: no copy of them is kept. Training keeps the fast product:
    its gradients are means over many tokens, whose roundings even out. Output layers of other kinds are left alone.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    rounded = head.forward

    def forward(states: Tensor) -> Tensor:
        return rounded(states) if torch.is_grad_enabled() else _product(states, head)

    vars(head)["forward"] = forward  # of this layer alone, not of its class


def _product(states: Tensor, head: nn.Linear) -> Tensor:
    """(…, V) logits in float32 of (…, D) states."""
    wide, rows = states.float(), _CACHED if states.device.type == "cpu" else _AT_ONCE
    found = wide.new_empty(*states.shape[:-1], len(head.weight))
    for start in range(0, len(head.weight), rows):
        part = slice(start, start + rows)
        bias = None if head.bias is None else head.bias[part].float()
        found[..., part] = nn.functional.linear(wide, head.weight[part].float(), bias)
    return found
