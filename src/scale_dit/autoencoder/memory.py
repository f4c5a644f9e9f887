"""Device memory that decoding and encoding take, worked out from the autoencoder's shape.

At 8192 x 8192 px in bfloat16 FLUX.1's decoder is told to take 165 GB `whole` on a GPU, 36 GB `streamed` (a plane is
17.2 GB), 7.5 GB `host` and 7.4 GB `tiled`: middle layers see everything. See experiments/decode for what is measured.
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
ATTENTION = 5
"""Planes of the middle attention layer: its input, query, key and value, one of them twice while bands are joined."""
RESULTS = 5
"""What comes of a band of its queries: in parts, joined, by heads, projected, and with the input added."""
BAND_BYTES = 22
"""For each element of a band, whatever its dtype: norms are computed in float32."""
COPIES = 5
"""Bands that are on their way between the card and planes in host memory: three that come, two that go."""
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
        return _whole_bytes(vae, WHOLE_DECODER, largest, levels, device)
    if mode != "tiled":
        return _streamed_bytes(vae, levels, mode, band_elements, device)
    middle = _streamed_bytes(vae, levels, "tiled", band_elements, device)
    _, deepest, pixels = levels[0]
    kept = deepest * pixels * vae.dtype.itemsize
    # Those that statistics are measured on go through the layers together.
    sides = (min(SAMPLED, -(-side // tile)) * min(tile, side) for side in (height, width))
    return max(middle, kept + _streamed_bytes(vae, _levels(channels, *sides), "streamed", band_elements, device))


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
        return _whole_bytes(vae, WHOLE_ENCODER, largest, levels, device)
    return _streamed_bytes(vae, levels, mode, band_elements, device)


def _whole_bytes(vae: Any, held: float, largest: int, levels: Levels, device: torch.device | None) -> int:
    if (vae.device if device is None else device).type == "cuda":
        held += CHANNELS_LAST
    return max(round(held * largest), _attention_elements(levels)) * vae.dtype.itemsize


def _streamed_bytes(vae: Any, levels: Levels, mode: str, band_elements: int, device: torch.device | None) -> int:
    _, deepest, pixels = levels[0]
    queries = min(pixels, band_elements // 4 // deepest)
    each_score = HELD[way_on(vae.device if device is None else device, vae.dtype)]
    scores = round(each_score * min(SCORE_BYTES, 4 * pixels * queries))
    scores += RESULTS * queries * deepest * vae.dtype.itemsize
    widest = max(max(before, channels) * pixels for before, channels, pixels in levels)
    copies = COPIES * vae.dtype.itemsize if mode == "host" else 0
    band = (BAND_BYTES + copies) * min(band_elements, widest)
    # Scores are there when no convolution runs.
    held = _attention_elements(levels) * vae.dtype.itemsize + max(scores, band)
    if mode != "streamed":  # tiles: what comes before them
        return held
    planes = max(STREAMED * channels * pixels for _, channels, pixels in levels)
    return max(held, planes * vae.dtype.itemsize + band)


def _attention_elements(levels: Levels) -> int:
    _, channels, pixels = levels[0]
    return ATTENTION * channels * pixels


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
