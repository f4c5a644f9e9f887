"""The backward pass for Hopper: the launches of `hopper_rows.py` and `hopper_columns.py`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from scale_dit_kernels.backward_shared import add_parts, prepare
from scale_dit_kernels.forward import LOG2_E, described
from scale_dit_kernels.hopper import SHARED_MEMORY, boxes
from scale_dit_kernels.hopper_columns import key_gradients
from scale_dit_kernels.hopper_rows import query_gradients
from scale_dit_kernels.hopper_shared import ROWS
from scale_dit_kernels.schedule import Schedule


def backward(
    gradients: Sequence[Tensor],
    outputs: Sequence[Tensor],
    lse: Tensor,
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    guidance: Sequence[Tensor],
    by_rows: Schedule,
    by_columns: Schedule,
    programs: int,
    scale: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As `scale_dit_kernels.backward.backward`, for bfloat16 and float16.

    Args:
        by_rows, by_columns: tiles of 128 queries and 64 keys, and of 64 each.
        programs: multiprocessors.
    """
    query = image[0]
    batch, _, heads, head_dim = query.shape
    batch_heads, tokens = batch * heads, by_rows.tokens
    by_text, by_image = ([part.new_empty(part.shape) for part in stream] for stream in (text, image))
    by_guidance = [part.new_zeros(part.shape) for part in guidance]  # no window may read the edge of a draft
    log_sums, deltas = prepare(outputs, [described(each) for each in gradients], lse, tokens)
    streams = [
        boxes(stream if stream.shape[1] else query)
        for stream in (text[0], query, *gradients, text[1], image[1], guidance[0], text[2], image[2], guidance[1])
    ]
    columns = min(head_dim, 64)
    layouts = [gl.NVMMASharedLayout(2 * columns, 16, rank) for rank in (4, 2)]
    text_rows = -(-tokens[0] // 128) * 128
    places = (by_rows.reads, by_rows.image_places, by_rows.guidance_places, *tokens, heads, batch_heads, text_rows)
    factors = (scale * LOG2_E.value, scale)
    tile = ROWS.value * head_dim * 2

    work = by_rows.row_work(batch_heads, programs)
    parts = lse.new_empty(work.slots, batch_heads, 2 * ROWS.value, head_dim)
    dq = [described(stream[0]) for stream in (by_text, by_image)]
    query_gradients[(programs,)](
        *streams, *dq[0], *dq[1], log_sums, deltas, parts, work.order, work.starts, work.items, work.pairs, *places,
        log_sums.shape[1], *factors, head_dim, columns, *row_stages(tile), *layouts, num_warps=4, maxnreg=168,
    )  # fmt: skip
    add_parts([*dq, dq[1]], parts, work.merges, tokens, heads)

    work = by_columns.column_work(batch_heads, programs)
    key_parts, value_parts = (lse.new_empty(work.slots, batch_heads, ROWS.value, head_dim) for _ in range(2))
    dk = [described(stream[index]) for stream, index in ((by_text, 1), (by_image, 1), (by_guidance, 0))]
    dv = [described(stream[index]) for stream, index in ((by_text, 2), (by_image, 2), (by_guidance, 1))]
    row_layout = gl.NVMMASharedLayout(0, 32, 2)
    rows = [
        TensorDescriptor(each, each.shape, each.stride(), [1, ROWS.value], row_layout) for each in (log_sums, deltas)
    ]
    key_gradients[(programs,)](
        *streams, *rows, *(each for part in (*dk, *dv) for each in part), key_parts, value_parts,
        work.order, work.starts, work.items, work.pairs, *places, *factors, head_dim, columns, *column_stages(tile),
        *layouts, row_layout, num_warps=4, maxnreg=168,
    )  # fmt: skip
    add_parts(dk, key_parts, work.merges, tokens, heads)
    add_parts(dv, value_parts, work.merges, tokens, heads)
    return by_text, by_image, by_guidance


def row_stages(tile: int) -> tuple[int, int]:
    """Pairs of key tiles and of value tiles that shared memory holds beside 128 queries and gradients, at most 4."""
    free = (SHARED_MEMORY - 4 * tile - 1024) // (2 * tile)
    return min(4, free - free // 2), min(4, free // 2)


def column_stages(tile: int) -> tuple[int, int]:
    """Pairs of key and value tiles, and tiles of queries and gradients, that shared memory holds, at most 4."""
    free = SHARED_MEMORY - 2 * 4 * tile - 1024
    return 2, min(4, free // (2 * tile + 2 * ROWS.value * 4))
