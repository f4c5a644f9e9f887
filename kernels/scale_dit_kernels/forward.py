"""Forward pass: output and log-sum-exp of every row, over the tiles of a `Schedule` and no others.

One program computes one tile of queries for one batch entry and head, with the online softmax of FlashAttention (Dao
et al. 2022; 2023). Full tiles carry no mask. Logits are scaled after the product, in float32: scaled keys would round.
Rows that read nothing give output 0 and log-sum-exp -inf. Tensors come as tuples of the pointer and the strides of
batch, token and head; the strides of the last dimension are 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_dit_kernels.schedule import Schedule

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SIZES = ("text_tokens", "image_tokens", "guidance_tokens", "heads", "batch_heads")
"""Arguments whose values a kernel must not be compiled for: another picture size would compile anew. Strides of 2^31
and beyond, which are other integers, take one compilation more."""


@triton.jit
def address(stream, text, image, guidance, batch, head):
    """Where a batch entry and head of one of three tensors begins, and the stride of its tokens."""
    at_text = text[0] + batch.to(tl.int64) * text[1] + head.to(tl.int64) * text[3]
    at_image = image[0] + batch.to(tl.int64) * image[1] + head.to(tl.int64) * image[3]
    at_guidance = guidance[0] + batch.to(tl.int64) * guidance[1] + head.to(tl.int64) * guidance[3]
    base = tl.where(stream == 0, at_text, tl.where(stream == 1, at_image, at_guidance))
    return base, tl.where(stream == 0, text[2], tl.where(stream == 1, image[2], guidance[2]))


@triton.jit
def length(stream, tokens):
    """Tokens of a stream."""
    return tl.where(stream == 0, tokens[0], tl.where(stream == 1, tokens[1], tokens[2]))


@triton.jit
def this_item(items, heads, batch_heads):
    """What a program works on: an item of `Lists`, and a batch entry and head."""
    item = items + tl.program_id(0) // batch_heads * 5
    batch_head = tl.program_id(0) % batch_heads
    return (
        tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4),
        batch_head, batch_head // heads, batch_head % heads,
    )  # fmt: skip


@triton.jit
def may_read(query_stream, query, key_stream, key, reads, image_places, guidance_places, tokens):
    """Mask of a partial tile, `[queries, keys]`: an image row reads a rectangle of the picture and one of the draft."""
    keys = length(key_stream, tokens)
    places = tl.where(key_stream == 2, guidance_places, image_places)
    place = tl.load(places + key, mask=(key < keys) & (key_stream > 0), other=0)
    row, column = place >> 16, place & 0xFFFF
    windowed = (query_stream == 1) & (key_stream > 0)
    inside = windowed & (query < tokens[1])
    bounds = reads + tl.where(key_stream == 2, 4, 0) * tokens[1] + query
    top = tl.load(bounds, mask=inside, other=0)
    bottom = tl.load(bounds + tokens[1], mask=inside, other=0)
    left = tl.load(bounds + 2 * tokens[1], mask=inside, other=0)
    right = tl.load(bounds + 3 * tokens[1], mask=inside, other=0)
    within = (row[None, :] >= top[:, None]) & (row[None, :] < bottom[:, None])
    within = within & (column[None, :] >= left[:, None]) & (column[None, :] < right[:, None])
    return (within | (not windowed)) & (key < keys)[None, :]


@triton.jit
def _attend_tile(
    entry, query_stream, query, queries, total, weights, highest,
    K_text, K_image, K_guidance, V_text, V_image, V_guidance, reads, image_places, guidance_places, tokens,
    batch, head, scale, IS_FULL: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running output, sum of weights and highest logit (base 2)."""
    stream = entry & 3
    key = (entry >> 2) + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    k_base, k_stride = address(stream, K_text, K_image, K_guidance, batch, head)
    v_base, v_stride = address(stream, V_text, V_image, V_guidance, batch, head)
    k_at = k_base + key[None, :].to(tl.int64) * k_stride + dim[:, None]
    v_at = v_base + key[:, None].to(tl.int64) * v_stride + dim[None, :]
    if IS_FULL:
        keys = tl.load(k_at)
    else:
        present = key < length(stream, tokens)
        keys = tl.load(k_at, mask=present[None, :], other=0.0)
    logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
    if IS_FULL:
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        reference = new_highest
    else:
        mask = may_read(query_stream, query, stream, key, reads, image_places, guidance_places, tokens)
        logits = tl.where(mask, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        # A row that has read nothing yet: -inf - -inf would be NaN.
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weight = tl.exp2(logits - reference[:, None])
    fade = tl.exp2(highest - reference)
    values = tl.load(v_at) if IS_FULL else tl.load(v_at, mask=present[:, None], other=0.0)
    total = tl.dot(weight.to(values.dtype), values, total * fade[:, None], input_precision=PRECISION)
    return total, weights * fade + tl.sum(weight, 1), new_highest


@triton.jit(do_not_specialize=SIZES)
def _forward(
    Q_text, Q_image, K_text, K_image, K_guidance, V_text, V_image, V_guidance, O_text, O_image, lse, part_out, part_lse,
    items, entries, reads, image_places, guidance_places,
    text_tokens, image_tokens, guidance_tokens, heads, batch_heads, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = (text_tokens, image_tokens, guidance_tokens)
    tile, begin, full_end, end, slot, batch_head, batch, head = this_item(items, heads, batch_heads)
    stream = tile & 3
    query = (tile >> 2) + tl.arange(0, BLOCK_M)
    present = query < length(stream, tokens)
    dim = tl.arange(0, HEAD_DIM)
    q_base, q_stride = address(stream, Q_text, Q_image, Q_image, batch, head)
    queries = tl.load(
        q_base + query[:, None].to(tl.int64) * q_stride + dim[None, :], mask=present[:, None], other=0.0
    )  # fmt: skip

    total = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for half in tl.static_range(2):  # tiles that need no mask, then those that do
        first, last = (begin, full_end) if half == 0 else (full_end, end)
        for index in range(first, last):
            total, weights, highest = _attend_tile(
                tl.load(entries + index), stream, query, queries, total, weights, highest,
                K_text, K_image, K_guidance, V_text, V_image, V_guidance, reads, image_places, guidance_places, tokens,
                batch, head, scale, half == 0, BLOCK_N, HEAD_DIM, PRECISION,
            )  # fmt: skip

    total = total / tl.where(weights == 0, 1.0, weights)[:, None]
    log_sum = highest + tl.log2(weights)  # -inf + -inf where nothing was read
    if slot < 0:
        o_base, o_stride = address(stream, O_text, O_image, O_image, batch, head)
        at = o_base + query[:, None].to(tl.int64) * o_stride + dim[None, :]
        tl.store(at, total.to(O_image[0].dtype.element_ty), mask=present[:, None])
        row = batch_head.to(tl.int64) * (tokens[0] + tokens[1]) + tl.where(stream == 1, tokens[0], 0) + query
        tl.store(lse + row, log_sum * LN_2, mask=present)
    else:
        row = (slot.to(tl.int64) * batch_heads + batch_head) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_out + row[:, None] * HEAD_DIM + dim[None, :], total)
        tl.store(part_lse + row, log_sum)


@triton.jit(do_not_specialize=SIZES)
def _merge(
    O_text, O_image, lse, part_out, part_lse, merges, text_tokens, image_tokens, guidance_tokens, heads, batch_heads,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Partial outputs of a split tile, weighed by their sums, in the order of their slots: the same in every run."""
    tokens = (text_tokens, image_tokens, guidance_tokens)
    merge = merges + tl.program_id(0) // batch_heads * 3
    batch_head = tl.program_id(0) % batch_heads
    batch, head = batch_head // heads, batch_head % heads
    tile, first, parts = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    stream = tile & 3
    dim = tl.arange(0, HEAD_DIM)
    at = (first.to(tl.int64) * batch_heads + batch_head) * BLOCK_M + tl.arange(0, BLOCK_M)
    step = batch_heads.to(tl.int64) * BLOCK_M
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in range(parts):
        highest = tl.maximum(highest, tl.load(part_lse + at + part * step))
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    for part in range(parts):
        weight = tl.exp2(tl.load(part_lse + at + part * step) - reference)
        total += weight[:, None] * tl.load(part_out + (at + part * step)[:, None] * HEAD_DIM + dim[None, :])
        weights += weight
    query = (tile >> 2) + tl.arange(0, BLOCK_M)
    present = query < length(stream, tokens)
    o_base, o_stride = address(stream, O_text, O_image, O_image, batch, head)
    total = total / tl.where(weights == 0, 1.0, weights)[:, None]
    tl.store(
        o_base + query[:, None].to(tl.int64) * o_stride + dim[None, :], total.to(O_image[0].dtype.element_ty),
        mask=present[:, None],
    )  # fmt: skip
    row = batch_head.to(tl.int64) * (tokens[0] + tokens[1]) + tl.where(stream == 1, tokens[0], 0) + query
    tl.store(lse + row, (highest + tl.log2(weights)) * LN_2, mask=present)


def described(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """`[B, tokens, H, D]` as the kernels take it."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension must be contiguous, but its stride is {tensor.stride(-1)}")
    return tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2)


def precision(dtype: torch.dtype) -> str:
    """Of products: float32 inputs are multiplied as such, not in TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def forward(
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    guidance: Sequence[Tensor],
    schedule: Schedule,
    scale: float,
    warps: int = 4,
    stages: int = 3,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T + N, H, D]`, text rows first, and `lse` `[B, H, T + N]`.

    Args:
        text, image: query, key and value, `[B, tokens, H, D]` of any strides but the last, which is 1; D a power of 2.
        guidance: key and value.
        schedule: Of the layout, on the same device.
        scale: Factor of the logits.
        warps, stages: Of the kernel.
    """
    query = image[0]
    batch, _, heads, head_dim = query.shape
    joined = query.new_empty(batch, sum(schedule.tokens[:2]), heads, head_dim)
    outputs = joined.split(list(schedule.tokens[:2]), dim=1)
    rows = schedule.rows
    batch_heads = batch * heads
    lse = query.new_empty(batch, heads, sum(schedule.tokens[:2]), dtype=torch.float32)
    part_lse = lse.new_empty(rows.slots, batch_heads, schedule.block_m)
    part_out = lse.new_empty(rows.slots, batch_heads, schedule.block_m, head_dim)
    o_text, o_image = map(described, outputs)
    _forward[(len(rows.items) * batch_heads,)](
        described(text[0]), described(query), *(described(each[0]) for each in (text[1:], image[1:], guidance)),
        *(described(each[1]) for each in (text[1:], image[1:], guidance)), o_text, o_image, lse, part_out, part_lse,
        rows.items, rows.entries, schedule.reads, schedule.image_places, schedule.guidance_places, *schedule.tokens,
        heads, batch_heads, scale * LOG2_E.value,
        schedule.block_m, schedule.block_n, head_dim, precision(query.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    merge(outputs, lse, part_out, part_lse, schedule)
    return joined, lse


def merge(outputs: Sequence[Tensor], lse: Tensor, part_out: Tensor, part_lse: Tensor, schedule: Schedule) -> None:
    """Put together what the items of split tiles left in their slots."""
    if not schedule.rows.slots:
        return
    _, batch_heads, _, head_dim = part_out.shape
    heads = outputs[0].shape[2]
    _merge[(len(schedule.rows.merges) * batch_heads,)](
        *map(described, outputs), lse, part_out, part_lse, schedule.rows.merges, *schedule.tokens, heads, batch_heads,
        schedule.block_m, head_dim,
    )  # fmt: skip
