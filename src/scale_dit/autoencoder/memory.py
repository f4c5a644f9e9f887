"""Device memory that decoding and encoding take, worked out from the autoencoder's shape.

What convolutions need for themselves is not in it. At 8192 x 8192 px in bfloat16 FLUX.1's decoder is told to take
103 GB `whole`, 36 GB `streamed` (a plane is 17.2 GB), and 7 GB `host` or `tiled`, whose middle layers see everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scale_dit.autoencoder.attention import SCORE_BYTES

WHOLE_DECODER, WHOLE_ENCODER = 3, 5
"""Activations of its largest layer that the untiled decoder holds at a time (input, norm, what is behind the norm), and
those that the encoder does (its first activation, too, and a padded copy)."""
STREAMED = 2
"""Planes: what a residual block reads, and what it writes."""
SAMPLED = 3
"""Tiles along either side whose norms' statistics are those of all tiles."""
ATTENTION = 5
"""Planes of the middle attention layer: its input, query, key and value, one of them twice while bands are joined."""
SCORES = 2.5
"""Bytes for each byte of its scores in 16 bit: their exponentials, and these in 16 bit."""
RESULTS = 5
"""What comes of a band of its queries: in parts, joined, by heads, projected, and with the input added."""
BAND_BYTES = 22
"""For each element of a band, whatever its dtype: norms are computed in float32."""
BAND_ELEMENTS = 2**26
"""Elements of a band's widest activation."""


def decode_bytes(
    vae: Any, height: int, width: int, mode: str, tile: int = 1024, band_elements: int = BAND_ELEMENTS
) -> int:
    """Bytes of device memory at the peak of decoding, beside the weights.

    Args:
        height, width: Of the picture in px.
        mode: `whole`, `streamed`, `host` (streamed, planes in the host's memory) or `tiled`.
        tile: Of `tiled`, in px.
    """
    if mode == "whole":
        levels = list(_levels(vae, height, width))
        largest = max(max(before, channels) * pixels for before, channels, pixels in levels)
        return max(WHOLE_DECODER * largest, _attention_elements(levels)) * vae.dtype.itemsize
    if mode != "tiled":
        return _streamed_bytes(vae, height, width, mode == "host", band_elements)
    middle = _streamed_bytes(vae, height, width, True, band_elements)
    _, channels, pixels = next(_levels(vae, height, width))
    kept = channels * pixels * vae.dtype.itemsize
    # Those that statistics are measured on go through the layers together.
    together = min(SAMPLED, -(-height // tile)) * min(tile, height)
    sample = _streamed_bytes(vae, together, min(SAMPLED, -(-width // tile)) * min(tile, width), False, band_elements)
    return max(middle, kept + sample)


def encode_bytes(vae: Any, height: int, width: int, mode: str, band_elements: int = BAND_ELEMENTS) -> int:
    """Bytes of device memory at the peak of encoding, beside the weights; see `decode_bytes`.

    Args:
        mode: `whole`, `streamed` or `host`.
    """
    if mode == "whole":
        levels = list(_levels(vae, height, width))
        largest = max(channels * pixels for _, channels, pixels in levels)
        return max(WHOLE_ENCODER * largest, _attention_elements(levels)) * vae.dtype.itemsize
    return _streamed_bytes(vae, height, width, mode == "host", band_elements)


def _streamed_bytes(vae: Any, height: int, width: int, on_host: bool, band_elements: int) -> int:
    levels = list(_levels(vae, height, width))
    _, deepest, pixels = levels[0]
    queries = min(pixels, band_elements // 4 // deepest)
    scores = round(SCORES * min(SCORE_BYTES, 4 * pixels * queries)) if vae.dtype.itemsize < 4 else 0
    scores += RESULTS * queries * deepest * vae.dtype.itemsize
    widest = max(max(before, channels) * pixels for before, channels, pixels in levels)
    band = BAND_BYTES * min(band_elements, widest)
    # Scores are there when no convolution runs.
    held = _attention_elements(levels) * vae.dtype.itemsize + max(scores, band)
    if on_host:
        return held
    planes = max(STREAMED * channels * pixels for _, channels, pixels in levels)
    return max(held, planes * vae.dtype.itemsize + band)


def _attention_elements(levels: list[tuple[int, int, int]]) -> int:
    _, channels, pixels = levels[0]
    return ATTENTION * channels * pixels


def _levels(vae: Any, height: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Channels that come in, channels, and pixels of every level, the deepest first."""
    channels = list(reversed(vae.config.block_out_channels))
    for level, (before, mine) in enumerate(zip([channels[0], *channels[:-1]], channels, strict=True)):
        reduction = 2 ** (len(channels) - 1 - level)
        yield before, mine, (height // reduction) * (width // reduction)
