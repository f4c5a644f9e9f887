"""Which way a picture is decoded or encoded, what that costs, and the picture itself, band by band."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scale_dit.autoencoder.layers import streamed_decode, streamed_encode
from scale_dit.autoencoder.memory import BAND_ELEMENTS, decode_bytes, encode_bytes, upscaling
from scale_dit.autoencoder.streaming import Streaming
from scale_dit.autoencoder.tiles import errors_of_tiles, tiled_decode
from scale_dit.errors import UserError
from scale_dit.planning.machine import free_bytes
from scale_dit.wrapping import check_wrap

log = logging.getLogger(__name__)

DECODES = ("whole", "streamed", "host", "tiled")
MODES = ("auto", *DECODES)
BytesNeeded = Callable[[Any, int, int, str], int]
WHOLE_PIXELS = 2048**2
"""Largest picture that `auto` decodes untiled on a GPU."""
SHARE = 0.9
"""Of the free memory that is counted on."""


@dataclass(frozen=True)
class Decoding:
    """How pictures are decoded.

    Args:
        mode: `whole` is the stock decoder; `streamed` the same numbers but for rounding, in bands of rows; `host` the
            same with all but the bands in the host's memory; `tiled` takes as little memory and is not exact: tiles
            with norms' statistics of some of them. `auto` is the first of the first three that fits.
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
        check_wrap(self.wrap)
        if self.tile < 64 or not 0 <= self.overlap <= self.tile // 2:
            raise UserError(
                f"decode tiles of {self.tile} px cannot overlap by {self.overlap}: use tiles of at least 64 px, and an "
                f"overlap from 0 to {self.tile // 2}"
            )
        if self.wrap != "none" and self.mode in ("whole", "tiled"):
            raise UserError(f"decode mode {self.mode!r} cannot join edges (wrap={self.wrap}): use streamed or auto")

    def choice(
        self,
        vae: Any,
        height: int,
        width: int,
        free: int | None,
        needed: BytesNeeded = decode_bytes,
        device: torch.device | None = None,
    ) -> str:
        """The mode for a picture of `height` x `width` px.

        Args:
            free: Bytes of the device's memory to be had; `None`: as many as are needed.
            needed: `decode_bytes` or `encode_bytes`.
            device: Where it is decoded; by default where the autoencoder is.
        """
        if self.mode != "auto":
            return self.mode
        on_cpu = (vae.device if device is None else device).type == "cpu"
        # Above, the untiled one is slower on a GPU, too.
        may_be_whole = self.wrap == "none" and (free is None or on_cpu or height * width <= WHOLE_PIXELS)
        for mode in ("whole", "streamed") if may_be_whole else ("streamed",):
            if free is None or needed(vae, height, width, mode) <= SHARE * free:
                return mode
        return "streamed" if on_cpu else "host"

    def resolved(self, vae: Any, latents: Tensor, free: int | None = None) -> Decoding:
        """How latents `[1, C, h, w]` are decoded where they are: with the mode that is chosen now for `auto`.

        Args:
            free: Bytes of the device's memory to be had; by default what it has free.
        """
        height, width = (upscaling(vae) * side for side in latents.shape[-2:])
        return replace(self, mode=self.choice(vae, height, width, free_bytes(latents.device) if free is None else free))


@torch.no_grad()
def decode_bands(vae: Any, latents: Tensor, how: Decoding, free: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """A picture from latents `[1, C, h, w]` as the autoencoder takes them, in bands from the top.

    Args:
        free: Bytes of the device's memory to be had; by default what it has free.

    Yields:
        First row and `[1, 3, rows, W]` in [0, 1], float32, on the latents' device.
    """
    scale, device = upscaling(vae), latents.device
    sides = latents.shape[-2], latents.shape[-1]
    height, width = (scale * side for side in sides)
    how = how.resolved(vae, latents, free)
    mode = how.mode
    tile, overlap = how.tile // scale, how.overlap // scale
    errors = errors_of_tiles(vae, *sides, tile, overlap) if mode == "tiled" else None
    if errors is None:
        log.info("decoding %d x %d px: %s", width, height, mode)
    else:
        log.warning("decoding %d x %d px: %s; %s", width, height, mode, errors)
    if mode == "whole":
        yield 0, _to_unit(vae.decode(latents.to(vae.dtype)).sample)
        return
    streaming = _streaming(device, mode, how.wrap)
    if mode == "tiled":
        found = tiled_decode(vae, latents, tile, overlap, streaming)
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
    """The posterior's means `[B, C, h, w]` of pictures `[B, 3, H, W]` in [0, 1]; streamed where whole does not fit.

    Pictures may be on the CPU though the autoencoder is not. There are no tiles and no joined edges: `tiled` is
    `streamed`.
    """
    how = replace(how or Decoding(), wrap="none")
    device = next(vae.parameters()).device
    count, _, height, width = pictures.shape
    if how.choice(vae, count * height, width, free_bytes(device), encode_bytes) == "whole":
        return vae.encode(pictures.to(device, vae.dtype) * 2 - 1).latent_dist.mean
    found = []
    for picture in pictures:
        mode = how.choice(vae, height, width, free_bytes(device), encode_bytes)
        scaled = picture[None].to(vae.dtype) * 2 - 1
        if mode == "whole":
            found.append(vae.encode(scaled.to(device)).latent_dist.mean)
            continue
        log.info("encoding %d x %d px: %s", width, height, "streamed" if mode == "tiled" else mode)
        found.append(streamed_encode(vae, scaled, _streaming(device, mode, "none")))
    return torch.cat(found)


def _whole_batch_fits(vae: Any, latents: Tensor, how: Decoding) -> bool:
    scale, count = upscaling(vae), len(latents)
    free = free_bytes(latents.device)
    return how.choice(vae, scale * latents.shape[-2] * count, scale * latents.shape[-1], free) == "whole"


def _streaming(device: torch.device, mode: str, wrap: str) -> Streaming:
    store = torch.device("cpu") if mode == "host" else device
    return Streaming(device, store, BAND_ELEMENTS, wrap_columns=wrap != "none", wrap_rows=wrap == "both")


def _to_unit(band: Tensor) -> Tensor:
    return (band.float() / 2 + 0.5).clamp(0, 1)
