"""The Triton kernels of `rotation.py`: a program takes some rows, a row being one head of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Rows of one program."""
SIZES = ("rows", "tokens", "heads")


@triton.jit
def _addresses(row, tokens, heads, batch_stride, token_stride, head_stride):
    """Where rows begin, and which token they belong to."""
    token = row // heads % tokens
    batch = (row // heads // tokens).to(tl.int64)
    return batch * batch_stride + token.to(tl.int64) * token_stride + row % heads * head_stride, token


@triton.jit
def _pairs(values, HALF: tl.constexpr):
    """`[rows, D]` as its even and its odd columns."""
    return tl.split(tl.reshape(values, [values.shape[0], HALF, 2]))


@triton.jit
def _angles(table, token, present, HALF: tl.constexpr):
    """Cosine or sine of each pair, `[rows, D / 2]`."""
    column = 2 * tl.arange(0, HALF)
    at = token[:, None].to(tl.int64) * (2 * HALF) + column[None, :]
    return tl.load(table + at, mask=present[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, batch_stride, token_stride, head_stride, weight, cosine, sine, out, rows, tokens, heads, eps,
    BLOCK_R: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = row < rows
    dim = tl.arange(0, HEAD_DIM)
    begin, token = _addresses(row, tokens, heads, batch_stride, token_stride, head_stride)
    values = tl.load(x + begin[:, None] + dim[None, :], mask=present[:, None], other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)
    values = values * inverse[:, None] * tl.load(weight + dim).to(tl.float32)[None, :]
    even, odd = _pairs(values, HALF)
    cos, sin = _angles(cosine, token, present, HALF), _angles(sine, token, present, HALF)
    turned = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [BLOCK_R, HEAD_DIM])
    tl.store(out + row[:, None] * HEAD_DIM + dim[None, :], turned.to(out.dtype.element_ty), mask=present[:, None])


@triton.jit(do_not_specialize=SIZES)
def _backward(
    g, g_batch_stride, g_token_stride, g_head_stride, x, batch_stride, token_stride, head_stride,
    weight, cosine, sine, by_x, by_weight, rows, tokens, heads, eps,
    BLOCK_R: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = row < rows
    where = present[:, None]
    dim = tl.arange(0, HEAD_DIM)
    begin, token = _addresses(row, tokens, heads, g_batch_stride, g_token_stride, g_head_stride)
    even, odd = _pairs(tl.load(g + begin[:, None] + dim[None, :], mask=where, other=0.0).to(tl.float32), HALF)
    cos, sin = _angles(cosine, token, present, HALF), _angles(sine, token, present, HALF)
    by_normed = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [BLOCK_R, HEAD_DIM])
    begin, _ = _addresses(row, tokens, heads, batch_stride, token_stride, head_stride)
    values = tl.load(x + begin[:, None] + dim[None, :], mask=where, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)
    normed = values * inverse[:, None]
    tl.store(by_weight + tl.program_id(0) * HEAD_DIM + dim, tl.sum(by_normed * normed, 0))
    scaled = by_normed * tl.load(weight + dim).to(tl.float32)[None, :]
    shared = tl.sum(scaled * normed, 1) / HEAD_DIM
    result = (scaled - normed * shared[:, None]) * inverse[:, None]
    tl.store(by_x + row[:, None] * HEAD_DIM + dim[None, :], result.to(by_x.dtype.element_ty), mask=where)


def forward(tensor: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    """See `rotation.norm_rotate`."""
    out = tensor.new_empty(tensor.shape)
    if rows := tensor.shape[:3].numel():
        _forward[(triton.cdiv(rows, BLOCK),)](
            *_described(tensor), weight.contiguous(), cosine.contiguous(), sine.contiguous(), out,
            rows, *tensor.shape[1:3], eps, BLOCK, tensor.shape[3],
        )  # fmt: skip
    return out


def backward(
    gradient: Tensor, tensor: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `rotation.norm_rotate_backward`. The weight's parts are added in a fixed order."""
    rows = tensor.shape[:3].numel()
    by_tensor = tensor.new_empty(tensor.shape)
    parts = torch.empty(triton.cdiv(rows, BLOCK), tensor.shape[3], dtype=torch.float32, device=tensor.device)
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    if rows:
        _backward[(len(parts),)](
            *_described(gradient), *_described(tensor), weight.contiguous(), cosine.contiguous(), sine.contiguous(),
            by_tensor, parts, rows, *tensor.shape[1:3], eps, BLOCK, tensor.shape[3],
        )  # fmt: skip
    return by_tensor, parts.sum(0).to(weight.dtype)


def _described(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension must be contiguous, but its stride is {tensor.stride(-1)}")
    return tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2)
