"""The forward pass for Hopper: a program keeps one multiprocessor busy, and its warps share the work by kind.

One warp fetches queries, keys and values ahead by TMA; two groups of four warps compute 64 query rows each. Each group
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from scale_dit_kernels.forward import merge
from scale_dit_kernels.schedule import COLUMNS, Schedule, Work

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
WORK_COLUMNS = gl.constexpr(COLUMNS)
FAR = gl.constexpr(0x7FFF)
"""A row and column that no picture has."""
SHARED_MEMORY = 227 * 1024
ROWS = gl.constexpr(64)
"""Query rows of one group of warps, and keys of one tile."""


@gluon.jit
def _fetch(descriptor, batch, start, head, barrier, boxes, first, STEP: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Fetch 64 tokens of a stream into boxes of 64 columns or fewer; a tile's boxes lie STEP apart."""
    COLUMNS: gl.constexpr = descriptor.block_shape[3]
    for part in gl.static_range(HEAD_DIM // COLUMNS):
        tma.async_copy_global_to_shared(
            descriptor, [batch, start, head, part * COLUMNS], barrier, boxes.index(first + part * STEP)
        )


@gluon.jit
def _fetch_pair(
    one, two, streams, batch, head, full, empty, phase, boxes, slot,
    HEAD_DIM: gl.constexpr, BOXES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Wait until a slot is empty, and fetch two tiles of keys or values into it."""
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, BYTES)
    for half in gl.static_range(2):
        entry = two if half else one
        first = slot * BOXES + half
        if entry & 3 == 0:
            _fetch(streams[0], batch, entry >> 2, head, full, boxes, first, 2, HEAD_DIM)
        elif entry & 3 == 1:
            _fetch(streams[1], batch, entry >> 2, head, full, boxes, first, 2, HEAD_DIM)
        else:
            _fetch(streams[2], batch, entry >> 2, head, full, boxes, first, 2, HEAD_DIM)


@gluon.jit
def _item(row):
    """An item of work, see `Work`. It is asked for an item ahead: memory takes as long as a step."""
    return (
        gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3), gl.load(row + 4), gl.load(row + 5)
    )  # fmt: skip


@gluon.jit
def _produce(
    queries, keys, values, share, heads, boxes, barriers,
    HEAD_DIM: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp."""
    work, first, last, pairs = share
    q_boxes, k_boxes, v_boxes = boxes
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BYTES: gl.constexpr = 2 * ROWS * HEAD_DIM * 2
    step = 0
    tile, begin, _, end, _, batch_head = _item(work + first * WORK_COLUMNS)
    for index in range(first, last):
        following = _item(work + (index + 1) * WORK_COLUMNS)
        batch, head = batch_head // heads, batch_head % heads
        mbarrier.wait(q_empty.index(0), ((index - first) & 1) ^ 1)
        mbarrier.expect(q_full.index(0), BYTES)
        for group in gl.static_range(2):
            start, box = (tile >> 2) + group * ROWS, group * (BOXES // 2)
            if tile & 3 == 0:
                _fetch(queries[0], batch, start, head, q_full.index(0), q_boxes, box, 1, HEAD_DIM)
            else:
                _fetch(queries[1], batch, start, head, q_full.index(0), q_boxes, box, 1, HEAD_DIM)
        for pair in range(begin, end):
            one, two = gl.load(pairs + 2 * pair), gl.load(pairs + 2 * pair + 1)
            slot = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            _fetch_pair(
                one, two, keys, batch, head, k_full.index(slot), k_empty.index(slot), phase, k_boxes, slot,
                HEAD_DIM, BOXES, BYTES,
            )  # fmt: skip
            _fetch_pair(
                one, two, values, batch, head, v_full.index(slot), v_empty.index(slot), phase, v_boxes, slot,
                HEAD_DIM, BOXES, BYTES,
            )  # fmt: skip
            step += 1
        tile, begin, _, end, _, batch_head = following


@gluon.jit
def _length(stream, text, image, guidance):
    return gl.where(stream == 0, text, gl.where(stream == 1, image, guidance))


@gluon.jit
def _edges(stream, query_stream, query, reads, image):
    """First and last + 1 row and column that each query may read of a tile's stream; of text, and by text, all."""
    windowed = (query_stream == 1) & (stream != 0)
    inside = windowed & (query < image)
    at = reads + gl.where(stream == 2, 4, 0) * image + query
    top, bottom = gl.load(at, mask=inside, other=0), gl.load(at + image, mask=inside, other=0)
    left, right = gl.load(at + 2 * image, mask=inside, other=0), gl.load(at + 3 * image, mask=inside, other=0)
    return top, gl.where(windowed, bottom, FAR), left, gl.where(windowed, right, FAR)


@gluon.jit
def _masked(logits, pair, pairs, query_stream, query, geometry, LAYOUT: gl.constexpr):
    """-inf where a row may not read. All keys of a tile are of one stream, so its bounds are a row's alone."""
    reads, image_places, guidance_places, text, image, guidance = geometry
    one, two = gl.load(pairs + 2 * pair), gl.load(pairs + 2 * pair + 1)
    place = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(0, LAYOUT))
    is_one = place < ROWS
    entry = gl.where(is_one, one, two)
    stream = entry & 3
    key = (entry >> 2) + place % ROWS
    present = key < _length(stream, text, image, guidance)
    of_query = (query_stream == 1) & present
    seen = gl.load(image_places + key, mask=of_query & (stream == 1), other=0)
    seen += gl.load(guidance_places + key, mask=of_query & (stream == 2), other=0)
    seen = gl.where(present, seen, FAR << 16)
    row, column = (seen >> 16)[None, :], (seen & 0xFFFF)[None, :]
    top, bottom, left, right = _edges(one & 3, query_stream, query, reads, image)
    top_2, bottom_2, left_2, right_2 = _edges(two & 3, query_stream, query, reads, image)
    allowed = row >= gl.where(is_one[None, :], top[:, None], top_2[:, None])
    allowed = allowed & (row < gl.where(is_one[None, :], bottom[:, None], bottom_2[:, None]))
    allowed = allowed & (column >= gl.where(is_one[None, :], left[:, None], left_2[:, None]))
    allowed = allowed & (column < gl.where(is_one[None, :], right[:, None], right_2[:, None]))
    return gl.where(allowed, logits, float("-inf"))


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
    pair, end, pairs, step, query_stream, query, queries, total, weights, highest, weight, fade, scale,
    geometry, tiles, barriers,
    MASKED: gl.constexpr, LAYOUT: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take the keys of one step, and the values of the step before it."""
    k_tiles, v_tiles = tiles[1], tiles[2]
    k_full, k_empty, v_full, v_empty = barriers[2], barriers[3], barriers[4], barriers[5]
    slot, last = step % STAGES, (step - 1) % STAGES
    logits = warpgroup_mma(
        queries, k_tiles.index(slot).permute((1, 0)), gl.zeros([ROWS, 2 * ROWS], gl.float32, LAYOUT),
        use_acc=False, is_async=True,
    )  # fmt: skip
    total = total * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
    total = warpgroup_mma(weight, v_tiles.index(last), total, is_async=True)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASKED:
        logits = _masked(logits, pair, pairs, query_stream, query, geometry, LAYOUT)
    new_weight, fade, highest = _weigh(logits, highest, scale, MASKED)
    weights = weights * fade + gl.sum(new_weight, 1)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    next_weight = gl.convert_layout(new_weight.to(weight.dtype), operand)
    # The weights must be made while the values' product runs. What stands before a wait on a barrier stays there, and
    # the next keys have to be waited for at some time.
    _await_keys(step + 1, pair + 1 < end, k_full, STAGES)
    total, next_weight = warpgroup_mma_wait(0, deps=(total, next_weight))
    mbarrier.arrive(v_empty.index(last), count=1)
    return total, weights, highest, next_weight, fade


@gluon.jit
def _consume(
    outputs, share, geometry, tiles, barriers, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group."""
    to_text, to_image, lse, part_out, part_lse, heads, batch_heads = outputs
    work, first, last, pairs = share
    text, image, guidance = geometry[3], geometry[4], geometry[5]
    q_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    dtype: gl.constexpr = k_tiles.dtype
    queries = q_tiles.index(GROUP)
    step = 0
    tile, begin, full_end, end, out, batch_head = _item(work + first * WORK_COLUMNS)
    for index in range(first, last):
        following = _item(work + (index + 1) * WORK_COLUMNS)
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
            logits = _masked(logits, begin, pairs, stream, query, geometry, LAYOUT)
        highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
        weight, fade, highest = _weigh(logits, highest, scale, True)
        fade = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, LAYOUT))  # of the output so far, which is 0
        weights = gl.sum(weight, 1)
        weight = gl.convert_layout(weight.to(dtype), OPERAND)
        total = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        step += 1
        _await_keys(step, begin + 1 < end, k_full, STAGES)
        for pair in range(begin + 1, full_end):
            total, weights, highest, weight, fade = _advance(
                pair, end, pairs, step, stream, query, queries, total, weights, highest, weight, fade, scale,
                geometry, tiles, barriers, False, LAYOUT, OUT, STAGES,
            )  # fmt: skip
            step += 1
        for pair in range(gl.maximum(begin + 1, full_end), end):
            total, weights, highest, weight, fade = _advance(
                pair, end, pairs, step, stream, query, queries, total, weights, highest, weight, fade, scale,
                geometry, tiles, barriers, True, LAYOUT, OUT, STAGES,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        slot = (step - 1) % STAGES
        total = total * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
        mbarrier.wait(v_full.index(slot), ((step - 1) // STAGES) & 1)
        total = warpgroup_mma(weight, v_tiles.index(slot), total, is_async=True)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(v_empty.index(slot), count=1)

        present = query < _length(stream, text, image, guidance)
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
        log_sum = highest * scale + gl.log2(weights)  # -inf + -inf where nothing was read
        inverse = gl.convert_layout(1.0 / gl.where(weights == 0, 1.0, weights), gl.SliceLayout(1, OUT))
        total = total * inverse[:, None]
        at_row = gl.convert_layout(query, gl.SliceLayout(1, OUT))
        if out < 0:
            batch, head = batch_head // heads, batch_head % heads
            if stream == 0:
                base = to_text[0] + batch.to(gl.int64) * to_text[1] + head * to_text[3]
                stride = to_text[2]
            else:
                base = to_image[0] + batch.to(gl.int64) * to_image[1] + head * to_image[3]
                stride = to_image[2]
            at = base + at_row[:, None].to(gl.int64) * stride + dim[None, :]
            gl.store(at, total.to(dtype), mask=gl.convert_layout(present, gl.SliceLayout(1, OUT))[:, None])
            row = batch_head.to(gl.int64) * (text + image) + gl.where(stream == 1, text, 0) + query
            gl.store(lse + row, log_sum * LN_2, mask=present)
        else:
            top = (out.to(gl.int64) * batch_heads + batch_head) * (2 * ROWS) - (tile >> 2)
            gl.store(part_out + (top + at_row)[:, None] * HEAD_DIM + dim[None, :], total)
            gl.store(part_lse + top + query, log_sum)
        tile, begin, full_end, end, out, batch_head = following


@gluon.jit(do_not_specialize=["text", "image", "guidance", "heads", "batch_heads"])
def _forward(
    q_text, q_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance,
    O_text, o_text_b, o_text_s, o_text_h, O_image, o_image_b, o_image_s, o_image_h, lse, part_out, part_lse,
    work, starts, pairs, reads, image_places, guidance_places, text, image, guidance,
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
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    first, last = gl.load(starts + gl.program_id(0)), gl.load(starts + gl.program_id(0) + 1)
    geometry = (reads, image_places, guidance_places, text, image, guidance)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    share = (work, first, last, pairs)
    outputs = (
        (O_text, o_text_b, o_text_s, o_text_h), (O_image, o_image_b, o_image_s, o_image_h), lse, part_out, part_lse,
        heads, batch_heads,
    )  # fmt: skip
    tiles = (q_tiles, k_tiles, v_tiles)
    gl.warp_specialize(
        [
            (_consume, (outputs, share, geometry, tiles, barriers, scale, gl.constexpr(0), HEAD_DIM, STAGES)),
            (_consume, (outputs, share, geometry, tiles, barriers, scale, gl.constexpr(1), HEAD_DIM, STAGES)),
            (_produce, (
                (q_text, q_image), (k_text, k_image, k_guidance), (v_text, v_image, v_guidance), share, heads,
                (q_boxes, k_boxes, v_boxes), barriers, HEAD_DIM, BOXES, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def stages(head_dim: int) -> int:
    """Steps whose keys and values shared memory holds beside the queries, at most 4."""
    tile, barriers = ROWS.value * head_dim * 2, 1024
    return min(4, (SHARED_MEMORY - 2 * tile - barriers) // (4 * tile))


def forward(
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    guidance: Sequence[Tensor],
    schedule: Schedule,
    work: Work,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `scale_dit_kernels.forward.forward`, for bfloat16 and float16, tiles of 128 queries and 64 keys."""
    query = image[0]
    batch, _, heads, head_dim = query.shape
    columns = min(head_dim, 64)
    layouts = [gl.NVMMASharedLayout(2 * columns, 16, rank) for rank in (4, 2)]

    def described(stream: Tensor) -> TensorDescriptor:
        stream = stream if stream.shape[1] else query
        return TensorDescriptor(stream, stream.shape, stream.stride(), [1, ROWS.value, 1, columns], layouts[0])

    outputs = [query.new_empty(batch, stream[0].shape[1], heads, head_dim) for stream in (text, image)]
    batch_heads, slots = batch * heads, schedule.rows.slots
    lse = query.new_empty(batch, heads, sum(schedule.tokens[:2]), dtype=torch.float32)
    part_lse = lse.new_empty(slots, batch_heads, schedule.block_m)
    part_out = lse.new_empty(slots, batch_heads, schedule.block_m, head_dim)
    _forward[(len(work.starts) - 1,)](
        *(described(each) for each in (text[0], query)),
        *(described(stream[part]) for part in (-2, -1) for stream in (text, image, guidance)),
        outputs[0], *outputs[0].stride()[:3], outputs[1], *outputs[1].stride()[:3], lse, part_out, part_lse,
        work.items, work.starts, work.pairs, schedule.reads, schedule.image_places,
        schedule.guidance_places, *schedule.tokens, heads, batch_heads, scale * LOG2_E.value,
        head_dim, columns, stages(head_dim), *layouts, num_warps=4, maxnreg=168,
    )  # fmt: skip
    merge(outputs, lse, part_out, part_lse, schedule)
    return outputs[0], outputs[1], lse
