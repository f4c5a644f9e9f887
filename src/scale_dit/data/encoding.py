"""Pictures and captions to what training reads: latents, the draft's latents and text embeddings.

The one function behind the cache on disk and behind encoding during training, so that both see the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from scale_dit.errors import UserError
from scale_dit.grid import Grid, guidance_grid

EncodeImage = Callable[[Tensor], Tensor]
"""Pictures `[B, 3, H, W]` in [0, 1] -> latents `[B, C, h, w]`: the mean of the posterior, so that it is repeatable."""

EncodeText = Callable[[list[str]], Any]
"""Captions -> a mapping or dataclass of tensors, each with the captions along its first axis."""


def guidance_size(
    height: int, width: int, scale: float, token: int = 16, max_tokens: int | None = None
) -> tuple[int, int]:
    """(height, width) in pixels of the draft under a picture, as `scale_dit.grid.guidance_grid` rounds it.

    Raises:
        UserError: for a side that is no multiple of the token size, or a scale below 1.
    """
    grid = guidance_grid(Grid.from_pixels(height, width, token, cell=1), scale, max_tokens)
    return grid.height * token, grid.width * token


def reduce_pictures(images: Tensor, scale: float, token: int = 16, max_tokens: int | None = None) -> Tensor:
    """The draft that a picture would have had: its bicubic, antialiased reduction.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        scale: sides are divided by it and rounded to whole tokens.
        token: pixels a side that one token covers.
        max_tokens: reduce further until the draft has no more tokens than that.

    Returns:
        `[B, 3, H', W']` in [0, 1].
    """
    size = guidance_size(images.shape[-2], images.shape[-1], scale, token, max_tokens)
    if size == tuple(images.shape[-2:]):
        return images
    return interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def encode_pictures(
    images: Tensor,
    encode_image: EncodeImage,
    scales: Sequence[float] = (4.0,),
    token: int = 16,
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[float, Tensor]]:
    """Latents `[B, C, h, w]` of pictures, and of their reduction by each scale.

    Raises:
        UserError: if the encoder's latents are not finite.
    """
    return _finite(encode_image(images)), encode_drafts(images, encode_image, scales, token, max_tokens)


@torch.no_grad()
def encode_drafts(
    images: Tensor, encode_image: EncodeImage, scales: Sequence[float], token: int, max_tokens: int | None
) -> dict[float, Tensor]:
    """Latents `[B, C, h', w']` of the reduction of pictures `[B, 3, H, W]` by each scale.

    Raises:
        UserError: if the encoder's latents are not finite.
    """
    return {scale: _finite(encode_image(reduce_pictures(images, scale, token, max_tokens))) for scale in scales}


@torch.no_grad()
def encode_batch(
    images: Tensor,
    captions: Sequence[str],
    encode_image: EncodeImage,
    encode_text: EncodeText,
    scale: float = 4.0,
    token: int = 16,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """What `CachedLatents` gives for these pictures, without a cache.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        captions: B of them.
        encode_image, encode_text: the base's encoders.
        scale, token, max_tokens: as in `reduce_pictures`.

    Returns:
        `{"latents": [B, C, h, w], "guidance_latents": [B, C, h', w'], "text": {name: [B, ...]}, "caption": list[str]}`.

    Raises:
        UserError: if the latents are not finite.
    """
    latents, reduced = encode_pictures(images, encode_image, (scale,), token, max_tokens)
    return {
        "latents": latents,
        "guidance_latents": reduced[scale],
        "text": text_tensors(encode_text, captions),
        "caption": list(captions),
    }


def text_tensors(encode_text: EncodeText, captions: Sequence[str]) -> dict[str, Tensor]:
    """The encoder's tensors by name, whether it returns a mapping or a dataclass."""
    encoded = encode_text(list(captions))
    if isinstance(encoded, Mapping):
        return dict(encoded)
    return {field.name: getattr(encoded, field.name) for field in dataclasses.fields(encoded)}


def _finite(latents: Tensor) -> Tensor:
    if not torch.isfinite(latents).all():
        raise UserError(
            f"the autoencoder gave latents that are not finite, in {latents.dtype}; run it in float32 or bfloat16"
        )
    return latents
