"""Which tiles of the attention matrix a block-sparse kernel visits, from a layout.

Rows are image queries in memory order. Columns are text, image and guidance keys, each stream padded to whole tiles of
its own. Text rows read everything there is to read: they belong to a dense kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from scale_dit.layout import Layout
from scale_dit.windows import Span

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Tiles:
    """Tiles that hold at least one pair, as a list sorted by query tile, then by key tile."""

    query: Tensor
    """Query tile of each entry, int64 `[E]`."""
    key: Tensor
    """Key tile of each entry, int64 `[E]`, counted through the text, the image and the guidance."""
    is_full: Tensor
    """bool `[E]`: every row of the tile reads all of its `block_n` keys, so no mask is needed."""
    query_tiles: int
    streams: tuple[int, int, int]
    """Key tiles of the text, the image and the guidance."""

    @property
    def visited(self) -> Tensor:
        """As a matrix, bool `[query tiles, key tiles]`: the tile holds at least one pair."""
        return self._matrix(torch.ones_like(self.is_full))

    @property
    def full(self) -> Tensor:
        """As a matrix, bool `[query tiles, key tiles]`: the tile needs no mask."""
        return self._matrix(self.is_full)

    @property
    def partial(self) -> Tensor:
        """As a matrix, bool `[query tiles, key tiles]`: the tile needs a mask."""
        return self._matrix(~self.is_full)

    def _matrix(self, values: Tensor) -> Tensor:
        matrix = torch.zeros(self.query_tiles, sum(self.streams), dtype=torch.bool)
        matrix[self.query, self.key] = values
        return matrix


def tiles(layout: Layout, block_m: int, block_n: int) -> Tiles:
    """The tiles of `block_m` queries x `block_n` keys, by exact pair counts: no S x S tensor."""
    key_tokens = (layout.text, layout.image.tokens, layout.guidance_tokens)
    text_tiles, image_tiles, guidance_tiles = (-(-tokens // block_n) for tokens in key_tokens)
    query_tiles = -(-layout.image.tokens // block_m)
    streams = (text_tiles, image_tiles, guidance_tiles)
    key_tiles = sum(streams)

    queries = _sizes(layout.image.tokens, block_m)
    text = _sizes(layout.text, block_n)
    codes = [torch.cartesian_prod(torch.arange(query_tiles), torch.arange(text_tiles)) @ torch.tensor([key_tiles, 1])]
    pairs = [torch.outer(queries, text).flatten()]
    for group in layout.groups():
        # All queries of a window read all of its keys: pairs of a tile = sum over windows of queries x keys in it.
        group_queries = _counts(group.queries, block_m)
        for keys, first in ((group.keys, text_tiles), (group.guidance, text_tiles + image_tiles)):
            left, right, count = _products(group_queries, _counts(keys, block_n))
            codes.append(left * key_tiles + right + first)
            pairs.append(count)
    code, index = torch.cat(codes).unique(return_inverse=True)
    total = torch.zeros(len(code), dtype=torch.long).index_add_(0, index, torch.cat(pairs))
    query, key = code // key_tiles, code % key_tiles
    return Tiles(query, key, total == queries[query] * block_n, query_tiles, streams)


def _sizes(tokens: int, block: int) -> Tensor:
    """Tokens in each tile of a stream, int64 `[tiles]`."""
    return (tokens - torch.arange(0, tokens, block)).clamp(max=block)


class _Counts(NamedTuple):
    """How many of each row's places fall into which tile: entries sorted by row."""

    row: Tensor
    tile: Tensor
    places: Tensor
    rows: int


def _counts(places: Tensor, block: int) -> _Counts:
    """`places` is int64 `[rows, places]`."""
    tile = places // block
    width = int(tile.max()) + 1 if tile.numel() else 1
    code, count = (tile + torch.arange(len(places))[:, None] * width).unique(return_counts=True)
    return _Counts(code // width, code % width, count, len(places))


def _products(queries: _Counts, keys: _Counts) -> tuple[Tensor, Tensor, Tensor]:
    """Query tile, key tile and number of pairs for every two entries of the same row."""
    repeats = torch.bincount(keys.row, minlength=keys.rows)
    begin = repeats.cumsum(0) - repeats
    times = repeats[queries.row]
    left = torch.arange(len(queries.row)).repeat_interleave(times)
    within = torch.arange(len(left)) - (times.cumsum(0) - times)[left]
    right = begin[queries.row[left]] + within
    return queries.tile[left], keys.tile[right], queries.places[left] * keys.places[right]


def block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """FlexAttention's mask of the image rows, for queries and key streams padded to multiples of 128 (see `padded`)."""
    visits = tiles(layout, FLEX_BLOCK, FLEX_BLOCK)
    partial, full = (_lists(part, device) for part in (visits.partial, visits.full))
    lengths = (visits.visited.shape[0] * FLEX_BLOCK, visits.visited.shape[1] * FLEX_BLOCK)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod(layout, device), seq_lengths=lengths
    )


def padded(tokens: int) -> int:
    """Tokens of a stream in a FlexAttention call: its kernels give NaN at other lengths (pytorch#153799)."""
    return -(-tokens // FLEX_BLOCK) * FLEX_BLOCK


def _lists(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of chosen tiles in each row, and their columns first in each row, int32, as `[1, 1, ...]`."""
    columns = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    count, columns = (part.to(device, torch.int32)[None, None].contiguous() for part in (chosen.sum(1), columns))
    return count, columns


def mask_mod(layout: Layout, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`(batch, head, query, key) -> bool`: a window reads the product of what its rows and what its columns read."""
    image = (layout.image_order // layout.image.width, layout.image_order % layout.image.width)
    guidance = (torch.empty(0, dtype=torch.long),) * 2
    if layout.guidance:
        guidance = (layout.guidance_order // layout.guidance.width, layout.guidance_order % layout.guidance.width)
    rows, columns = (
        _axis(spans, image_places, guidance_places, layout.text).to(device)
        for spans, image_places, guidance_places in zip(layout.axes, image, guidance, strict=True)
    )

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (
            rows.reads[rows.window[query], rows.place[key]] & columns.reads[columns.window[query], columns.place[key]]
        )

    return reads


class _Axis(NamedTuple):
    """One axis of the mask: query q reads key k, as far as this axis goes, if `reads[window[q], place[k]]`.

    Places are the axis' tokens in the picture, then those in the draft, then one that every window reads (for text)
    and one that none reads (for padding). The table is small enough for a cache at any size of picture.
    """

    reads: Tensor
    window: Tensor
    place: Tensor

    def to(self, device: torch.device) -> _Axis:
        return _Axis(*(part.to(device) for part in self))


def _axis(spans: tuple[Span, ...], image: Tensor, guidance: Tensor, text: int) -> _Axis:
    """`image` and `guidance` are the tokens' coordinates along the axis, in memory order."""
    side, draft = int(image.max()) + 1, int(guidance.max()) + 1 if len(guidance) else 0
    everywhere, nowhere = side + draft, side + draft + 1
    reads = torch.zeros(len(spans), side + draft + 2, dtype=torch.bool)
    reads[:, everywhere] = True
    for window, span in enumerate(spans):
        reads[window, span.keys.start : span.keys.stop] = True
        reads[window, side + span.guidance.start : side + span.guidance.stop] = True
    windows = torch.arange(len(spans)).repeat_interleave(torch.tensor([len(span.queries) for span in spans]))
    streams = (torch.full((text,), everywhere), image, guidance + side)
    return _Axis(reads, _pad(windows[image], 0), torch.cat([_pad(stream, nowhere) for stream in streams]))


def _pad(stream: Tensor, value: int) -> Tensor:
    """A stream's tokens, filled up to whole blocks."""
    return functional.pad(stream, (0, padded(len(stream)) - len(stream)), value=value)
