"""Decoding in overlapping tiles, so that a large picture's activations never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scale_dit.errors import UserError


def decode_tiled(
    decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, overlap: int, factor: int = 8
) -> Tensor:
    """Decode latents tile by tile and blend the overlaps linearly.

    Tiles have normalisation statistics and attention of their own, so the result differs from the untiled one; more
    overlap hides the seams, larger tiles make the difference smaller.

    Args:
        decode: Latents `[B, C, h, w]` -> pictures `[B, 3, factor*h, factor*w]`.
        latents: `[B, C, h, w]`.
        tile: Side of a tile in latent pixels; a picture not larger than this is decoded whole.
        overlap: How far neighbouring tiles share, in latent pixels.
        factor: Pixels per latent pixel.

    Returns:
        `[B, 3, factor*h, factor*w]` float32 on the CPU.

    Raises:
        UserError: An overlap that is negative or more than half the tile.
    """
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise UserError(
            f"decode tiles of {tile} latent pixels cannot overlap by {overlap}: use an overlap from 0 to {tile // 2}"
        )
    batch, _, height, width = latents.shape
    if height <= tile and width <= tile:
        return decode(latents).float().cpu()
    picture = torch.zeros(batch, 3, height * factor, width * factor)
    weight = torch.zeros(height * factor, width * factor)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = decode(latents[:, :, top : top + tile, left : left + tile]).float().cpu()
            rows = slice(top * factor, top * factor + part.shape[2])
            columns = slice(left * factor, left * factor + part.shape[3])
            ramp = _ramp(part.shape[2], overlap * factor)[:, None] * _ramp(part.shape[3], overlap * factor)
            picture[:, :, rows, columns] += part * ramp
            weight[rows, columns] += ramp
    return picture / weight


def _starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """First latent pixel of each tile along one side; the last tile ends with the side."""
    start = 0
    while start + tile < length:
        yield start
        start += tile - overlap
    yield max(0, length - tile)


def _ramp(length: int, overlap: int) -> Tensor:
    """Blending weight along one side of a tile: rises over the overlap, then stays, then falls; never zero."""
    if overlap == 0:
        return torch.ones(length)
    place = torch.arange(length)
    return torch.minimum(place + 1, length - place).clamp(max=overlap).float() / overlap
