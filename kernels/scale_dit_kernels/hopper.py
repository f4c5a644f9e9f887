"""The forward pass for Hopper: a program keeps one multiprocessor busy, and its warps share the work by kind.

One group of four warps fetches ahead (`hopper_fetch.py`), two compute 64 query rows each. A computing group
starts the product of the next keys before it turns the present logits into weights, so that the matrix units and the
exponential units work at once (FlashAttention-3, Shah et al. 2024). A step takes two tiles of 64 keys, which need not
be neighbours. Programs stay for the whole launch, each with its own list of work, so that one item's first fetches run
during another's last steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from scale_dit_kernels.forward import merge
from scale_dit_kernels.hopper_fetch import produce
from scale_dit_kernels.hopper_shared import ROWS, barriers, length, masked
from scale_dit_kernels.schedule import Schedule, Work

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
SHARED_MEMORY = 227 * 1024


@gluon.jit
def _weigh(logits, highest, scale, MASKED: gl.constexpr):
    """Weights of a step against the new highest logit, and how much the earlier ones fade."""
    new_highest = gl.maximum(highest, gl.max(logits, 1))
    reference = new_highest * scale
    if MASKED:  # A row that has read nothing yet: -inf - -inf would be NaN.
        reference = gl.where(new_highest == float("-inf"), 0.0, reference)
    weight = gl.exp2(logits * scale - reference[:, None])
    fade = gl.exp2(highest * scale - reference)
    return weight, fade, new_highest


@gluon.jit
def _await_keys(step, exists, k_full, STAGES: gl.constexpr):
    mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1, pred=exists)


@gluon.jit
def _advance(
    pair, end, pairs, step, query_stream, query, queries, total, weights, highest, weight, scale,
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, reads, image_places, guidance_places, text, image, guidance,
    MASKED: gl.constexpr, LAYOUT: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take the keys of one step, and the values of the step before it."""
    slot, last = step % STAGES, (step - 1) % STAGES
    logits = warpgroup_mma(
        queries, k_tiles.index(slot).permute((1, 0)), gl.zeros([ROWS, 2 * ROWS], gl.float32, LAYOUT),
        use_acc=False, is_async=True,
    )  # fmt: skip
    mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
    total = warpgroup_mma(weight, v_tiles.index(last), total, is_async=True)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASKED:
        logits = masked(
            logits, pair, pairs, query_stream, query, reads, image_places, guidance_places, text, image, guidance,
            LAYOUT,
        )  # fmt: skip
    new_weight, fade, highest = _weigh(logits, highest, scale, MASKED)
    weights = weights * fade + gl.sum(new_weight, 1)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    next_weight = gl.convert_layout(new_weight.to(weight.dtype), operand)
    # The weights must be made while the values' product runs. What stands before a wait on a barrier stays there, and
    # the next keys have to be waited for at some time.
    _await_keys(step + 1, pair + 1 < end, k_full, STAGES)
    total, next_weight = warpgroup_mma_wait(0, deps=(total, next_weight))
    mbarrier.arrive(v_empty.index(last), count=1)
    total = total * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    return total, weights, highest, next_weight


@gluon.jit
def _consume(
    O_text, o_text_b, o_text_s, o_text_h, O_image, o_image_b, o_image_s, o_image_h, lse, part_out, part_lse,
    work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
    heads, batch_heads, scale, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    dtype: gl.constexpr = k_tiles.dtype
    queries = q_tiles.index(GROUP)
    step = 0
    for index in range(first, last):
        number = gl.load(work + index)
        item = items + number // batch_heads * 5
        batch_head = number % batch_heads
        tile, begin, full_end, end = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
        stream = tile & 3
        query = (tile >> 2) + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))

        slot = step % STAGES
        mbarrier.wait(q_full.index(0), (index - first) & 1)
        _await_keys(step, True, k_full, STAGES)
        logits = warpgroup_mma(
            queries, k_tiles.index(slot).permute((1, 0)), gl.zeros([ROWS, 2 * ROWS], gl.float32, LAYOUT),
            use_acc=False, is_async=True,
        )  # fmt: skip
        logits = warpgroup_mma_wait(0, deps=(logits,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        if full_end == begin:
            logits = masked(
                logits, begin, pairs, stream, query, reads, image_places, guidance_places, text, image, guidance,
                LAYOUT,
            )  # fmt: skip
        highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
        weight, _, highest = _weigh(logits, highest, scale, True)
        weights = gl.sum(weight, 1)
        weight = gl.convert_layout(weight.to(dtype), OPERAND)
        total = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        step += 1
        _await_keys(step, begin + 1 < end, k_full, STAGES)
        for pair in range(begin + 1, full_end):
            total, weights, highest, weight = _advance(
                pair, end, pairs, step, stream, query, queries, total, weights, highest, weight, scale,
                k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, reads, image_places, guidance_places,
                text, image, guidance, False, LAYOUT, OUT, STAGES,
            )  # fmt: skip
            step += 1
        for pair in range(gl.maximum(begin + 1, full_end), end):
            total, weights, highest, weight = _advance(
                pair, end, pairs, step, stream, query, queries, total, weights, highest, weight, scale,
                k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, reads, image_places, guidance_places,
                text, image, guidance, True, LAYOUT, OUT, STAGES,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        slot = (step - 1) % STAGES
        mbarrier.wait(v_full.index(slot), ((step - 1) // STAGES) & 1)
        total = warpgroup_mma(weight, v_tiles.index(slot), total, is_async=True)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(v_empty.index(slot), count=1)

        present = query < length(stream, text, image, guidance)
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
        log_sum = highest * scale + gl.log2(weights)  # -inf + -inf where nothing was read
        inverse = gl.convert_layout(1.0 / gl.where(weights == 0, 1.0, weights), gl.SliceLayout(1, OUT))
        total = total * inverse[:, None]
        at_row = gl.convert_layout(query, gl.SliceLayout(1, OUT))
        out = gl.load(item + 4)
        if out < 0:
            batch, head = batch_head // heads, batch_head % heads
            if stream == 0:
                base = O_text + batch.to(gl.int64) * o_text_b + head * o_text_h
                stride = o_text_s
            else:
                base = O_image + batch.to(gl.int64) * o_image_b + head * o_image_h
                stride = o_image_s
            at = base + at_row[:, None].to(gl.int64) * stride + dim[None, :]
            gl.store(at, total.to(dtype), mask=gl.convert_layout(present, gl.SliceLayout(1, OUT))[:, None])
            row = batch_head.to(gl.int64) * (text + image) + gl.where(stream == 1, text, 0) + query
            gl.store(lse + row, log_sum * LN_2, mask=present)
        else:
            top = (out.to(gl.int64) * batch_heads + batch_head) * (2 * ROWS) - (tile >> 2)
            gl.store(part_out + (top + at_row)[:, None] * HEAD_DIM + dim[None, :], total)
            gl.store(part_lse + top + query, log_sum)


@gluon.jit(do_not_specialize=["text", "image", "guidance", "heads", "batch_heads"])
def _forward(
    q_text, q_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance,
    O_text, o_text_b, o_text_s, o_text_h, O_image, o_image_b, o_image_s, o_image_h, lse, part_out, part_lse,
    work, starts, items, pairs, reads, image_places, guidance_places, text, image, guidance,
    heads, batch_heads, scale, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    BOX_LAYOUT: gl.constexpr, TILE_LAYOUT: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = 2 * (HEAD_DIM // COLUMNS)
    dtype: gl.constexpr = k_image.dtype
    q_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    k_boxes = gl.allocate_shared_memory(dtype, [STAGES * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    v_boxes = gl.allocate_shared_memory(dtype, [STAGES * BOXES, 1, ROWS, 1, COLUMNS], BOX_LAYOUT)
    q_tiles = q_boxes._reinterpret(dtype, [2, ROWS, HEAD_DIM], TILE_LAYOUT)
    k_tiles = k_boxes._reinterpret(dtype, [STAGES, 2 * ROWS, HEAD_DIM], TILE_LAYOUT)
    v_tiles = v_boxes._reinterpret(dtype, [STAGES, 2 * ROWS, HEAD_DIM], TILE_LAYOUT)
    q_full, q_empty = barriers(1)
    k_full, k_empty = barriers(STAGES)
    v_full, v_empty = barriers(STAGES)
    fence_async_shared()
    first, last = gl.load(starts + gl.program_id(0)), gl.load(starts + gl.program_id(0) + 1)
    gl.warp_specialize(
        [
            (_consume, (
                O_text, o_text_b, o_text_s, o_text_h, O_image, o_image_b, o_image_s, o_image_h, lse, part_out, part_lse,
                work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
                heads, batch_heads, scale, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                gl.constexpr(0), HEAD_DIM, STAGES,
            )),
            (_consume, (
                O_text, o_text_b, o_text_s, o_text_h, O_image, o_image_b, o_image_s, o_image_h, lse, part_out, part_lse,
                work, first, last, items, pairs, reads, image_places, guidance_places, text, image, guidance,
                heads, batch_heads, scale, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                gl.constexpr(1), HEAD_DIM, STAGES,
            )),
            (produce, (
                q_text, q_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance, work, first, last, items,
                pairs, heads, batch_heads, q_boxes, k_boxes, v_boxes, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                HEAD_DIM, COLUMNS, STAGES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


def stages(head_dim: int) -> int:
    """Steps whose keys and values shared memory holds beside the queries, at most 4."""
    tile, barriers = ROWS.value * head_dim * 2, 1024
    return min(4, (SHARED_MEMORY - 2 * tile - barriers) // (4 * tile))


def boxes(stream: Tensor) -> TensorDescriptor:
    """`[B, tokens, H, D]` as TMA fetches it: 64 tokens and up to 64 numbers of a head at a time."""
    columns = min(stream.shape[-1], 64)
    layout = gl.NVMMASharedLayout(2 * columns, 16, 4)
    return TensorDescriptor(stream, stream.shape, stream.stride(), [1, ROWS.value, 1, columns], layout)


def forward(
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    guidance: Sequence[Tensor],
    schedule: Schedule,
    work: Work,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `scale_dit_kernels.forward.forward`, for bfloat16 and float16, tiles of 128 queries and 64 keys."""
    query = image[0]
    batch, _, heads, head_dim = query.shape
    columns = min(head_dim, 64)
    layouts = [gl.NVMMASharedLayout(2 * columns, 16, rank) for rank in (4, 2)]

    streams = (text[0], query, text[1], image[1], guidance[0], text[2], image[2], guidance[1])
    joined = query.new_empty(batch, sum(schedule.tokens[:2]), heads, head_dim)
    outputs = joined.split(list(schedule.tokens[:2]), dim=1)
    batch_heads, slots = batch * heads, schedule.rows.slots
    lse = query.new_empty(batch, heads, sum(schedule.tokens[:2]), dtype=torch.float32)
    part_lse = lse.new_empty(slots, batch_heads, schedule.block_m)
    part_out = lse.new_empty(slots, batch_heads, schedule.block_m, head_dim)
    _forward[(len(work.starts) - 1,)](
        *(boxes(each if each.shape[1] else query) for each in streams),
        outputs[0], *outputs[0].stride()[:3], outputs[1], *outputs[1].stride()[:3], lse, part_out, part_lse,
        work.order, work.starts, work.items, work.pairs, schedule.reads, schedule.image_places,
        schedule.guidance_places, *schedule.tokens, heads, batch_heads, scale * LOG2_E.value,
        head_dim, columns, stages(head_dim), *layouts, num_warps=4, maxnreg=168,
    )  # fmt: skip
    merge(outputs, lse, part_out, part_lse, schedule)
    return joined, lse
