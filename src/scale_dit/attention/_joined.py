"""What backends share whose kernels take one tensor of queries, one of keys and one of values."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from scale_dit.attention._dense import join
from scale_dit.layout import Layout
from scale_dit.tiles import FLEX_BLOCK, padded

HALF_BLOCK = FLEX_BLOCK // 2
"""Keys of a tile where that makes masks needless."""


class Joined(NamedTuple):
    """The streams of one attention, `[B, tokens, H, D]` each."""

    text_query: Tensor
    query: Tensor
    """Of the image, padded with zeros to a multiple of 128 tokens."""
    key: Tensor
    value: Tensor
    """Text, image and guidance, each padded so."""
    text_key: Tensor
    text_value: Tensor
    """Text and image without padding: what the text rows read, by a dense kernel."""


def join_streams(text: tuple, image: tuple, guidance: tuple) -> Joined:
    """Join the streams of `scale_dit.attention.attend`; views where nothing has to move."""
    key, value = (join(*map(_pad, parts)) for parts in zip(text[1:], image[1:], guidance, strict=True))
    tokens = text[1].shape[1]
    rows = tokens + image[1].shape[1]
    text_read = key[:, :rows], value[:, :rows]
    if padded(tokens) > tokens:
        text_read = join(text[1], image[1]), join(text[2], image[2])
    return Joined(text[0], _pad(image[0]), key, value, *text_read)


@lru_cache(maxsize=64)
def needs_no_mask(layout: Layout) -> bool:
    """Whether every tile of 128 queries and 64 keys is wholly allowed or wholly forbidden, and no stream is padded."""
    streams = (layout.text, layout.image.tokens, layout.guidance_tokens)
    is_padded = any(padded(tokens) > tokens for tokens in streams)
    return not is_padded and bool(layout.tiles(FLEX_BLOCK, HALF_BLOCK).is_full.all())


def _pad(stream: Tensor) -> Tensor:
    """`[B, tokens, H, D]` with zero tokens up to the next multiple of 128."""
    missing = padded(stream.shape[1]) - stream.shape[1]
    return torch.cat([stream, stream.new_zeros(len(stream), missing, *stream.shape[2:])], dim=1) if missing else stream


def lists_of(owner: Tensor, other: Tensor, owners: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Lists of tiles as block-sparse kernels read them.

    Args:
        owner, other: int64 `[E]`: entry `i` says that `other[i]` is in the list of `owner[i]`; sorted by owner.
        owners: number of lists.
        width: room for each list; as much as the longest needs by default.

    Returns:
        Lengths `[1, 1, owners]`, and members, first in each row, `[1, 1, owners, width]`, int32 on the entries' device.
    """
    counts = torch.bincount(owner, minlength=owners)
    if width is None:
        width = max(1, int(counts.max()))
    members = torch.zeros(owners, width, dtype=torch.int32, device=owner.device)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    members[owner, place] = other.to(torch.int32)
    return counts.to(torch.int32)[None, None], members[None, None]
