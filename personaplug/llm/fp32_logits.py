"""Logits in float32 from a half-precision model, outside of training.

bfloat16 rounds a logit between 32 and 64 to a multiple of 0.25. Labels with close logits would tie, and the first one
would win.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CPU_ROWS = 2**10  # rows of the output layer per product; they fit into the CPU cache
_GPU_ROWS = 2**14  # fewer, larger kernels


def use_fp32_logits(model: Any) -> None:
    """Make a half-precision `nn.Linear` output layer multiply in float32 if gradients are off.

    Weights are converted in blocks of rows, so no float32 copy of the layer is kept. Training uses the fast product,
    because its gradients average over many tokens.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    half_precision_forward = head.forward

    def forward(states: Tensor) -> Tensor:
        return half_precision_forward(states) if torch.is_grad_enabled() else _fp32_product(states, head)

    setattr(head, "forward", forward)  # noqa: B010  # for this instance only; mypy rejects an assignment to a method


def _fp32_product(states: Tensor, head: nn.Linear) -> Tensor:
    """Return (…, V) float32 logits of (…, D) states."""
    states, rows = states.float(), _CPU_ROWS if states.device.type == "cpu" else _GPU_ROWS
    logits = states.new_empty(*states.shape[:-1], len(head.weight))
    for start in range(0, len(head.weight), rows):
        block = slice(start, start + rows)
        bias = None if head.bias is None else head.bias[block].float()
        logits[..., block] = nn.functional.linear(states, head.weight[block].float(), bias)
    return logits
