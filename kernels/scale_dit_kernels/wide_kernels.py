"""The Triton kernels of `wide.py`: weights of whole rows of scores, and attention that never writes scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
BLOCK = 8192
"""Scores of a row that one program takes at a time: enough in flight that memory is kept busy."""
TILING = (64, 32, 8, 2)
"""Queries and keys of a tile, warps and stages. At 512 columns the output of 64 queries in float32 is half of a
multiprocessor's registers; queries, and two tiles each of keys and values, are 192 KB, most of its shared memory."""


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


@triton.jit
def _attend_tile(
    queries, k, v, k_stride, v_stride, start, keys, scale, total, weights, highest,
    IS_FULL: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running output, sum of weights and highest logit (base 2)."""
    dim = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64)
    k_at = k + first * k_stride + key[None, :] * k_stride + dim[:, None]
    v_at = v + first * v_stride + key[:, None] * v_stride + dim[None, :]
    present = start + key < keys
    tile = tl.load(k_at) if IS_FULL else tl.load(k_at, mask=present[None, :], other=0.0)
    logits = tl.dot(queries, tile, input_precision=PRECISION) * scale
    if not IS_FULL:
        logits = tl.where(present[None, :], logits, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(logits, 1))
    weight = tl.exp2(logits - new_highest[:, None])
    fade = tl.exp2(highest - new_highest)
    values = tl.load(v_at) if IS_FULL else tl.load(v_at, mask=present[:, None], other=0.0)
    total = tl.dot(weight.to(values.dtype), values, total * fade[:, None], input_precision=PRECISION)
    return total, weights * fade + tl.sum(weight, 1), new_highest


@triton.jit
def _attend(
    q, k, v, out, q_head, q_stride, k_head, k_stride, v_head, v_stride, rows, keys, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head over all keys, with the online softmax of FlashAttention (Dao et al. 2022)."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_DIM)
    present = (begin + row < rows)[:, None]
    q_at = q + head * q_head + begin.to(tl.int64) * q_stride + row[:, None] * q_stride + dim[None, :]
    queries = tl.load(q_at, mask=present, other=0.0)
    k += head * k_head
    v += head * v_head
    total = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        total, weights, highest = _attend_tile(
            queries, k, v, k_stride, v_stride, start, keys, scale, total, weights, highest,
            True, BLOCK_N, HEAD_DIM, PRECISION,
        )  # fmt: skip
    if full < keys:
        total, weights, highest = _attend_tile(
            queries, k, v, k_stride, v_stride, full, keys, scale, total, weights, highest,
            False, BLOCK_N, HEAD_DIM, PRECISION,
        )  # fmt: skip
    at = out + (head * rows + begin) * HEAD_DIM + row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(at, (total / weights[:, None]).to(out.dtype.element_ty), mask=present)


def weigh(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `wide.weigh`."""
    rows, columns = scores.shape
    weights = torch.empty_like(scores, dtype=dtype)
    sums = scores.new_empty(rows)
    block = min(BLOCK, triton.next_power_of_2(columns))
    _weigh[(rows,)](scores, weights, sums, columns, scale * LOG2_E, block, num_warps=8)
    return weights, sums


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, tiling: Sequence[int] | None = None) -> Tensor:
    """See `wide.attend_wide`; a tiling other than `TILING` can be given."""
    block_m, block_n, warps, stages = tiling or TILING
    heads, rows, width = query.shape
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    strides = (step for part in (query, key, value) for step in part.stride()[:2])
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    _attend[(triton.cdiv(rows, block_m), heads)](
        query, key, value, out, *strides, rows, key.shape[1], scale * LOG2_E, block_m, block_n, width, precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
