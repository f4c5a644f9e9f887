"""What the kernels for Hopper share: barriers, lengths of streams, and the mask of partial tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

ROWS = gl.constexpr(64)
"""Query rows (or keys, in `hopper_columns`) of one group of warps, and keys (or queries) of one tile."""


@gluon.jit
def barriers(SLOTS: gl.constexpr):
    """For slots that the fetching group fills and two computing groups empty."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    return full, empty


@gluon.jit
def length(stream, text, image, guidance):
    """Tokens of a stream."""
    return gl.where(stream == 0, text, gl.where(stream == 1, image, guidance))


@gluon.jit
def _over_queries(key_values, QUERIES_FIRST: gl.constexpr):
    return key_values[None, :] if QUERIES_FIRST else key_values[:, None]


@gluon.jit
def _over_keys(query_values, QUERIES_FIRST: gl.constexpr):
    return query_values[:, None] if QUERIES_FIRST else query_values[None, :]


@gluon.jit
def _within(row, column, reads, query, inside, image, QUERIES_FIRST: gl.constexpr):
    """Whether places lie in the rectangle that a query reads."""
    top = _over_keys(gl.load(reads + query, mask=inside, other=0), QUERIES_FIRST)
    bottom = _over_keys(gl.load(reads + image + query, mask=inside, other=0), QUERIES_FIRST)
    left = _over_keys(gl.load(reads + 2 * image + query, mask=inside, other=0), QUERIES_FIRST)
    right = _over_keys(gl.load(reads + 3 * image + query, mask=inside, other=0), QUERIES_FIRST)
    row, column = _over_queries(row, QUERIES_FIRST), _over_queries(column, QUERIES_FIRST)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


@gluon.jit
def may_read(
    query_stream, query, key_stream, key, reads, image_places, guidance_places, text, image, guidance,
    QUERIES_FIRST: gl.constexpr,
):  # fmt: skip
    """Mask of a partial tile: an image row reads a rectangle of the picture and one of the draft.

    Args:
        query_stream: of all queries.
        query, key_stream, key: 1-D, laid out as slices of the mask.
        QUERIES_FIRST: whether the mask is `[queries, keys]`, else `[keys, queries]`.
    """
    present = key < length(key_stream, text, image, guidance)
    in_guidance = key_stream == 2
    seen = gl.load(image_places + key, mask=present & (key_stream == 1), other=0)
    seen = gl.where(in_guidance, gl.load(guidance_places + key, mask=present & in_guidance, other=0), seen)
    row, column = seen >> 16, seen & 0xFFFF
    inside = (query_stream == 1) & (query < image)
    in_picture = _within(row, column, reads, query, inside, image, QUERIES_FIRST)
    in_draft = _within(row, column, reads + 4 * image, query, inside, image, QUERIES_FIRST)
    free = _over_queries((key_stream == 0) | (query_stream != 1), QUERIES_FIRST)
    allowed = gl.where(_over_queries(in_guidance, QUERIES_FIRST), in_draft, in_picture) | free
    return allowed & _over_queries(present, QUERIES_FIRST)


@gluon.jit
def masked(
    logits, pair, pairs, query_stream, query, reads, image_places, guidance_places, text, image, guidance,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """-inf where a row may not read, `[queries, keys of a pair of tiles]`."""
    place = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(0, LAYOUT))
    entry = gl.where(place < ROWS, gl.load(pairs + 2 * pair), gl.load(pairs + 2 * pair + 1))
    key = (entry >> 2) + place % ROWS
    allowed = may_read(
        query_stream, query, entry & 3, key, reads, image_places, guidance_places, text, image, guidance, True
    )
    return gl.where(allowed, logits, float("-inf"))
