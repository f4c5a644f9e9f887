"""Decoding in overlapping tiles whose norms share statistics: cheaper than exact, and without steps in colour.

A tile with statistics of its own is brighter or greyer than its neighbours, and one with an attention layer of its own
sees other things. Here the layers at the latents' size, the attention layer among them, run over the whole, exactly,
and all tiles have the same statistics, pooled over some of them; what is left is that those had their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from scale_dit.autoencoder.layers import enlarge, middle
from scale_dit.autoencoder.planes import Plane
from scale_dit.autoencoder.streaming import Streaming

SAMPLED = 3
"""Tiles along either side whose statistics are pooled."""


def shared_statistics(vae: Any, tiles: Sequence[Plane], streaming: Streaming) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of every norm's groups over some tiles, each enlarged with its own."""
    found = []
    for tile in tiles:
        measured = replace(streaming, statistics={})
        for _ in enlarge(vae, tile, measured):
            pass
        found.append(measured.statistics)
    pooled = {}
    for name in found[0]:
        means, variances = (torch.stack([each[name][part] for each in found]) for part in (0, 1))
        mean = means.mean(0)
        pooled[name] = mean, (variances + means.square()).mean(0) - mean.square()
    return pooled


def tiled_decode(
    vae: Any, latents: Tensor, tile: int, overlap: int, streaming: Streaming
) -> Iterator[tuple[int, Tensor]]:
    """Decode latents tile by tile, overlaps blended linearly.

    Args:
        latents: `[1, C, h, w]`, as the autoencoder takes them.
        tile, overlap: In latent pixels.

    Yields:
        First row and `[1, 3, rows, W]` float32 on the CPU of one band after the other.
    """
    height, width = latents.shape[-2:]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    tops, lefts = (list(_starts(side, tile, overlap)) for side in (height, width))
    whole = middle(vae, latents, streaming)

    def cut(top: int, left: int) -> Plane:
        part = whole.rows(top, min(top + tile, height))[..., left : left + tile]
        return Plane.of(part, streaming.compute, streaming.compute)

    sample = [cut(top, left) for top, left in product(_spread(tops), _spread(lefts))]
    shared = replace(streaming, statistics=shared_statistics(vae, sample, streaming))
    del sample
    below: tuple[Tensor, Tensor] | None = None
    for place, top in enumerate(tops):
        rows = min(tile, height - top) * factor
        band, weight = torch.zeros(1, 3, rows, width * factor), torch.zeros(rows, width * factor)
        for left in lefts:
            picture = torch.cat([each.float().cpu() for _, each in enlarge(vae, cut(top, left), shared)], dim=2)
            ramp = _ramp(picture.shape[2], overlap * factor)[:, None] * _ramp(picture.shape[3], overlap * factor)
            columns = slice(left * factor, left * factor + picture.shape[3])
            band[..., columns] += picture * ramp
            weight[:, columns] += ramp
        if below is not None:
            shared_rows = below[0].shape[2]
            band[:, :, :shared_rows] += below[0]
            weight[:shared_rows] += below[1]
        done = (tops[place + 1] - top) * factor if place + 1 < len(tops) else rows
        yield top * factor, band[:, :, :done] / weight[:done]
        below = band[:, :, done:], weight[done:]


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


def _starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """First latent pixel of each tile along one side; the last tile ends with the side."""
    start = 0
    while start + tile < length:
        yield start
        start += tile - overlap
    yield max(0, length - tile)


def _spread(starts: list[int]) -> list[int]:
    """At most `SAMPLED` of the starts, the first and the last among them."""
    if len(starts) <= SAMPLED:
        return starts
    return [starts[round(place * (len(starts) - 1) / (SAMPLED - 1))] for place in range(SAMPLED)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Blending weight along one side of a tile: rises over the overlap, then stays, then falls; never zero."""
    if overlap == 0:
        return torch.ones(length)
    place = torch.arange(length)
    return torch.minimum(place + 1, length - place).clamp(max=overlap).float() / overlap
