"""Gradients of keys and values on Hopper: every computing group holds 64 keys, and queries come in tiles of 64.

Logits and weights are computed transposed, `[keys, queries]`, so that they are first operands of the products that
gradients take. Two neighbouring tiles of keys share what is fetched; a group passes over queries that do not read
its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scale_dit_kernels.hopper_fetch import fetch, fetch_tile
from scale_dit_kernels.hopper_shared import ROWS, barriers, length, may_read


@gluon.jit
def _advance(
    entry, how, step, tile, key, keys, values, by_key, by_value, scale, q_tiles, g_tiles, l_rows, d_rows, full, empty,
    reads, image_places, guidance_places, text, image, guidance,
    MAY_MASK: gl.constexpr, LAYOUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add what one tile of queries contributes to the gradients of keys, up to the factor of the logits, and values."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    dtype: gl.constexpr = q_tiles.dtype
    slot = step % STAGES
    queries, gradients = q_tiles.index(slot), g_tiles.index(slot)
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    logits = warpgroup_mma(keys, queries.permute((1, 0)), nothing, use_acc=False, is_async=True)
    by_weight = warpgroup_mma(values, gradients.permute((1, 0)), nothing, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    log_sum = l_rows.index(slot).load(gl.SliceLayout(0, LAYOUT))
    weight = gl.exp2(logits * scale - log_sum[None, :])
    if MAY_MASK:  # noqa: SIM102 - the compiler knows this one
        if how == 2:
            query = (entry >> 2) + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
            allowed = may_read(
                entry & 3, query, (tile & 3) + key * 0, key, reads, image_places, guidance_places,
                text, image, guidance, False,
            )  # fmt: skip
            weight = gl.where(allowed, weight, 0.0)
    by_value = warpgroup_mma(gl.convert_layout(weight.to(dtype), OPERAND), gradients, by_value, is_async=True)
    by_weight = warpgroup_mma_wait(1, deps=(by_weight,))
    delta = d_rows.index(slot).load(gl.SliceLayout(0, LAYOUT))
    by_logit = (weight * (by_weight - delta[None, :])).to(dtype)
    by_key = warpgroup_mma(gl.convert_layout(by_logit, OPERAND), queries, by_key, is_async=True)
    by_key, by_value = warpgroup_mma_wait(0, deps=(by_key, by_value))
    mbarrier.arrive(empty.index(slot), count=1)
    return by_key, by_value


@gluon.jit
def _store(
    total, tile, slot, text, text_b, text_s, text_h, image, image_b, image_s, image_h, guidance, guidance_b, guidance_s,
    guidance_h, parts, tokens, batch_head, heads, batch_heads, HEAD_DIM: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile, or leave it in a slot."""
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    if slot < 0:
        stream = tile & 3
        batch, head = batch_head // heads, batch_head % heads
        if stream == 0:
            base, stride = text + batch.to(gl.int64) * text_b + head * text_h, text_s
        elif stream == 1:
            base, stride = image + batch.to(gl.int64) * image_b + head * image_h, image_s
        else:
            base, stride = guidance + batch.to(gl.int64) * guidance_b + head * guidance_h, guidance_s
        token = (tile >> 2) + row
        at = base + token[:, None].to(gl.int64) * stride + dim[None, :]
        gl.store(at, total.to(image.dtype.element_ty), mask=(token < tokens)[:, None])
    else:
        top = (slot.to(gl.int64) * batch_heads + batch_head) * ROWS
        gl.store(parts + (top + row)[:, None] * HEAD_DIM + dim[None, :], total)


@gluon.jit
def _consume(
    DK_text, dk_text_b, dk_text_s, dk_text_h, DK_image, dk_image_b, dk_image_s, dk_image_h,
    DK_guidance, dk_guidance_b, dk_guidance_s, dk_guidance_h,
    DV_text, dv_text_b, dv_text_s, dv_text_h, DV_image, dv_image_b, dv_image_s, dv_image_h,
    DV_guidance, dv_guidance_b, dv_guidance_s, dv_guidance_h, key_parts, value_parts,
    work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
    heads, batch_heads, scale, factor,
    k_tiles, v_tiles, q_tiles, g_tiles, l_rows, d_rows, kv_full, kv_empty, full, empty,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, KV_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    step = 0
    for index in range(first, last):
        number = gl.load(work + index)
        item = items + number // batch_heads * 7
        batch_head = number % batch_heads
        tile, begin, full_end, end = gl.load(item + GROUP), gl.load(item + 2), gl.load(item + 3), gl.load(item + 4)
        key = (tile >> 2) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        by_key = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        by_value = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        kv_slot = (index - first) % KV_STAGES
        keys, values = k_tiles.index(kv_slot * 2 + GROUP), v_tiles.index(kv_slot * 2 + GROUP)
        mbarrier.wait(kv_full.index(kv_slot), ((index - first) // KV_STAGES) & 1)
        for place in range(begin, full_end):
            by_key, by_value = _advance(
                gl.load(pairs + 2 * place), 1, step, tile, key, keys, values, by_key, by_value, scale,
                q_tiles, g_tiles, l_rows, d_rows, full, empty, reads, image_places, guidance_places,
                text, image, guidance, False, LAYOUT, STAGES,
            )  # fmt: skip
            step += 1
        for place in range(full_end, end):
            entry, how = gl.load(pairs + 2 * place), (gl.load(pairs + 2 * place + 1) >> (2 * GROUP)) & 3
            if how != 0:
                by_key, by_value = _advance(
                    entry, how, step, tile, key, keys, values, by_key, by_value, scale,
                    q_tiles, g_tiles, l_rows, d_rows, full, empty, reads, image_places, guidance_places,
                    text, image, guidance, True, LAYOUT, STAGES,
                )  # fmt: skip
            else:
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
        mbarrier.arrive(kv_empty.index(kv_slot), count=1)
        tokens = length(tile & 3, text, image, guidance)
        _store(
            by_value, tile, gl.load(item + 5 + GROUP), DV_text, dv_text_b, dv_text_s, dv_text_h,
            DV_image, dv_image_b, dv_image_s, dv_image_h, DV_guidance, dv_guidance_b, dv_guidance_s, dv_guidance_h,
            value_parts, tokens, batch_head, heads, batch_heads, HEAD_DIM, OUT,
        )  # fmt: skip
        _store(
            by_key * factor, tile, gl.load(item + 5 + GROUP), DK_text, dk_text_b, dk_text_s, dk_text_h,
            DK_image, dk_image_b, dk_image_s, dk_image_h, DK_guidance, dk_guidance_b, dk_guidance_s, dk_guidance_h,
            key_parts, tokens, batch_head, heads, batch_heads, HEAD_DIM, OUT,
        )  # fmt: skip


@gluon.jit
def _produce(
    q_text, q_image, g_text, g_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance, log_sums, deltas,
    work, first, last, items, pairs, heads, batch_heads, text_rows,
    k_boxes, v_boxes, q_boxes, g_boxes, l_boxes, d_boxes, kv_full, kv_empty, full, empty,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, KV_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching group."""
    BOXES: gl.constexpr = HEAD_DIM // COLUMNS
    BYTES: gl.constexpr = ROWS * HEAD_DIM * 2
    step = 0
    for index in range(first, last):
        number = gl.load(work + index)
        item = items + number // batch_heads * 7
        batch_head = number % batch_heads
        batch, head = batch_head // heads, batch_head % heads
        begin, end = gl.load(item + 2), gl.load(item + 4)
        kv_slot = (index - first) % KV_STAGES
        kv = kv_full.index(kv_slot)
        mbarrier.wait(kv_empty.index(kv_slot), (((index - first) // KV_STAGES) & 1) ^ 1)
        mbarrier.expect(kv, 4 * BYTES)
        for group in gl.static_range(2):
            tile = gl.load(item + group)
            box = (kv_slot * 2 + group) * BOXES
            fetch_tile(tile, k_text, k_image, k_guidance, batch, head, kv, k_boxes, box, HEAD_DIM, COLUMNS, 1)
            fetch_tile(tile, v_text, v_image, v_guidance, batch, head, kv, v_boxes, box, HEAD_DIM, COLUMNS, 1)
        for place in range(begin, end):
            entry = gl.load(pairs + 2 * place)
            slot = step % STAGES
            barrier = full.index(slot)
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, 2 * BYTES + 2 * ROWS * 4)
            start = entry >> 2
            if (entry & 3) == 0:
                fetch(q_text, batch, start, head, barrier, q_boxes, slot * BOXES, HEAD_DIM, COLUMNS, 1)
                fetch(g_text, batch, start, head, barrier, g_boxes, slot * BOXES, HEAD_DIM, COLUMNS, 1)
            else:
                fetch(q_image, batch, start, head, barrier, q_boxes, slot * BOXES, HEAD_DIM, COLUMNS, 1)
                fetch(g_image, batch, start, head, barrier, g_boxes, slot * BOXES, HEAD_DIM, COLUMNS, 1)
            row = gl.where((entry & 3) == 0, 0, text_rows) + start
            tma.async_copy_global_to_shared(log_sums, [batch_head, row], barrier, l_boxes.index(slot))
            tma.async_copy_global_to_shared(deltas, [batch_head, row], barrier, d_boxes.index(slot))
            step += 1


@gluon.jit(do_not_specialize=["text", "image", "guidance", "heads", "batch_heads", "text_rows"])
def key_gradients(
    q_text, q_image, g_text, g_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance, log_sums, deltas,
    DK_text, dk_text_b, dk_text_s, dk_text_h, DK_image, dk_image_b, dk_image_s, dk_image_h,
    DK_guidance, dk_guidance_b, dk_guidance_s, dk_guidance_h,
    DV_text, dv_text_b, dv_text_s, dv_text_h, DV_image, dv_image_b, dv_image_s, dv_image_h,
    DV_guidance, dv_guidance_b, dv_guidance_s, dv_guidance_h, key_parts, value_parts,
    work, starts, items, pairs, reads, image_places, guidance_places, text, image, guidance,
    heads, batch_heads, text_rows, scale, factor,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, KV_STAGES: gl.constexpr, STAGES: gl.constexpr,
    BOX_LAYOUT: gl.constexpr, TILE_LAYOUT: gl.constexpr, ROW_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Launched with a program for every multiprocessor; see `scale_dit_kernels.hopper_backward`."""
    BOXES: gl.constexpr = HEAD_DIM // COLUMNS
    dtype: gl.constexpr = k_image.dtype
    k_boxes = gl.allocate_shared_memory(dtype, [KV_STAGES * 2 * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    v_boxes = gl.allocate_shared_memory(dtype, [KV_STAGES * 2 * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    q_boxes = gl.allocate_shared_memory(dtype, [STAGES * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    g_boxes = gl.allocate_shared_memory(dtype, [STAGES * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    l_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], ROW_LAYOUT)
    d_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], ROW_LAYOUT)
    k_tiles = k_boxes._reinterpret(dtype, [KV_STAGES * 2, ROWS, HEAD_DIM], TILE_LAYOUT)
    v_tiles = v_boxes._reinterpret(dtype, [KV_STAGES * 2, ROWS, HEAD_DIM], TILE_LAYOUT)
    q_tiles = q_boxes._reinterpret(dtype, [STAGES, ROWS, HEAD_DIM], TILE_LAYOUT)
    g_tiles = g_boxes._reinterpret(dtype, [STAGES, ROWS, HEAD_DIM], TILE_LAYOUT)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    l_rows = l_boxes._reinterpret(gl.float32, [STAGES, ROWS], FLAT)
    d_rows = d_boxes._reinterpret(gl.float32, [STAGES, ROWS], FLAT)
    kv_full, kv_empty = barriers(KV_STAGES)
    full, empty = barriers(STAGES)
    fence_async_shared()
    first, last = gl.load(starts + gl.program_id(0)), gl.load(starts + gl.program_id(0) + 1)
    gl.warp_specialize(
        [
            (_consume, (
                DK_text, dk_text_b, dk_text_s, dk_text_h, DK_image, dk_image_b, dk_image_s, dk_image_h,
                DK_guidance, dk_guidance_b, dk_guidance_s, dk_guidance_h,
                DV_text, dv_text_b, dv_text_s, dv_text_h, DV_image, dv_image_b, dv_image_s, dv_image_h,
                DV_guidance, dv_guidance_b, dv_guidance_s, dv_guidance_h, key_parts, value_parts,
                work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
                heads, batch_heads, scale, factor,
                k_tiles, v_tiles, q_tiles, g_tiles, l_rows, d_rows, kv_full, kv_empty, full, empty,
                gl.constexpr(0), HEAD_DIM, KV_STAGES, STAGES,
            )),
            (_consume, (
                DK_text, dk_text_b, dk_text_s, dk_text_h, DK_image, dk_image_b, dk_image_s, dk_image_h,
                DK_guidance, dk_guidance_b, dk_guidance_s, dk_guidance_h,
                DV_text, dv_text_b, dv_text_s, dv_text_h, DV_image, dv_image_b, dv_image_s, dv_image_h,
                DV_guidance, dv_guidance_b, dv_guidance_s, dv_guidance_h, key_parts, value_parts,
                work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
                heads, batch_heads, scale, factor,
                k_tiles, v_tiles, q_tiles, g_tiles, l_rows, d_rows, kv_full, kv_empty, full, empty,
                gl.constexpr(1), HEAD_DIM, KV_STAGES, STAGES,
            )),
            (_produce, (
                q_text, q_image, g_text, g_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance,
                log_sums, deltas, work, first, last, items, pairs, heads, batch_heads, text_rows,
                k_boxes, v_boxes, q_boxes, g_boxes, l_boxes, d_boxes, kv_full, kv_empty, full, empty,
                HEAD_DIM, COLUMNS, KV_STAGES, STAGES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
