"""One dense attention with a boolean mask through torch's `scaled_dot_product_attention`: for small pictures.

It computes what windows would leave out, but in one call instead of one for each kind of window: at a base's native
size, where the LoRA is trained, the calls cost more than the arithmetic.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from scale_dit.attention._dense import join
from scale_dit.errors import UserError
from scale_dit.layout import Layout

MOST_KEYS = 16_384
"""A mask of so many keys has 256 MiB; from 65,536 on, one of torch's kernels is wrong (pytorch#162588)."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def attend(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """See `scale_dit.attention`. Gradients are autograd's own.

    Raises:
        UserError: More than `MOST_KEYS` keys.
    """
    query = join(text[0], image[0])
    key, value = (join(*parts) for parts in zip(text[1:], image[1:], guidance, strict=True))
    if key.shape[1] > MOST_KEYS:
        raise UserError(
            f"Attention backend 'masked' is for small pictures, up to {MOST_KEYS} keys, but this one has "
            f"{key.shape[1]}: use attention=auto."
        )
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    mask = None if layout.is_dense else _mask(layout, query.device)
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
    text_out, image_out = output.split([layout.text, layout.image.tokens], dim=1)
    return text_out, image_out


@lru_cache(maxsize=8)
def _mask(layout: Layout, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the mask may be used in training later
        return layout.dense_mask().to(device)
