"""FlexAttention and flash-attn-4 alone: one block-sparse kernel for all rows, text rows too.

The backends of the same names give the text rows to a dense kernel, which is faster. This is what either library does
by itself with the layout, over streams that are joined already.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from scale_dit.attention import fa4, flex
from scale_dit.attention._dense import join
from scale_dit.attention._joined import HALF_BLOCK, lists_of
from scale_dit.errors import UserError
from scale_dit.layout import Layout
from scale_dit.tiles import FLEX_BLOCK, Tiles, mask_mod

NAMES = ("flex_alone", "fa4_alone")


class AllRows(NamedTuple):
    """Streams joined, `[B, tokens, H, D]`: queries of text and image; keys and values of text, image and guidance."""

    query: Tensor
    key: Tensor
    value: Tensor


def join_all(text: tuple, image: tuple, guidance: tuple) -> AllRows:
    """Join the streams of `scale_dit.attention.attend`."""
    key, value = (join(*parts) for parts in zip(text[1:], image[1:], guidance, strict=True))
    return AllRows(join(text[0], image[0]), key, value)


@lru_cache(maxsize=32)
def tiles_of_all_rows(layout: Layout, side: int) -> Tiles:
    """Tiles of 128 queries, text rows first, and `side` keys.

    Raises:
        UserError: a stream would have to be padded.
    """
    if any(tokens % FLEX_BLOCK for tokens in (layout.text, layout.image.tokens, layout.guidance_tokens)):
        raise UserError(f"only streams of multiples of {FLEX_BLOCK} tokens are timed, not {layout}")
    image = layout.tiles(FLEX_BLOCK, side)
    text_rows = layout.text // FLEX_BLOCK
    read = image.streams[0] + image.streams[1] * layout.text_reads_image
    text = torch.cartesian_prod(torch.arange(text_rows), torch.arange(read))
    return Tiles(
        query=torch.cat([text[:, 0], image.query + text_rows]),
        key=torch.cat([text[:, 1], image.key]),
        is_full=torch.cat([torch.ones(len(text), dtype=torch.bool), image.is_full]),
        query_tiles=image.query_tiles + text_rows,
        streams=image.streams,
    )


def attend_alone(
    name: str, rows: AllRows, layout: Layout, side: int | None = None, **options: int
) -> tuple[Tensor, Tensor]:
    """Outputs of the text rows and of the image rows, `[B, tokens, H, D]`.

    Args:
        name: from `NAMES`.
        rows: the joined streams.
        layout: who reads whom.
        side: keys of a tile, 128 or 64; 128 by default where gradients are wanted, else 64.
        options: of FlexAttention's kernels.

    Raises:
        UserError: see `tiles_of_all_rows`.
    """
    wants_gradients = torch.is_grad_enabled() and any(part.requires_grad for part in rows)
    scale = rows.query.shape[-1] ** -0.5
    side = side or (FLEX_BLOCK if wants_gradients else HALF_BLOCK)
    if name == "flex_alone":
        mask = _block_mask(layout, side, rows.query.device)
        output = flex.run(rows.query, rows.key, rows.value, mask, scale, **options)
    else:
        forward = _kernel_tiles(layout, side, rows.query.device)
        backward = _kernel_tiles(layout, FLEX_BLOCK, rows.query.device) if wants_gradients else None
        output = fa4.flash_attention(*rows, scale, forward, backward)
    text, image = output.split([layout.text, layout.image.tokens], dim=1)
    return text, image


@lru_cache(maxsize=32)
def _block_mask(layout: Layout, side: int, device: torch.device) -> BlockMask:
    tiles = tiles_of_all_rows(layout, side)
    width = sum(tiles.streams)
    partial, full = (
        lists_of(tiles.query[chosen].to(device), tiles.key[chosen].to(device), tiles.query_tiles, width)
        for chosen in (~tiles.is_full, tiles.is_full)
    )
    block, lengths = (FLEX_BLOCK, side), (tiles.query_tiles * FLEX_BLOCK, width * side)
    if bool(tiles.is_full.all()):
        return BlockMask.from_kv_blocks(*full, BLOCK_SIZE=block, seq_lengths=lengths)
    image_reads, text = mask_mod(layout, device), layout.text
    read = text + layout.image.tokens * layout.text_reads_image

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        by_image = image_reads(batch, head, (query - text).clamp(min=0), key)
        return torch.where(query < text, key < read, by_image)

    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block, mask_mod=reads, seq_lengths=lengths)


@lru_cache(maxsize=32)
def _kernel_tiles(layout: Layout, side: int, device: torch.device) -> fa4.KernelTiles:
    return fa4.KernelTiles.of(tiles_of_all_rows(layout, side), side, lambda: cell_table(layout), device)


def cell_table(layout: Layout) -> Tensor:
    """`scale_dit.attention.fa4.cell_table` with the text rows above."""
    image = fa4.cell_table(layout)
    text = torch.zeros(layout.text // HALF_BLOCK, image.shape[1], dtype=image.dtype)
    text[:, : (layout.text + layout.image.tokens * layout.text_reads_image) // HALF_BLOCK] = 1
    return torch.cat([text, image])
