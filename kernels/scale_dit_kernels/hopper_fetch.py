"""The fetching side of the kernel for Hopper: queries, keys and values come by TMA, as far ahead as slots are empty."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from scale_dit_kernels.hopper_shared import ROWS


@gluon.jit
def fetch(
    descriptor, batch, start, head, barrier, boxes, first,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Fetch 64 tokens of a stream into boxes of 64 x COLUMNS; later boxes of the same tokens lie STEP further on."""
    for part in gl.static_range(HEAD_DIM // COLUMNS):
        tma.async_copy_global_to_shared(
            descriptor, [batch, start, head, part * COLUMNS], barrier, boxes.index(first + part * STEP)
        )


@gluon.jit
def fetch_tile(
    entry, text, image, guidance, batch, head, barrier, boxes, first,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Fetch a tile of keys or values of whichever stream it is in."""
    stream = entry & 3
    if stream == 0:
        fetch(text, batch, entry >> 2, head, barrier, boxes, first, HEAD_DIM, COLUMNS, STEP)
    elif stream == 1:
        fetch(image, batch, entry >> 2, head, barrier, boxes, first, HEAD_DIM, COLUMNS, STEP)
    else:
        fetch(guidance, batch, entry >> 2, head, barrier, boxes, first, HEAD_DIM, COLUMNS, STEP)


@gluon.jit
def fetch_pair(
    one, two, text, image, guidance, batch, head, full, empty, phase, boxes, first,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Wait until a slot is empty, and fetch two tiles into it."""
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, BYTES)
    fetch_tile(one, text, image, guidance, batch, head, full, boxes, first, HEAD_DIM, COLUMNS, 2)
    fetch_tile(two, text, image, guidance, batch, head, full, boxes, first + 1, HEAD_DIM, COLUMNS, 2)


@gluon.jit
def fetch_queries(
    descriptor, tile, batch, head, full, boxes, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Fetch the 64 query rows of one computing group."""
    start = (tile >> 2) + GROUP * ROWS
    fetch(descriptor, batch, start, head, full, boxes, GROUP * (HEAD_DIM // COLUMNS), HEAD_DIM, COLUMNS, 1)


@gluon.jit
def produce(
    q_text, q_image, k_text, k_image, k_guidance, v_text, v_image, v_guidance, work, first, last, items, pairs,
    heads, batch_heads, q_boxes, k_boxes, v_boxes, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the fetching group of warps does, for all items of its program."""
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
        mbarrier.expect(q_full.index(0), BYTES)
        for group in gl.static_range(2):
            if (tile & 3) == 0:
                fetch_queries(q_text, tile, batch, head, q_full.index(0), q_boxes, HEAD_DIM, COLUMNS, group)
            else:
                fetch_queries(q_image, tile, batch, head, q_full.index(0), q_boxes, HEAD_DIM, COLUMNS, group)
        for pair in range(begin, end):
            one, two = gl.load(pairs + 2 * pair), gl.load(pairs + 2 * pair + 1)
            slot = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            fetch_pair(
                one, two, k_text, k_image, k_guidance, batch, head, k_full.index(slot), k_empty.index(slot), phase,
                k_boxes, slot * BOXES, HEAD_DIM, COLUMNS, BYTES,
            )  # fmt: skip
            fetch_pair(
                one, two, v_text, v_image, v_guidance, batch, head, v_full.index(slot), v_empty.index(slot), phase,
                v_boxes, slot * BOXES, HEAD_DIM, COLUMNS, BYTES,
            )  # fmt: skip
            step += 1
