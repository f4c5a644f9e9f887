"""The Triton kernel of `wide.py`: weights of whole rows of scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
BLOCK = 8192
"""Scores of a row that one program takes at a time: enough in flight that memory is kept busy."""


@triton.jit
def _weigh(scores, weights, sums, columns, scale, BLOCK: tl.constexpr):
    """One row: its highest score, then every weight against it."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    scores += row * columns
    weights += row * columns
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lane
        highest = tl.maximum(highest, tl.load(scores + at, mask=at < columns, other=float("-inf")))
    top = tl.max(highest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lane
        score = tl.load(scores + at, mask=at < columns, other=float("-inf"))
        weight = tl.exp2((score - top) * scale)
        tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=at < columns)
        total += weight
    tl.store(sums + row, tl.sum(total, 0))


def weigh(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `wide.weigh`."""
    rows, columns = scores.shape
    weights = torch.empty_like(scores, dtype=dtype)
    sums = scores.new_empty(rows)
    block = min(BLOCK, triton.next_power_of_2(columns))
    _weigh[(rows,)](scores, weights, sums, columns, scale * LOG2_E, block, num_warps=8)
    return weights, sums
