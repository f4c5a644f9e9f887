"""Decoding in overlapping tiles whose norms share statistics: little memory, and no steps from tile to tile.

A tile with statistics of its own is brighter or greyer than its neighbours, and one with an attention layer of its own
sees other things. Here the layers at the latents' size, the attention layer among them, run over the whole, exactly.
Behind them are convolutions, which reach a known number of pixels: what a tile's edge spoils is not used where the
overlap allows it. All tiles have the same statistics; that those are of some tiles, not of all, is the error that is
left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from typing import Any, TypeVar

import torch
from torch import Tensor

from scale_dit.autoencoder.layers import enlarge, middle
from scale_dit.autoencoder.memory import SAMPLED, upscaling
from scale_dit.autoencoder.planes import Plane
from scale_dit.autoencoder.streaming import Statistics, Streaming

Tile = TypeVar("Tile")

MAX_ERROR, RMS_ERROR, SEAMS, SEAMS_OF_WHOLE = 10.3, 0.781, 0.995, 0.988
"""Of tiles against the untiled decoder, in levels of 255, and seam scores of both: those of `experiments/decode`."""
ERRORS = (
    f"more than {SAMPLED} tiles a side are not exact: measured at 1024 px on the embedded base in float32, they are "
    f"off by at most {MAX_ERROR:g} levels of 255 ({RMS_ERROR:g} rms), and their seam score is {SEAMS:g} (untiled: "
    f"{SEAMS_OF_WHOLE:g})"
)
"""What a person who asks for tiles is told."""


def tiled_decode(
    vae: Any, latents: Tensor, tile: int, overlap: int, streaming: Streaming
) -> Iterator[tuple[int, Tensor]]:
    """Decode latents tile by tile.

    Args:
        latents: `[1, C, h, w]`, as the autoencoder takes them.
        tile, overlap: In latent pixels.

    Yields:
        First row and `[1, 3, rows, W]` float32 on the CPU of one band after the other.
    """
    whole = middle(vae, latents, streaming)
    statistics = shared_statistics(vae, whole, tile, overlap, streaming)
    yield from join_tiles(vae, whole, tile, overlap, replace(streaming, statistics=statistics))


def errors_of_tiles(vae: Any, height: int, width: int, tile: int, overlap: int) -> str | None:
    """What is known of the errors of `tiled_decode`; `None` where it is exact but for rounding. All in latent pixels.

    It is where all tiles are measured, and what their edges spoil is not used.
    """
    tiles = max(len(_starts(side, tile, overlap)) for side in (height, width))
    spoils = tiles > 1 and overlap < 2 * reach(vae)
    if tiles <= SAMPLED and not spoils:
        return None
    least = 2 * reach(vae) * upscaling(vae)
    narrow = f"tiles whose overlaps are narrower than {least} px, as here, are not exact"
    if tiles <= SAMPLED:
        return narrow
    return f"{ERRORS}; {narrow} either" if spoils else ERRORS


def shared_statistics(vae: Any, whole: Plane, tile: int, overlap: int, streaming: Streaming) -> Statistics:
    """Statistics of every norm behind the middle, over some tiles that go through the layers together.

    Of each counts what lies between the middles of its overlaps, so that nothing counts twice.
    """
    sides = [
        list(zip(_starts(side, tile, overlap), _own(side, tile, overlap), strict=True))
        for side in (whole.height, whole.width)
    ]
    chosen = list(product(*map(_spread, sides)))
    tiles = torch.cat([_cut(whole, tile, top, left) for (top, _), (left, _) in chosen])
    regions = tuple((*down, *across) for (_, down), (_, across) in chosen)
    measured = replace(streaming, statistics={}, regions=regions)
    for _ in enlarge(vae, streaming.plane_of(tiles), measured):
        pass
    return measured.statistics


def join_tiles(vae: Any, whole: Plane, tile: int, overlap: int, streaming: Streaming) -> Iterator[tuple[int, Tensor]]:
    """Enlarge the middle of the decoder tile by tile; see `tiled_decode`.

    Args:
        streaming: With the statistics of every norm.
    """
    factor = upscaling(vae)
    margin = min(reach(vae), overlap // 2)
    tops, lefts = (_starts(side, tile, overlap) for side in (whole.height, whole.width))
    below: tuple[Tensor, Tensor] | None = None
    for place, top in enumerate(tops):
        down = _weights(top, min(tile, whole.height), whole.height, overlap, margin, factor)
        band, weight = torch.zeros(1, 3, len(down), whole.width * factor), torch.zeros(len(down), whole.width * factor)
        for left in lefts:
            across = _weights(left, min(tile, whole.width), whole.width, overlap, margin, factor)
            part = streaming.plane_of(_cut(whole, tile, top, left))
            picture = torch.cat([each.float().cpu() for _, each in enlarge(vae, part, streaming)], dim=2)
            columns = slice(left * factor, left * factor + len(across))
            band[..., columns] += picture * (down[:, None] * across)
            weight[:, columns] += down[:, None] * across
        if below is not None:
            rows = below[0].shape[2]
            band[:, :, :rows] += below[0]
            weight[:rows] += below[1]
        done = (tops[place + 1] - top) * factor if place + 1 < len(tops) else len(down)
        yield top * factor, band[:, :, :done] / weight[:done]
        below = band[:, :, done:], weight[done:]


def reach(vae: Any) -> int:
    """How far the layers behind the middle see, in latent pixels: 13 for FLUX.1."""
    convolutions = 2 * (vae.config.layers_per_block + 1)  # of the residual blocks of a level
    levels = len(vae.config.block_out_channels)
    seen = sum((convolutions + (level > 0)) / 2**level for level in range(levels)) + 1 / 2 ** (levels - 1)
    return math.ceil(seen)


def seam_score(picture: Tensor, borders: list[int], reach: int = 2) -> float:
    """How much steeper a picture is across tile borders than elsewhere: 1 is not at all.

    The mean absolute difference of neighbouring columns within `reach` of a border, over that of all others.

    Args:
        picture: `[..., H, W]`.
        borders: Columns.
    """
    steps = picture.diff(dim=-1).abs().flatten(0, -2).mean(0)
    at_border = torch.zeros(len(steps), dtype=torch.bool)
    for border in borders:
        at_border[max(0, border - reach) : border + reach] = True
    return float(steps[at_border].mean() / steps[~at_border].mean())


def _cut(whole: Plane, tile: int, top: int, left: int) -> Tensor:
    return whole.rows(top, min(top + tile, whole.height))[..., left : left + tile]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """First latent pixel of each tile along one side; the last tile ends with the side."""
    last = max(0, length - tile)
    return [*range(0, last, tile - overlap), last]


def _own(length: int, tile: int, overlap: int) -> list[tuple[Fraction, Fraction]]:
    """What is each tile's own: from the middle of one overlap to that of the next, as shares of the tile."""
    starts, size = _starts(length, tile, overlap), min(tile, length)
    middles = [(one + size + following) // 2 for one, following in pairwise(starts)]
    borders = zip(starts, [0, *middles], [*middles, length], strict=True)
    return [(Fraction(first - start, size), Fraction(last - start, size)) for start, first, last in borders]


def _spread(tiles: list[Tile]) -> list[Tile]:
    """At most `SAMPLED` of the tiles, the first and the last among them."""
    if len(tiles) <= SAMPLED:
        return tiles
    return [tiles[round(place * (len(tiles) - 1) / (SAMPLED - 1))] for place in range(SAMPLED)]


def _weights(start: int, tile: int, length: int, overlap: int, margin: int, factor: int) -> Tensor:
    """Weight in the blend of each pixel along one side of a tile.

    It is 0 over the margin, rises over what is left of the overlap, and falls likewise; at the picture's edges it is 1.
    """
    place = torch.arange(tile * factor, dtype=torch.float32)
    blended = (overlap - 2 * margin) * factor + 1
    weights = torch.ones_like(place)
    if start > 0:
        weights *= ((place - margin * factor + 1) / blended).clamp(0, 1)
    if start + tile < length:
        weights *= ((place.flip(0) - margin * factor + 1) / blended).clamp(0, 1)
    return weights
