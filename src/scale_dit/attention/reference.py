"""The oracle: one dense mask, in float64. For small sizes."""

from __future__ import annotations

from functools import lru_cache

import torch
from scale_dit_kernels.reference import masked_attention
from torch import Tensor

from scale_dit.layout import Layout


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """MPS has no float64."""
    return "this device has no float64; use 'sdpa'." if device.type == "mps" else None


def attend(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """See `scale_dit.attention`. Computes in float64 and returns the input's dtype."""
    query = torch.cat([text[0], image[0]], dim=1)
    key = torch.cat([text[1], image[1], guidance[0]], dim=1)
    value = torch.cat([text[2], image[2], guidance[1]], dim=1)
    output, _ = masked_attention(query, key, value, _mask(layout, query.device), scale)
    text_out, image_out = output.to(query.dtype).split([layout.text, layout.image.tokens], dim=1)
    return text_out, image_out


@lru_cache(maxsize=2)
def _mask(layout: Layout, device: torch.device) -> Tensor:
    return layout.dense_mask().to(device)
