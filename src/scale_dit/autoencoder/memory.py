"""Device memory that decoding and encoding take, worked out from the autoencoder's shape.

At 8192 x 8192 px in bfloat16 FLUX.1's decoder is told to take 165 GB `whole` on a GPU, 36 GB `streamed` (a plane is
17.2 GB), 5.2 GB `host` and 7.4 GB `tiled`: middle layers see everything. See experiments/decode for what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scale_dit.autoencoder.attention import HELD, SCORE_BYTES, way_on

Levels = list[tuple[int, int, int]]
"""See `_levels`."""
WHOLE_DECODER, WHOLE_ENCODER = 3, 5
"""Activations of its largest layer that the untiled decoder holds at a time (input, norm, what is behind the norm), and
those that the encoder does (its first activation, too, and a padded copy)."""
CHANNELS_LAST = 1.8
"""What convolutions take beside, on a GPU and untiled: cuDNN lays out input and output anew. In largest activations,
by what an H100 took at 2048 and 4096 px."""
STREAMED = 2
"""Planes: what a residual block reads, and what it writes."""
SAMPLED = 3
"""Tiles along either side whose norms' statistics are those of all tiles."""
ATTENTION = 3
"""Planes of the middle attention layer beside its input: query, key and value."""
RESULTS = 5
"""What comes of a band of its queries: in parts, joined, by heads, projected, and with the input added."""
BAND_BYTES = 22
"""For each element of a band, whatever its dtype: norms are computed in float32."""
COPIES = 4
"""Bands that are on their way between the card and planes in host memory: three that come, one that goes."""
BAND_ELEMENTS = 2**26
"""Elements of a band's widest activation."""


def decode_bytes(
    vae: Any,
    height: int,
    width: int,
    mode: str,
    tile: int = 1024,
    band_elements: int = BAND_ELEMENTS,
    device: torch.device | None = None,
) -> int:
    """Bytes of device memory at the peak of decoding, beside the weights.

    Args:
        height, width: Of the picture in px.
        mode: `whole`, `streamed`, `host` (streamed, planes in the host's memory) or `tiled`.
        tile: Of `tiled`, in px.
        device: Where it is decoded; by default where the autoencoder is.
    """
    channels = _decoder_channels(vae)
    levels = _levels(channels, height, width)
    if mode == "whole":
        largest = max(max(before, mine) * pixels for before, mine, pixels in levels)
        return _whole_bytes(vae, WHOLE_DECODER, largest, device)
    if mode != "tiled":
        return _streamed_bytes(vae, levels, mode, band_elements, device)
    middle = _streamed_bytes(vae, levels, "tiled", band_elements, device)
    _, deepest, pixels = levels[0]
    kept = deepest * pixels * vae.dtype.itemsize
    # Those that statistics are measured on go through the layers together.
    sides = (min(SAMPLED, _tiles(side, tile)) * min(tile, side) for side in (height, width))
    return max(middle, kept + _streamed_bytes(vae, _levels(channels, *sides), "streamed", band_elements, device))


def upscaling(vae: Any) -> int:
    """Side of a picture / side of its latents."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def host_bytes(vae: Any, height: int, width: int, encoding: bool = False) -> int:
    """Bytes of host memory that decoding, or encoding, takes in the mode `host`."""
    levels = _levels(vae.config.block_out_channels if encoding else _decoder_channels(vae), height, width)
    return STREAMED * vae.dtype.itemsize * max(channels * pixels for _, channels, pixels in levels)


def encode_bytes(
    vae: Any,
    height: int,
    width: int,
    mode: str,
    band_elements: int = BAND_ELEMENTS,
    device: torch.device | None = None,
) -> int:
    """Bytes of device memory at the peak of encoding, beside the weights; see `decode_bytes`.

    Args:
        mode: `whole`, `streamed` or `host`.
    """
    levels = _levels(vae.config.block_out_channels, height, width)
    if mode == "whole":
        largest = max(channels * pixels for _, channels, pixels in levels)
        return _whole_bytes(vae, WHOLE_ENCODER, largest, device)
    return _streamed_bytes(vae, levels, mode, band_elements, device)


def _tiles(side: int, tile: int) -> int:
    """Tiles along a side, which overlap by a quarter of theirs."""
    return 1 + -(-max(0, side - tile) // (tile - tile // 4))


def _whole_bytes(vae: Any, held: float, largest: int, device: torch.device | None) -> int:
    if (vae.device if device is None else device).type == "cuda":
        held += CHANNELS_LAST
    return round(held * largest) * vae.dtype.itemsize


def _streamed_bytes(vae: Any, levels: Levels, mode: str, band_elements: int, device: torch.device | None) -> int:
    _, deepest, pixels = levels[0]
    size, on_host = vae.dtype.itemsize, mode == "host"
    queries = min(pixels, band_elements // 4 // deepest)
    each_score = HELD[way_on(vae.device if device is None else device, vae.dtype)]
    scores = round(each_score * min(SCORE_BYTES, 4 * pixels * queries)) + RESULTS * queries * deepest * size

    def band(elements: int) -> int:
        return (BAND_BYTES + on_host * COPIES * size) * min(band_elements, elements)

    # Scores are there when no band is worked on.
    kept = (ATTENTION + (not on_host)) * deepest * pixels * size
    middle = kept + max(scores, band(deepest * pixels))
    if mode == "tiled":  # what comes before tiles
        return middle
    widest = max(max(before, channels) * pixels for before, channels, pixels in levels)
    planes = 0 if on_host else STREAMED * max(channels * pixels for _, channels, pixels in levels) * size
    return max(middle, planes + band(widest))


def _decoder_channels(vae: Any) -> Sequence[int]:
    """FLUX.2's decoder may be wider or narrower than its encoder."""
    return vae.config.get("decoder_block_out_channels") or vae.config.block_out_channels


def _levels(channels: Sequence[int], height: int, width: int) -> Levels:
    """Channels that come in, channels, and pixels of every level, the deepest first."""
    found = []
    for level, mine in enumerate(reversed(channels)):
        reduction = 2 ** (len(channels) - 1 - level)
        before = channels[len(channels) - max(1, level)]
        found.append((before, mine, (height // reduction) * (width // reduction)))
    return found
