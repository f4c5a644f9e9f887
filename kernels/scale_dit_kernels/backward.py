"""Backward pass: gradients of queries, keys and values, over the same tiles as the forward pass.

Weights are computed anew from the log-sum-exp (Dao et al. 2022, algorithm 4). Queries' gradients go row by row, keys'
and values' column by column; long lists are split, and their partial sums added in the order of their slots, so no
result depends on which program was first.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from scale_dit_kernels.backward_shared import add_parts, prepare, rows_before
from scale_dit_kernels.forward import LOG2_E, SIZES, address, described, length, may_read, precision, this_item
from scale_dit_kernels.schedule import Lists, Schedule


@triton.jit
def _weights(
    stream, query, key_stream, key, queries, keys, log_sum, reads, image_places, guidance_places, tokens, scale,
    IS_FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward pass's weights `[queries, keys]`; 0 where nothing may be read."""
    logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
    weight = tl.exp2(logits - log_sum[:, None])
    if not IS_FULL:
        mask = may_read(stream, query, key_stream, key, reads, image_places, guidance_places, tokens)
        weight = tl.where(mask, weight, 0.0)
    return weight


@triton.jit
def _query_tile(
    entry, stream, query, queries, gradients, log_sum, delta, total,
    K_text, K_image, K_guidance, V_text, V_image, V_guidance, reads, image_places, guidance_places, tokens,
    batch, head, scale, IS_FULL: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys contributes to the gradient of the queries, up to the factor of the logits."""
    key_stream = entry & 3
    key = (entry >> 2) + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    k_base, k_stride = address(key_stream, K_text, K_image, K_guidance, batch, head)
    v_base, v_stride = address(key_stream, V_text, V_image, V_guidance, batch, head)
    k_at = k_base + key[:, None].to(tl.int64) * k_stride + dim[None, :]
    v_at = v_base + key[:, None].to(tl.int64) * v_stride + dim[None, :]
    if IS_FULL:
        keys, values = tl.load(k_at), tl.load(v_at)
    else:
        present = (key < length(key_stream, tokens))[:, None]
        keys, values = tl.load(k_at, mask=present, other=0.0), tl.load(v_at, mask=present, other=0.0)
    weight = _weights(
        stream, query, key_stream, key, queries, tl.trans(keys), log_sum, reads, image_places, guidance_places, tokens,
        scale, IS_FULL, PRECISION,
    )  # fmt: skip
    by_weight = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
    by_logit = weight * (by_weight - delta[:, None])
    return tl.dot(by_logit.to(keys.dtype), keys, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _query_gradients(
    Q_text, Q_image, K_text, K_image, K_guidance, V_text, V_image, V_guidance, G_text, G_image, D_text, D_image,
    log_sums, deltas, parts, items, entries, reads, image_places, guidance_places,
    text_tokens, image_tokens, guidance_tokens, heads, batch_heads, scale, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = (text_tokens, image_tokens, guidance_tokens)
    tile, begin, full_end, end, slot, batch_head, batch, head = this_item(items, heads, batch_heads)
    stream = tile & 3
    query = (tile >> 2) + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_DIM)
    queries, gradients, log_sum, delta_row = load_rows(
        stream, query, Q_text, Q_image, G_text, G_image, log_sums, deltas, tokens, batch, head, batch_head, HEAD_DIM
    )
    total = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for half in tl.static_range(2):  # tiles that need no mask, then those that do
        first, last = (begin, full_end) if half == 0 else (full_end, end)
        for index in range(first, last):
            total = _query_tile(
                tl.load(entries + index), stream, query, queries, gradients, log_sum, delta_row, total,
                K_text, K_image, K_guidance, V_text, V_image, V_guidance, reads, image_places, guidance_places, tokens,
                batch, head, scale, half == 0, BLOCK_N, HEAD_DIM, PRECISION,
            )  # fmt: skip
    total *= factor
    if slot < 0:
        base, stride = address(stream, D_text, D_image, D_image, batch, head)
        at = base + query[:, None].to(tl.int64) * stride + dim[None, :]
        tl.store(at, total.to(D_image[0].dtype.element_ty), mask=(query < length(stream, tokens))[:, None])
    else:
        row = (slot.to(tl.int64) * batch_heads + batch_head) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(parts + row[:, None] * HEAD_DIM + dim[None, :], total)


@triton.jit
def load_rows(
    stream, query, Q_text, Q_image, G_text, G_image, log_sums, deltas, tokens, batch, head, batch_head,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Queries, gradients of their outputs, and what `_prepare` made of the rows."""
    present = (query < length(stream, tokens))[:, None]
    dim = tl.arange(0, HEAD_DIM)
    q_base, q_stride = address(stream, Q_text, Q_image, Q_image, batch, head)
    g_base, g_stride = address(stream, G_text, G_image, G_image, batch, head)
    at = query[:, None].to(tl.int64)
    queries = tl.load(q_base + at * q_stride + dim[None, :], mask=present, other=0.0)
    gradients = tl.load(g_base + at * g_stride + dim[None, :], mask=present, other=0.0)
    row = rows_before(stream, batch_head, tokens) + query
    return queries, gradients, tl.load(log_sums + row), tl.load(deltas + row)


@triton.jit
def _key_tile(
    entry, key_stream, key, keys, values, by_key, by_value,
    Q_text, Q_image, G_text, G_image, log_sums, deltas, reads, image_places, guidance_places, tokens,
    batch, head, batch_head, scale,
    IS_FULL: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries contributes to the gradients of keys and values."""
    stream = entry & 3
    query = (entry >> 2) + tl.arange(0, BLOCK_M)
    queries, gradients, log_sum, delta_row = load_rows(
        stream, query, Q_text, Q_image, G_text, G_image, log_sums, deltas, tokens, batch, head, batch_head, HEAD_DIM
    )
    weight = _weights(
        stream, query, key_stream, key, queries, tl.trans(keys), log_sum, reads, image_places, guidance_places, tokens,
        scale, IS_FULL, PRECISION,
    )  # fmt: skip
    by_value = tl.dot(tl.trans(weight.to(gradients.dtype)), gradients, by_value, input_precision=PRECISION)
    by_weight = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
    by_logit = weight * (by_weight - delta_row[:, None])
    by_key = tl.dot(tl.trans(by_logit.to(queries.dtype)), queries, by_key, input_precision=PRECISION)
    return by_key, by_value


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(
    Q_text, Q_image, K_text, K_image, K_guidance, V_text, V_image, V_guidance, G_text, G_image,
    DK_text, DK_image, DK_guidance, DV_text, DV_image, DV_guidance,
    log_sums, deltas, key_parts, value_parts, items, entries, reads, image_places, guidance_places,
    text_tokens, image_tokens, guidance_tokens,
    heads, batch_heads, scale, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = (text_tokens, image_tokens, guidance_tokens)
    tile, begin, full_end, end, slot, batch_head, batch, head = this_item(items, heads, batch_heads)
    stream = tile & 3
    key = (tile >> 2) + tl.arange(0, BLOCK_N)
    present = (key < length(stream, tokens))[:, None]
    dim = tl.arange(0, HEAD_DIM)
    at = key[:, None].to(tl.int64)
    k_base, k_stride = address(stream, K_text, K_image, K_guidance, batch, head)
    v_base, v_stride = address(stream, V_text, V_image, V_guidance, batch, head)
    keys = tl.load(k_base + at * k_stride + dim[None, :], mask=present, other=0.0)
    values = tl.load(v_base + at * v_stride + dim[None, :], mask=present, other=0.0)
    by_key = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    by_value = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for half in tl.static_range(2):  # tiles that need no mask, then those that do
        first, last = (begin, full_end) if half == 0 else (full_end, end)
        for index in range(first, last):
            by_key, by_value = _key_tile(
                tl.load(entries + index), stream, key, keys, values, by_key, by_value,
                Q_text, Q_image, G_text, G_image, log_sums, deltas, reads, image_places, guidance_places, tokens,
                batch, head, batch_head, scale, half == 0, BLOCK_M, HEAD_DIM, PRECISION,
            )  # fmt: skip
    by_key *= factor
    if slot < 0:
        dk_base, dk_stride = address(stream, DK_text, DK_image, DK_guidance, batch, head)
        dv_base, dv_stride = address(stream, DV_text, DV_image, DV_guidance, batch, head)
        kind = DK_image[0].dtype.element_ty
        tl.store(dk_base + at * dk_stride + dim[None, :], by_key.to(kind), mask=present)
        tl.store(dv_base + at * dv_stride + dim[None, :], by_value.to(kind), mask=present)
    else:
        row = (slot.to(tl.int64) * batch_heads + batch_head) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(key_parts + row[:, None] * HEAD_DIM + dim[None, :], by_key)
        tl.store(value_parts + row[:, None] * HEAD_DIM + dim[None, :], by_value)


def backward(
    gradients: Sequence[Tensor],
    outputs: Sequence[Tensor],
    lse: Tensor,
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    guidance: Sequence[Tensor],
    schedule: Schedule,
    scale: float,
    warps: int = 4,
    stages: int = 3,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the text's and the image's query, key and value, and of the guidance's key and value.

    Args:
        gradients: Of the text rows' and the image rows' outputs.
        outputs, lse: As `forward` gave them.
        text, image, guidance, scale: As `forward` took them.
        schedule: Of the layout; its tiles may differ from those of the forward pass.
    """
    batch, _, heads, head_dim = image[0].shape
    batch_heads, m, n = batch * heads, schedule.block_m, schedule.block_n
    by_text, by_image = ([part.new_empty(part.shape) for part in stream] for stream in (text, image))
    by_guidance = [part.new_zeros(part.shape) for part in guidance]  # no window may read the edge of a draft
    kind = precision(image[0].dtype)
    q, k, v = (
        [described(stream[part]) for stream in (text, image)] + ([described(guidance[part - 1])] if part else [])
        for part in range(3)
    )
    g = [described(each) for each in gradients]
    log_sums, deltas = prepare(outputs, g, lse, schedule.tokens)
    rest = (schedule.reads, schedule.image_places, schedule.guidance_places, *schedule.tokens, heads, batch_heads)
    settings = (scale * LOG2_E.value, scale, m, n, head_dim, kind)

    def workspace(lists: Lists, block: int) -> Tensor:
        return lse.new_empty(lists.slots, batch_heads, block, head_dim)

    rows, columns = schedule.rows, schedule.columns
    dq = [described(stream[0]) for stream in (by_text, by_image)]
    parts = workspace(rows, m)
    _query_gradients[(len(rows.items) * batch_heads,)](
        *q, *k, *v, *g, *dq, log_sums, deltas, parts, rows.items, rows.entries, *rest, *settings,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    add_parts([*dq, dq[1]], parts, rows.merges, schedule.tokens, heads)
    dk = [described(stream[index]) for stream, index in ((by_text, 1), (by_image, 1), (by_guidance, 0))]
    dv = [described(stream[index]) for stream, index in ((by_text, 2), (by_image, 2), (by_guidance, 1))]
    key_parts, value_parts = workspace(columns, n), workspace(columns, n)
    _key_gradients[(len(columns.items) * batch_heads,)](
        *q, *k, *v, *g, *dk, *dv, log_sums, deltas, key_parts, value_parts, columns.items, columns.entries, *rest,
        *settings, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    add_parts(dk, key_parts, columns.merges, schedule.tokens, heads)
    add_parts(dv, value_parts, columns.merges, schedule.tokens, heads)
    return by_text, by_image, by_guidance
