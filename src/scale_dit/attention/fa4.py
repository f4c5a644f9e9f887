"""flash-attn-4: its block-sparse kernels over the tiles that the layout visits. NVIDIA Hopper and Blackwell.

Text rows go to torch's dense attention, as there is nothing sparse in them. Tiles that are partly read are masked by a
table of cells of 64 x 64, so layouts are taken that are made of these: every order but raster, without ragged edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_dit.attention._dense import text_rows
from scale_dit.attention._joined import HALF_BLOCK, Joined, join_streams, lists_of, needs_no_mask
from scale_dit.errors import UserError
from scale_dit.layout import Layout
from scale_dit.tiles import FLEX_BLOCK, Tiles

LARGEST_HEAD = 128

SETTINGS: tuple[dict[str, int], ...] = ({"side": 64}, {"side": 128})
"""Settings of `attend_to` that a benchmark tries."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """It is an optional extra, for NVIDIA GPUs from Hopper on, in half precision."""
    if not _is_installed():
        return "flash-attn-4 is not installed: pip install 'scale-dit[fa4]', or use 'triton' or 'flex'."
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return (
            f"flash-attn-4's block-sparse kernels need a Hopper or Blackwell GPU, not '{device}'; use 'flex' or 'sdpa'."
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn-4 computes in float16 and bfloat16, not in {dtype}; use 'triton' or 'sdpa'."
    return None


def attend(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """See `scale_dit.attention`.

    Raises:
        UserError: heads of a size that the kernels do not take, or a layout that is not made of whole cells of 64.
    """
    return attend_to(join_streams(text, image, guidance), layout, scale)


def attend_to(streams: Joined, layout: Layout, scale: float, side: int | None = None) -> tuple[Tensor, Tensor]:
    """Outputs of the text rows and of the image rows, `[B, tokens, H, D]`, over streams that are joined already.

    Args:
        streams, layout, scale: what `attend` takes, joined.
        side: keys of a tile of the forward pass: 128, or 64 where the layout then needs no mask; 64 by default where
            it can. The backward pass has tiles of 128.

    Raises:
        UserError: see `attend`.
    """
    head = streams.query.shape[-1]
    if head % 8 or head > LARGEST_HEAD:
        raise UserError(
            f"Attention backend 'fa4' takes heads of multiples of 8 up to {LARGEST_HEAD}, but these have {head}: "
            "use 'flex' or 'sdpa'."
        )
    side = side or (HALF_BLOCK if needs_no_mask(layout) else FLEX_BLOCK)
    tiles = _tiles(layout, side, streams.query.device)
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in streams)
    backward = _tiles(layout, FLEX_BLOCK, streams.query.device) if needs_gradient else None
    output = flash_attention(streams.query, streams.key, streams.value, scale, tiles, backward)
    return (
        text_rows(streams.text_query, streams.text_key, streams.text_value, layout, scale),
        output[:, : layout.image.tokens],
    )


class KernelTiles(NamedTuple):
    """What the kernels are told of a layout."""

    rows: Any
    """Key tiles of every query tile, for the forward pass."""
    columns: Any
    """Query tiles of every key tile, for the backward pass."""
    table: Tensor | None
    """Which cells of 64 queries read which cells of 64 keys, int8; `None`: no tile needs a mask."""

    @classmethod
    def of(cls, tiles: Tiles, side: int, table: Callable[[], Tensor], device: torch.device) -> KernelTiles:
        """From tiles of 128 queries and `side` keys; `table` is asked for if one of them needs a mask."""
        rows, columns = (_block_sparse(tiles, by, side, device) for by in ("query", "key"))
        return cls(rows, columns, None if bool(tiles.is_full.all()) else table().to(device))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, forward: KernelTiles, backward: KernelTiles | None
) -> Tensor:
    """Block-sparse attention over `[B, tokens, H, D]`; `backward` where gradients are wanted."""
    from flash_attn.cute import flash_attn_func

    table = (backward or forward).table
    output, _ = flash_attn_func(
        query, key, value, softmax_scale=scale,
        mask_mod=None if table is None else _mask(), aux_tensors=None if table is None else [table],
        block_sparse_tensors=forward.rows, block_sparse_tensors_bwd=backward and backward.columns,
    )  # fmt: skip
    return output


@lru_cache(maxsize=32)
def _tiles(layout: Layout, side: int, device: torch.device) -> KernelTiles:
    return KernelTiles.of(layout.tiles(FLEX_BLOCK, side), side, lambda: cell_table(layout), device)


def _block_sparse(tiles: Tiles, by: str, side: int, device: torch.device) -> Any:
    """Lists of masked and of whole tiles, by query or by key tile, as flash-attn-4 takes them."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    owner, other, owners = tiles.query, tiles.key, tiles.query_tiles
    if by == "key":
        owner, other, owners = tiles.key, tiles.query, sum(tiles.streams)
    order = owner.argsort(stable=True)
    lists: list[Tensor] = []
    for chosen in (~tiles.is_full, tiles.is_full):
        kept = order[chosen[order]]
        lists += lists_of(owner[kept].to(device), other[kept].to(device), owners)
    return BlockSparseTensorsTorch(*lists, block_size=(FLEX_BLOCK, side))


def cell_table(layout: Layout) -> Tensor:
    """Which cells of 64 image tokens read which cells of 64 keys, int8 `[cells, cells]`, streams padded to 128 tokens.

    Raises:
        UserError: a cell is read in part, as in raster order and at ragged edges.
    """
    cells = layout.tiles(HALF_BLOCK, HALF_BLOCK)
    if partial := int((~cells.is_full).sum()):
        raise UserError(
            f"Attention backend 'fa4' takes layouts made of whole tiles of 64 x 64, but in this one {partial} of "
            f"{len(cells.is_full)} need a mask ({layout}): use 'triton' or 'flex'."
        )
    even = [count + count % 2 for count in cells.streams]
    columns = torch.cat([torch.arange(count) + sum(even[:place]) for place, count in enumerate(cells.streams)])
    table = torch.zeros(cells.query_tiles + cells.query_tiles % 2, sum(even), dtype=torch.int8)
    table[cells.query, columns[cells.key]] = 1
    return table


@cache
def _mask() -> Callable:
    """The table as a mask, in the language of flash-attn-4's kernels."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def reads(batch, head, query, key, lengths, tables):
        return utils.scalar_to_ssa(tables[0][query[0] // 64, key[0] // 64], cutlass.Int32) != 0

    return reads


@cache
def _is_installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
