"""Small random autoencoders of both families, and how they are streamed in bands that do not divide their sides."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from small_bases import randomise
from torch import Tensor

from scale_dit.autoencoder.streaming import Streaming

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"block_out_channels": (8, 16, 24, 24), "layers_per_block": 1, "norm_num_groups": 4}
FAMILIES = ("flux1", "flux2")


def autoencoder(family: str = "flux1", **options: Any) -> Any:
    """A random autoencoder: FLUX.1's is without the 1x1 convolutions at the latents, FLUX.2's with them."""
    levels = len(SHAPE["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    if family == "flux1":
        kinds = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 4}
        vae: Any = AutoencoderKL(**{**SHAPE, **blocks, **kinds, **options})
    else:
        vae = AutoencoderKLFlux2(**{**SHAPE, **blocks, "latent_channels": 4, **options})
    randomise(vae, seed=3)
    return vae.eval().requires_grad_(False)


def streaming(band_elements: int = 2**12, **options: Any) -> Streaming:
    """Bands of a few rows at most."""
    return Streaming(CPU, CPU, band_elements, **options)


def joined(parts: Any) -> Tensor:
    """The picture that bands make, seen to follow each other without gap."""
    rows, found = 0, []
    for start, band in parts:
        assert start == rows
        rows += band.shape[2]
        found.append(band)
    return torch.cat(found, dim=2)
