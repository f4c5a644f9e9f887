"""Tiles with shared statistics against the untiled decoder."""

from __future__ import annotations

import pytest
import torch
from autoencoders import autoencoder, joined, streaming
from small_bases import noise
from torch import Tensor

from scale_dit.autoencoder.layers import streamed_decode
from scale_dit.autoencoder.tiles import seam_score, tiled_decode


def smooth_latents(height: int, width: int) -> Tensor:
    """A slow gradient with a little noise, as a sky has it: what tiles of their own spoil most."""
    down, right = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    plane = down + 0.5 * right
    return torch.stack([plane, -plane, down.expand(height, width), right.expand(height, width)])[None] + 0.1 * noise(
        1, 4, height, width
    )


@pytest.mark.parametrize(("height", "width"), [(12, 9), (16, 16)])
def test_one_tile_is_everything(height, width):
    vae, latents = autoencoder(), noise(1, 4, height, width)
    whole = vae.decode(latents).sample
    tiled = joined(tiled_decode(vae, latents, 16, 4, streaming()))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("family", ["flux1", "flux2"])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), (8, 0), (12, 3)])
def test_tiles_cover_pictures_that_they_do_not_divide(family, tile, overlap):
    """Every pixel is there once, weights of the blend included: none is far from the untiled picture."""
    vae, latents = autoencoder(family), smooth_latents(21, 17)
    whole = vae.decode(latents).sample
    tiled = joined(tiled_decode(vae, latents, tile, overlap, streaming()))
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.15 * whole.std()


def test_shared_statistics_are_nearer_than_those_of_each_tile():
    """Tiles decoded each by itself, as diffusers' own tiling does it, differ more."""
    vae, latents = autoencoder(), smooth_latents(24, 24)
    whole = vae.decode(latents).sample
    shared = joined(tiled_decode(vae, latents, 8, 0, streaming()))
    rows = [[vae.decode(part).sample for part in band.split(8, 3)] for band in latents.split(8, 2)]
    alone = torch.cat([torch.cat(row, 3) for row in rows], 2)
    ours, theirs = ((each - whole).square().mean().sqrt() for each in (shared, alone))
    assert ours < 0.7 * theirs


def test_more_overlap_and_larger_tiles_are_nearer():
    vae, latents = autoencoder(), smooth_latents(24, 24)
    whole = joined(streamed_decode(vae, latents, streaming()))
    errors = [
        (joined(tiled_decode(vae, latents, tile, overlap, streaming())) - whole).square().mean().sqrt()
        for tile, overlap in ((8, 0), (8, 4), (16, 8))
    ]
    assert errors[0] > errors[1] > errors[2]


def test_seam_score_finds_steps_at_borders_only():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 64, 128, generator=generator)
    assert seam_score(picture, [32, 64, 96]) == pytest.approx(1, abs=0.1)
    smooth = torch.linspace(0, 1, 128).expand(1, 3, 64, 128).clone()
    assert seam_score(smooth, [64]) == pytest.approx(1, abs=1e-3)
    smooth[..., 64:] += 0.1
    assert seam_score(smooth, [64]) > 3
    assert seam_score(smooth, [32]) < 1
