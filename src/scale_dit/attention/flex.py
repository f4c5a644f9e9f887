"""FlexAttention: one fused kernel over the tiles that the layout visits.

Text rows go to a dense kernel: few queries over very many keys crash FlexAttention (pytorch#174923). Its kernels want
lengths in multiples of 128 (pytorch#153799), so queries, keys and values are padded where they have others. Where no
tile of 128 x 64 needs a mask, it gets these and no mask, which it would have to look up for each element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scale_dit.attention._dense import text_rows
from scale_dit.attention._joined import HALF_BLOCK, Joined, join_streams, lists_of, needs_no_mask
from scale_dit.errors import UserError
from scale_dit.layout import Layout
from scale_dit.tiles import FLEX_BLOCK

MAX_LAYOUTS = 64
"""Layouts that are compiled in one process; beyond it torch would silently run the unfused formula."""

FORWARD_LIMIT, GRADIENT_LIMIT = 2**31 - 1, 2**29 - 1
"""Elements of a tensor that its kernels can address. Seen with torch 2.11 on an H100, 24 heads of 128: right at 8192 px
(0.86e9), wrong at 16384 px (3.4e9); with gradients right at 6144 px (0.48e9), wrong at 8192 px."""

SETTINGS: tuple[dict[str, int], ...] = (
    {},
    {"BLOCK_M": 128, "BLOCK_N": 64, "fwd_num_warps": 4, "BLOCK_M2": 128},
    {"BLOCK_M": 64, "BLOCK_N": 64, "fwd_num_warps": 4},
    {"side": 128},
    {"side": 128, "BLOCK_M": 128, "BLOCK_N": 64, "fwd_num_warps": 8},
)
"""Settings of `attend_to` that a benchmark tries."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """FlexAttention has kernels for CPUs and CUDA-like GPUs, in the precisions of deep learning."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"FlexAttention does not support '{device.type}'; use 'sdpa'."
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"FlexAttention does not support {dtype}; use 'reference' or 'sdpa'."
    return None


def attend(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """See `scale_dit.attention`.

    Raises:
        UserError: if a gradient is wanted on a CPU, where FlexAttention has none.
    """
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (*text, *image, *guidance))
    if image[0].device.type == "cpu" and needs_gradient:
        raise UserError("Attention backend 'flex' has no gradient on a CPU: use 'sdpa', or torch.no_grad().")
    return attend_to(join_streams(text, image, guidance), layout, scale)


def attend_to(
    streams: Joined, layout: Layout, scale: float, side: int | None = None, **options: int
) -> tuple[Tensor, Tensor]:
    """Outputs of the text rows and of the image rows, `[B, tokens, H, D]`, over streams that are joined already.

    Args:
        streams, layout, scale: what `attend` takes, joined.
        side: keys of a tile of the layout, 128 or 64. By default 64 where the layout then needs no mask; 128 where
            gradients are wanted, for which FlexAttention has no kernel of 64 keys on every GPU (torch 2.11, H100).
        options: of FlexAttention's kernels, such as `BLOCK_M`.
    """
    if side is None:
        wants_gradients = torch.is_grad_enabled() and any(part.requires_grad for part in streams)
        side = HALF_BLOCK if needs_no_mask(layout) and not wants_gradients else FLEX_BLOCK
    mask = _block_mask(layout, side, streams.query.device)
    output = run(streams.query, streams.key, streams.value, mask, scale, **options)
    image_out = output[:, : layout.image.tokens]
    return text_rows(streams.text_query, streams.text_key, streams.text_value, layout, scale), image_out


def run(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, **options: int) -> Tensor:
    """FlexAttention over `[B, tokens, H, D]`, compiled.

    Args:
        query, key, value: of as many tokens as the mask says.
        mask: with tiles of 128 queries and of 128 or 64 keys.
        scale: of the scores.
        options: of its kernels.

    Raises:
        UserError: the tensors are too large for its kernels.
    """
    _check_size(query, key, value)
    if (side := mask.BLOCK_SIZE[1]) < FLEX_BLOCK:  # the kernels' own tiles may be larger
        options = dict.fromkeys(("BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), side) | options
    streams = (part.transpose(1, 2) for part in (query, key, value))
    with torch._dynamo.config.patch(recompile_limit=MAX_LAYOUTS):
        output = _compiled()(*streams, block_mask=mask, scale=scale, kernel_options=options or None)
    return output.transpose(1, 2)


def _check_size(*parts: Tensor) -> None:
    """Its kernels count in 32 bits, and read and write elsewhere beyond them (pytorch#190857)."""
    wants_gradients = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    largest, limit = max(part.numel() for part in parts), GRADIENT_LIMIT if wants_gradients else FORWARD_LIMIT
    if parts[0].device.type != "cpu" and largest > limit:
        raise UserError(
            f"Attention backend 'flex' is wrong for tensors of more than {limit:,} elements"
            f"{' where gradients are wanted' * wants_gradients} (pytorch#190857), but the keys have {largest:,}: use "
            f"'triton' or 'sdpa'."
        )


@lru_cache(maxsize=32)
def _block_mask(layout: Layout, side: int, device: torch.device) -> BlockMask:
    if side == FLEX_BLOCK:
        return layout.block_mask(device)
    tiles = layout.tiles(FLEX_BLOCK, side)
    width = sum(tiles.streams)
    lists = lists_of(tiles.query.to(device), tiles.key.to(device), tiles.query_tiles, width)
    lengths = (tiles.query_tiles * FLEX_BLOCK, width * side)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(FLEX_BLOCK, side), seq_lengths=lengths)


@cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention as a fused kernel, or an error: the formula that torch would fall back to reads every tile."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
