"""What the portable backward pass and the one for Hopper share: rows made ready, and partial gradients added."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from scale_dit_kernels.forward import LOG2_E, SIZES, address, described, length

PADDING = tl.constexpr(128)
"""Rows of each stream are filled up to a multiple of this in `log_sums` and `deltas`."""


@triton.jit
def rows_before(stream, batch_head, tokens):
    """Where the rows of a stream begin in `log_sums` and `deltas`, for a batch entry and head."""
    text = tl.cdiv(tokens[0], PADDING) * PADDING
    image = tl.cdiv(tokens[1], PADDING) * PADDING
    return batch_head.to(tl.int64) * (text + image) + tl.where(stream == 1, text, 0)


@triton.jit(do_not_specialize=SIZES)
def _prepare(
    O_text, O_image, G_text, G_image, lse, log_sums, deltas,
    text_tokens, image_tokens, guidance_tokens, heads, batch_heads, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp to the base 2, and the dot product of every row's output and its gradient.

    Rows that read nothing, and those that fill up, get an infinite log-sum-exp: whatever they would read has no weight.
    """
    tokens = (text_tokens, image_tokens, guidance_tokens)
    text_blocks = tl.cdiv(tokens[0], PADDING)
    blocks = text_blocks + tl.cdiv(tokens[1], PADDING)
    batch_head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, head = batch_head // heads, batch_head % heads
    stream = tl.where(block < text_blocks, 0, 1)
    query = (block - stream * text_blocks) * PADDING + tl.arange(0, PADDING)
    present = query < length(stream, tokens)
    dim = tl.arange(0, HEAD_DIM)
    o_base, o_stride = address(stream, O_text, O_image, O_image, batch, head)
    g_base, g_stride = address(stream, G_text, G_image, G_image, batch, head)
    at, where = query[:, None].to(tl.int64), present[:, None]
    output = tl.load(o_base + at * o_stride + dim[None, :], mask=where, other=0.0).to(tl.float32)
    gradient = tl.load(g_base + at * g_stride + dim[None, :], mask=where, other=0.0).to(tl.float32)
    row = batch_head.to(tl.int64) * (tokens[0] + tokens[1]) + stream * tokens[0] + query
    log_sum = tl.load(lse + row, mask=present, other=float("-inf"))
    to = rows_before(stream, batch_head, tokens) + query
    tl.store(log_sums + to, tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2_E))
    tl.store(deltas + to, tl.sum(output * gradient, 1))


def prepare(
    outputs: Sequence[Tensor], gradients: Sequence[tuple], lse: Tensor, tokens: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """`log_sums` and `deltas`, float32 `[B * H, rows]`: text rows first, each stream filled up to whole `PADDING`."""
    batch, heads = lse.shape[:2]
    blocks = sum(-(-count // PADDING.value) for count in tokens[:2])
    log_sums, deltas = (lse.new_empty(batch * heads, blocks * PADDING.value) for _ in range(2))
    _prepare[(blocks * batch * heads,)](
        *map(described, outputs), *gradients, lse, log_sums, deltas, *tokens, heads, batch * heads, outputs[0].shape[-1]
    )  # fmt: skip
    return log_sums, deltas


@triton.jit(do_not_specialize=SIZES)
def _add_parts(
    text, image, guidance, parts, merges, text_tokens, image_tokens, guidance_tokens, heads, batch_heads,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sums of the partial gradients of split tiles."""
    tokens = (text_tokens, image_tokens, guidance_tokens)
    merge = merges + tl.program_id(0) // batch_heads * 3
    batch_head = tl.program_id(0) % batch_heads
    batch, head = batch_head // heads, batch_head % heads
    tile, first, count = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    stream = tile & 3
    dim = tl.arange(0, HEAD_DIM)
    at = (first.to(tl.int64) * batch_heads + batch_head) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for part in range(count):
        row = at + part * batch_heads.to(tl.int64) * BLOCK
        total += tl.load(parts + row[:, None] * HEAD_DIM + dim[None, :])
    token = (tile >> 2) + tl.arange(0, BLOCK)
    base, stride = address(stream, text, image, guidance, batch, head)
    to = base + token[:, None].to(tl.int64) * stride + dim[None, :]
    tl.store(to, total.to(image[0].dtype.element_ty), mask=(token < length(stream, tokens))[:, None])


def add_parts(
    streams: Sequence[tuple], parts: Tensor, merges: Tensor, tokens: tuple[int, int, int], heads: int
) -> None:
    """Put together what the items of split tiles left in their slots.

    Args:
        streams: the gradients of text, image and guidance, `described`.
        parts: `[slots, B * H, block, D]`, float32.
        merges: Of the lists or the work.
        tokens, heads: Of the layout and the tensors.
    """
    if len(parts):
        _, batch_heads, block, head_dim = parts.shape
        _add_parts[(len(merges) * batch_heads,)](*streams, parts, merges, *tokens, heads, batch_heads, block, head_dim)
