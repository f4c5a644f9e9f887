"""Tiled decoding against decoding in one piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bases import GEOMETRY, noise, randomise

from scale_dit.decode import decode_tiled
from scale_dit.embedded.build import build_vae
from scale_dit.errors import UserError


def enlarge(latents: torch.Tensor) -> torch.Tensor:
    """A decoder whose pixels depend on their own latent alone, so that tiles cannot matter."""
    return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


@given(
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    tile=st.integers(1, 12),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_exact_where_tiles_cannot_matter(height, width, tile, share):
    latents = noise(2, 4, height, width)
    tiled = decode_tiled(enlarge, latents, tile, int(share * (tile // 2)))
    torch.testing.assert_close(tiled, enlarge(latents), rtol=0, atol=2e-6)


def test_weights_of_the_blend_sum_to_one():
    flat = decode_tiled(lambda latents: enlarge(torch.ones_like(latents)), noise(1, 3, 19, 13), 8, 3)
    torch.testing.assert_close(flat, torch.ones(1, 3, 152, 104), rtol=0, atol=1e-6)


def test_tiles_are_blended_gradually():
    """Two tiles of different brightness meet without a step larger than the ramp's."""
    brightness = iter([0.0, 1.0])
    tiled = decode_tiled(lambda part: torch.full((1, 3, 64, 64), next(brightness)), noise(1, 3, 8, 12), 8, 4)
    row = tiled[0, 0, 0]
    assert row[:32].max() == 0
    assert row[64:].min() == 1
    assert row.diff().abs().max() < 2 / 32
    assert (row.diff() >= 0).all()


def test_no_tile_is_larger_than_asked_for():
    shapes = []

    def decode(latents):
        shapes.append(tuple(latents.shape[-2:]))
        return enlarge(latents)

    decode_tiled(decode, noise(1, 3, 30, 9), 12, 4)
    assert set(shapes) == {(12, 9)}
    assert len(shapes) == 4


def test_small_pictures_are_decoded_whole():
    calls = []
    decode_tiled(lambda latents: calls.append(latents.shape) or enlarge(latents), noise(1, 3, 8, 8), 8, 2)
    assert calls == [(1, 3, 8, 8)]


@torch.no_grad()
def test_tiled_autoencoder_is_near_the_untiled_one():
    """Tiles have their own GroupNorm statistics and attention: near, not equal. More context brings them nearer.

    The tolerance is for random weights and white-noise latents.
    """
    vae = build_vae(GEOMETRY).eval()
    randomise(vae, seed=2)
    latents = noise(1, 16, 24, 20)

    def decode(part):
        return vae.decode(part).sample

    whole = decode(latents)
    spread = whole.std()
    errors = [(decode_tiled(decode, latents, tile, tile // 4) - whole).square().mean().sqrt() for tile in (8, 16)]
    assert errors[1] < errors[0]
    assert errors[1] < 0.25 * spread


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 5), (8, -1), (1, 1)])
def test_impossible_tiles_are_refused(tile, overlap):
    with pytest.raises(UserError, match=f"{tile} latent pixels"):
        decode_tiled(enlarge, noise(1, 3, 16, 16), tile, overlap)
