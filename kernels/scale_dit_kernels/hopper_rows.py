"""Gradients of queries on Hopper: as the forward pass in `hopper.py`, with two products for one.

Every computing group holds 64 query rows and the gradients of their outputs. The two products of a step and the one of
the step before are under way together; what is made of them meanwhile is the other group's time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scale_dit_kernels.hopper_fetch import fetch_pair, fetch_queries
from scale_dit_kernels.hopper_shared import ROWS, barriers, length, masked


@gluon.jit
def _advance(
    pair, pairs, step, query_stream, query, queries, gradients, total, log_sum, delta, scale,
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, reads, image_places, guidance_places, text, image, guidance,
    MASKED: gl.constexpr, LAYOUT: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Add what one pair of key tiles contributes to the gradient of the queries, up to the factor of the logits."""
    k_slot, v_slot = step % K_STAGES, step % V_STAGES
    mbarrier.wait(k_full.index(k_slot), (step // K_STAGES) & 1)
    nothing = gl.zeros([ROWS, 2 * ROWS], gl.float32, LAYOUT)
    logits = warpgroup_mma(queries, k_tiles.index(k_slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_slot), (step // V_STAGES) & 1)
    by_weight = warpgroup_mma(gradients, v_tiles.index(v_slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    if MASKED:
        logits = masked(
            logits, pair, pairs, query_stream, query, reads, image_places, guidance_places, text, image, guidance,
            LAYOUT,
        )  # fmt: skip
    weight = gl.exp2(logits * scale - log_sum[:, None])
    by_weight = warpgroup_mma_wait(0, deps=(by_weight,))
    mbarrier.arrive(v_empty.index(v_slot), count=1)
    by_logit = (weight * (by_weight - delta[:, None])).to(k_tiles.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    total = warpgroup_mma(gl.convert_layout(by_logit, operand), k_tiles.index(k_slot), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(k_empty.index(k_slot), count=1)
    return total


@gluon.jit
def _consume(
    DQ_text, dq_text_b, dq_text_s, dq_text_h, DQ_image, dq_image_b, dq_image_s, dq_image_h, log_sums, deltas, parts,
    work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
    heads, batch_heads, text_rows, rows, scale, factor,
    q_tiles, g_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    queries, gradients = q_tiles.index(GROUP), g_tiles.index(GROUP)
    step = 0
    for index in range(first, last):
        number = gl.load(work + index)
        item = items + number // batch_heads * 5
        batch_head = number % batch_heads
        tile, begin, full_end, end = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
        stream = tile & 3
        query = (tile >> 2) + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        row = batch_head.to(gl.int64) * rows + gl.where(stream == 1, text_rows, 0) + query
        log_sum, delta = gl.load(log_sums + row), gl.load(deltas + row)
        total = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        mbarrier.wait(q_full.index(0), (index - first) & 1)
        for pair in range(begin, full_end):
            total = _advance(
                pair, pairs, step, stream, query, queries, gradients, total, log_sum, delta, scale,
                k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, reads, image_places, guidance_places,
                text, image, guidance, False, LAYOUT, K_STAGES, V_STAGES,
            )  # fmt: skip
            step += 1
        for pair in range(full_end, end):
            total = _advance(
                pair, pairs, step, stream, query, queries, gradients, total, log_sum, delta, scale,
                k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, reads, image_places, guidance_places,
                text, image, guidance, True, LAYOUT, K_STAGES, V_STAGES,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        total = total * factor
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
        at_row = gl.convert_layout(query, gl.SliceLayout(1, OUT))
        slot = gl.load(item + 4)
        if slot < 0:
            batch, head = batch_head // heads, batch_head % heads
            if stream == 0:
                base = DQ_text + batch.to(gl.int64) * dq_text_b + head * dq_text_h
                stride = dq_text_s
            else:
                base = DQ_image + batch.to(gl.int64) * dq_image_b + head * dq_image_h
                stride = dq_image_s
            present = at_row < length(stream, text, image, guidance)
            at = base + at_row[:, None].to(gl.int64) * stride + dim[None, :]
            gl.store(at, total.to(k_tiles.dtype), mask=present[:, None])
        else:
            top = (slot.to(gl.int64) * batch_heads + batch_head) * (2 * ROWS) - (tile >> 2)
            gl.store(parts + (top + at_row)[:, None] * HEAD_DIM + dim[None, :], total)


@gluon.jit
def _produce(
    q_text, q_image, g_text, g_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance,
    work, first, last, items, pairs, heads, batch_heads,
    q_boxes, g_boxes, k_boxes, v_boxes, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching group."""
    BOXES: gl.constexpr = 2 * (HEAD_DIM // COLUMNS)
    BYTES: gl.constexpr = 2 * ROWS * HEAD_DIM * 2
    step = 0
    for index in range(first, last):
        number = gl.load(work + index)
        item = items + number // batch_heads * 5
        batch_head = number % batch_heads
        batch, head = batch_head // heads, batch_head % heads
        tile, begin, end = gl.load(item), gl.load(item + 1), gl.load(item + 3)
        mbarrier.wait(q_empty.index(0), ((index - first) & 1) ^ 1)
        mbarrier.expect(q_full.index(0), 2 * BYTES)
        for group in gl.static_range(2):
            if (tile & 3) == 0:
                fetch_queries(q_text, tile, batch, head, q_full.index(0), q_boxes, HEAD_DIM, COLUMNS, group)
                fetch_queries(g_text, tile, batch, head, q_full.index(0), g_boxes, HEAD_DIM, COLUMNS, group)
            else:
                fetch_queries(q_image, tile, batch, head, q_full.index(0), q_boxes, HEAD_DIM, COLUMNS, group)
                fetch_queries(g_image, tile, batch, head, q_full.index(0), g_boxes, HEAD_DIM, COLUMNS, group)
        for pair in range(begin, end):
            one, two = gl.load(pairs + 2 * pair), gl.load(pairs + 2 * pair + 1)
            k_slot, v_slot = step % K_STAGES, step % V_STAGES
            fetch_pair(
                one, two, k_text, k_image, k_guidance, batch, head, k_full.index(k_slot), k_empty.index(k_slot),
                ((step // K_STAGES) & 1) ^ 1, k_boxes, k_slot * BOXES, HEAD_DIM, COLUMNS, BYTES,
            )  # fmt: skip
            fetch_pair(
                one, two, v_text, v_image, v_guidance, batch, head, v_full.index(v_slot), v_empty.index(v_slot),
                ((step // V_STAGES) & 1) ^ 1, v_boxes, v_slot * BOXES, HEAD_DIM, COLUMNS, BYTES,
            )  # fmt: skip
            step += 1


@gluon.jit(do_not_specialize=["text", "image", "guidance", "heads", "batch_heads", "text_rows", "rows"])
def query_gradients(
    q_text, q_image, g_text, g_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance,
    DQ_text, dq_text_b, dq_text_s, dq_text_h, DQ_image, dq_image_b, dq_image_s, dq_image_h, log_sums, deltas, parts,
    work, starts, items, pairs, reads, image_places, guidance_places, text, image, guidance,
    heads, batch_heads, text_rows, rows, scale, factor, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BOX_LAYOUT: gl.constexpr, TILE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Launched with a program for every multiprocessor; see `scale_dit_kernels.hopper_backward`."""
    BOXES: gl.constexpr = 2 * (HEAD_DIM // COLUMNS)
    dtype: gl.constexpr = k_image.dtype
    q_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    g_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    k_boxes = gl.allocate_shared_memory(dtype, [K_STAGES * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    v_boxes = gl.allocate_shared_memory(dtype, [V_STAGES * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    q_tiles = q_boxes._reinterpret(dtype, [2, ROWS, HEAD_DIM], TILE_LAYOUT)
    g_tiles = g_boxes._reinterpret(dtype, [2, ROWS, HEAD_DIM], TILE_LAYOUT)
    k_tiles = k_boxes._reinterpret(dtype, [K_STAGES, 2 * ROWS, HEAD_DIM], TILE_LAYOUT)
    v_tiles = v_boxes._reinterpret(dtype, [V_STAGES, 2 * ROWS, HEAD_DIM], TILE_LAYOUT)
    q_full, q_empty = barriers(1)
    k_full, k_empty = barriers(K_STAGES)
    v_full, v_empty = barriers(V_STAGES)
    fence_async_shared()
    first, last = gl.load(starts + gl.program_id(0)), gl.load(starts + gl.program_id(0) + 1)
    gl.warp_specialize(
        [
            (_consume, (
                DQ_text, dq_text_b, dq_text_s, dq_text_h, DQ_image, dq_image_b, dq_image_s, dq_image_h,
                log_sums, deltas, parts, work, first, last, items, pairs, reads, image_places, guidance_places,
                text, image, guidance, heads, batch_heads, text_rows, rows, scale, factor,
                q_tiles, g_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                gl.constexpr(0), HEAD_DIM, K_STAGES, V_STAGES,
            )),
            (_consume, (
                DQ_text, dq_text_b, dq_text_s, dq_text_h, DQ_image, dq_image_b, dq_image_s, dq_image_h,
                log_sums, deltas, parts, work, first, last, items, pairs, reads, image_places, guidance_places,
                text, image, guidance, heads, batch_heads, text_rows, rows, scale, factor,
                q_tiles, g_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                gl.constexpr(1), HEAD_DIM, K_STAGES, V_STAGES,
            )),
            (_produce, (
                q_text, q_image, g_text, g_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance,
                work, first, last, items, pairs, heads, batch_heads,
                q_boxes, g_boxes, k_boxes, v_boxes, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                HEAD_DIM, COLUMNS, K_STAGES, V_STAGES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
