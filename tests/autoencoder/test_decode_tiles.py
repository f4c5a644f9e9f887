"""Tiles with shared statistics against the untiled decoder."""

from __future__ import annotations

import csv

import pytest
import torch
from autoencoders import autoencoder, joined, streaming
from small_bases import noise
from torch import Tensor

from scale_dit.autoencoder import tiles
from scale_dit.autoencoder.layers import middle, streamed_decode
from scale_dit.autoencoder.tiles import errors_of_tiles, join_tiles, reach, seam_score, tiled_decode
from scale_dit.provenance import project_root


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
@pytest.mark.parametrize(("tile", "side"), [(22, (25, 30)), (20, (20, 23))])
def test_with_the_statistics_of_the_whole_tiles_are_exact(family, tile, side):
    """What a tile's edge spoils is not used: overlaps are as large as convolutions reach."""
    vae, latents = autoencoder(family), noise(1, 4, *side)
    exact = streaming()
    whole = joined(streamed_decode(vae, latents, exact))
    overlap = 2 * reach(vae)
    tiled = joined(join_tiles(vae, middle(vae, latents, streaming()), tile, overlap, exact))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    short = joined(join_tiles(vae, middle(vae, latents, streaming()), tile, 2, exact))
    assert (short - whole).abs().max() > 1e-4 * whole.abs().max()


def test_where_all_tiles_are_measured_they_are_exact():
    """2 x 3 tiles whose overlaps are as large as convolutions reach."""
    vae, latents = autoencoder(), noise(1, 4, 25, 28)
    whole = joined(streamed_decode(vae, latents, streaming()))
    tiled = joined(tiled_decode(vae, latents, 22, 2 * reach(vae), streaming()))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    assert errors_of_tiles(vae, 25, 28, 22, 2 * reach(vae)) is None
    assert errors_of_tiles(vae, 22, 22, 22, 0) is None, "one tile has no edges"
    assert errors_of_tiles(vae, 25, 42, 22, 2 * reach(vae)) == tiles.ERRORS, "some of its tiles are not measured"
    assert f"narrower than {16 * reach(vae)} px" in errors_of_tiles(vae, 25, 28, 22, 2 * reach(vae) - 1)


def test_errors_that_are_told_are_those_that_were_measured():
    with (project_root() / "experiments" / "decode" / "results.csv").open() as file:
        rows = {row["mode"]: row for row in csv.DictReader(file) if (row["base"], row["px"]) == ("tiny", "1024")}
    measured = [float(rows["tiled"][name]) for name in ("max_error", "rms_error", "seams")]
    assert measured == [tiles.MAX_ERROR, tiles.RMS_ERROR, tiles.SEAMS]
    assert float(rows["whole"]["seams"]) == tiles.SEAMS_OF_WHOLE


@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), (8, 0), (12, 5), (9, 1)])
def test_tiles_cover_pictures_that_they_do_not_divide(tile, overlap):
    """Every pixel is there, weights of the blend included: none is far from the untiled picture."""
    vae, latents = autoencoder(), smooth_latents(21, 17)
    whole = vae.decode(latents).sample
    tiled = joined(tiled_decode(vae, latents, tile, overlap, streaming()))
    assert tiled.shape == whole.shape
    assert (tiled - whole).square().mean().sqrt() < 0.25 * whole.std()


def test_shared_statistics_are_nearer_than_those_of_each_tile():
    """Tiles decoded each by itself, as diffusers' own tiling does it, differ more."""
    vae, latents = autoencoder(), smooth_latents(32, 32)
    whole = joined(streamed_decode(vae, latents, streaming()))
    shared = joined(tiled_decode(vae, latents, 16, 8, streaming()))
    rows = [[vae.decode(part).sample for part in band.split(16, 3)] for band in latents.split(16, 2)]
    alone = torch.cat([torch.cat(row, 3) for row in rows], 2)
    ours, theirs = ((each - whole).square().mean().sqrt() for each in (shared, alone))
    assert ours < theirs / 2


def test_seam_score_finds_steps_at_borders_only():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 64, 128, generator=generator)
    assert seam_score(picture, [32, 64, 96]) == pytest.approx(1, abs=0.1)
    smooth = torch.linspace(0, 1, 128).expand(1, 3, 64, 128).clone()
    assert seam_score(smooth, [64]) == pytest.approx(1, abs=1e-3)
    smooth[..., 64:] += 0.1
    assert seam_score(smooth, [64]) > 3
    assert seam_score(smooth, [32]) < 1
