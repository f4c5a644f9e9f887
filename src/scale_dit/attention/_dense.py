"""What the backends share: unmasked attention, and the text rows, which need no mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scale_dit.layout import Layout


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Unmasked attention over `[B, tokens, H, D]`."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def join(*parts: Tensor) -> Tensor:
    """The parts one after another, `[B, tokens, H, D]`; no copy if only one has tokens."""
    present = [part for part in parts if part.shape[1]]
    return torch.cat(present, dim=1) if len(present) > 1 else present[0]


def text_rows(text: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Outputs of the text queries `[B, T, H, D]`, where `key` and `value` begin with the text and the image."""
    if not layout.text:
        return text
    read = layout.text + layout.image.tokens * layout.text_reads_image
    return dense(text, key[:, :read], value[:, :read], scale)
