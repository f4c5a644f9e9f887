"""Which way a picture is decoded or encoded, what that costs, and the picture itself, band by band."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scale_dit.autoencoder.layers import streamed_decode, streamed_encode
from scale_dit.autoencoder.streaming import Streaming
from scale_dit.autoencoder.tiles import tiled_decode
from scale_dit.errors import UserError

log = logging.getLogger(__name__)

MODES = ("auto", "whole", "streamed", "host", "tiled")
WHOLE_PLANES = 4
"""Largest activations that the untiled decoder holds at a time: the residual, its norm, the activation, the result."""
SHARE = 0.9
"""Of the free memory that is counted on."""
BAND_ELEMENTS = 2**26


@dataclass(frozen=True)
class Decoding:
    """How pictures are decoded.

    Args:
        mode: `whole` is the stock decoder; `streamed` the same numbers but for rounding, in bands of rows; `host` the
            same with all but the bands in the host's memory; `tiled` is cheaper and not exact: tiles with norms'
            statistics pooled over some of them. `auto` is the first of the first three that fits.
        tile, overlap: of `tiled`, in px.
        wrap: Which edges join: `none`, `horizontal` or `both`.

    Raises:
        UserError: An unknown mode or wrap, or tiles that cannot be.
    """

    mode: str = "auto"
    tile: int = 1024
    overlap: int = 256
    wrap: str = "none"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"unknown decode mode {self.mode!r}: use one of {', '.join(MODES)}")
        if self.wrap not in ("none", "horizontal", "both"):
            raise UserError(f"unknown wrap {self.wrap!r}: use one of none, horizontal, both")
        if self.tile < 64 or not 0 <= self.overlap <= self.tile // 2:
            raise UserError(
                f"decode tiles of {self.tile} px cannot overlap by {self.overlap}: use tiles of at least 64 px, and an "
                f"overlap from 0 to {self.tile // 2}"
            )
        if self.wrap != "none" and self.mode in ("whole", "tiled"):
            raise UserError(f"decode mode {self.mode!r} cannot join edges (wrap={self.wrap}): use streamed or auto")

    def choice(self, vae: Any, height: int, width: int, free: int | None) -> str:
        """The mode for a picture of `height` x `width` px.

        Args:
            free: Bytes of device memory to be had; `None`: as many as are needed.
        """
        if self.mode != "auto":
            return self.mode
        for mode in ("whole", "streamed") if self.wrap == "none" else ("streamed",):
            if free is None or decode_bytes(vae, height, width, mode) <= SHARE * free:
                return mode
        return "host"


def decode_bytes(vae: Any, height: int, width: int, mode: str, tile: int = 1024) -> int:
    """Bytes of device memory that decoding a picture of `height` x `width` px takes at its peak, beside the weights.

    Args:
        mode: `whole`, `streamed`, `host` (streamed, planes in the host's memory) or `tiled`.
    """
    if mode == "tiled":
        return decode_bytes(vae, min(height, tile), min(width, tile), "whole")
    each = torch.finfo(vae.dtype).bits // 8
    channels = list(reversed(vae.config.block_out_channels))
    factor = 2 ** (len(channels) - 1)
    attention = 4 * channels[0] * (height // factor) * (width // factor) * each
    band = 6 * BAND_ELEMENTS * 4
    if mode == "host":
        return attention + band
    most = 0
    for level, mine in enumerate(channels):
        before = channels[max(level - 1, 0)]
        pixels = (height * 2**level // factor) * (width * 2**level // factor)
        if mode == "whole":
            most = max(most, WHOLE_PLANES * before * pixels * each)
        else:
            most = max(most, (before + mine) * pixels * each, (before * pixels * 5 // 4) * each)
    return max(most, attention) + (band if mode == "streamed" else 0)


@torch.no_grad()
def decode_bands(vae: Any, latents: Tensor, how: Decoding, free: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """A picture from latents `[1, C, h, w]` as the autoencoder takes them, in bands from the top.

    Args:
        free: Bytes of device memory to be had; by default what the device has free.

    Yields:
        First row and `[1, 3, rows, W]` in [0, 1], float32, on the latents' device.
    """
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (scale * side for side in latents.shape[-2:])
    device = latents.device
    mode = how.choice(vae, height, width, _free_bytes(device) if free is None else free)
    log.info("decoding %d x %d px: %s", width, height, mode)
    if mode == "whole":
        yield 0, _to_unit(vae.decode(latents.to(vae.dtype)).sample)
        return
    streaming = _streaming(device, mode, how.wrap)
    if mode == "tiled":
        found = tiled_decode(vae, latents, how.tile // scale, how.overlap // scale, streaming)
    else:
        found = streamed_decode(vae, latents, streaming)
    for start, band in found:
        yield start, _to_unit(band)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, how: Decoding | None = None) -> Tensor:
    """Pictures `[B, 3, H, W]` in [0, 1], float32, from latents `[B, C, h, w]` as the autoencoder takes them.

    They are on the latents' device; streamed ones on the CPU, since they may be too large for it.
    """
    how = how or Decoding()
    if len(latents) > 1 and _whole_batch_fits(vae, latents, how):
        return _to_unit(vae.decode(latents.to(vae.dtype)).sample)
    pictures = []
    for one in latents:
        parts = [band for _, band in decode_bands(vae, one[None], how)]
        pictures.append(parts[0] if len(parts) == 1 else torch.cat([part.cpu() for part in parts], dim=2))
    return torch.cat(pictures)


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, how: Decoding | None = None) -> Tensor:
    """The posterior's means `[B, C, h, w]` of pictures `[B, 3, H, W]` in [0, 1]; streamed where whole does not fit."""
    how = replace(how or Decoding(), wrap="none")
    device = next(vae.parameters()).device
    count, _, height, width = pictures.shape
    if how.choice(vae, count * height, width, _free_bytes(device)) == "whole":
        return vae.encode(pictures.to(device, vae.dtype) * 2 - 1).latent_dist.mean
    found = []
    for picture in pictures:
        mode = how.choice(vae, height, width, _free_bytes(device))
        scaled = picture[None].to(vae.dtype) * 2 - 1
        if mode == "whole":
            found.append(vae.encode(scaled.to(device)).latent_dist.mean)
            continue
        log.info("encoding %d x %d px: %s", width, height, mode)
        found.append(streamed_encode(vae, scaled, _streaming(device, mode, "none")))
    return torch.cat(found)


def _whole_batch_fits(vae: Any, latents: Tensor, how: Decoding) -> bool:
    scale, count = 2 ** (len(vae.config.block_out_channels) - 1), len(latents)
    free = _free_bytes(latents.device)
    return how.choice(vae, scale * latents.shape[-2] * count, scale * latents.shape[-1], free) == "whole"


def _streaming(device: torch.device, mode: str, wrap: str) -> Streaming:
    store = torch.device("cpu") if mode == "host" else device
    return Streaming(device, store, BAND_ELEMENTS, wrap_columns=wrap != "none", wrap_rows=wrap == "both")


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _to_unit(band: Tensor) -> Tensor:
    return (band.float() / 2 + 0.5).clamp(0, 1)
