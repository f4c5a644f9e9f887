"""FlexAttention: one fused kernel over the tiles that the layout visits.

Text rows go to a dense kernel: few queries over very many keys crash FlexAttention (pytorch#174923). Its kernels want
lengths in multiples of 128, so keys, values and, where needed, queries are padded.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scale_dit.attention._dense import join, text_rows
from scale_dit.errors import UserError
from scale_dit.layout import Layout
from scale_dit.tiles import padded

MAX_LAYOUTS = 64
"""Layouts that are compiled in one process; beyond it torch would silently run the unfused formula."""


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
    device = image[0].device
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (*text, *image, *guidance))
    if device.type == "cpu" and needs_gradient:
        raise UserError("Attention backend 'flex' has no gradient on a CPU: use 'sdpa', or torch.no_grad().")

    key, value = (join(*map(_pad, parts)) for parts in zip(text[1:], image[1:], guidance, strict=True))
    query, keys, values = (part.transpose(1, 2) for part in (_pad(image[0]), key, value))
    with torch._dynamo.config.patch(recompile_limit=MAX_LAYOUTS):
        output = _compiled()(query, keys, values, block_mask=_block_mask(layout, device), scale=scale)
    image_out = output.transpose(1, 2)[:, : layout.image.tokens]

    if padded(layout.text) > layout.text:
        key, value = join(text[1], image[1]), join(text[2], image[2])
    return text_rows(text[0], key, value, layout, scale), image_out


def _pad(stream: Tensor) -> Tensor:
    """`[B, tokens, H, D]` with zero tokens up to the next multiple of 128."""
    missing = padded(stream.shape[1]) - stream.shape[1]
    return torch.cat([stream, stream.new_zeros(len(stream), missing, *stream.shape[2:])], dim=1) if missing else stream


@lru_cache(maxsize=32)
def _block_mask(layout: Layout, device: torch.device) -> BlockMask:
    return layout.block_mask(device)


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)
