"""Decoding and encoding in bands of rows against diffusers' own, which do it in one piece."""

from __future__ import annotations

import pytest
import torch
from autoencoders import CPU, FAMILIES, autoencoder, joined, streaming
from small_bases import noise

from scale_dit.autoencoder import planes
from scale_dit.autoencoder.layers import streamed_decode, streamed_encode
from scale_dit.autoencoder.streaming import Streaming

ROUNDING = 1e-5
"""Of float32, in pictures of size one."""


@pytest.fixture(params=FAMILIES)
def vae(request: pytest.FixtureRequest):
    return autoencoder(request.param)


@pytest.mark.parametrize("band_elements", [1, 2**12, 2**26])
@pytest.mark.parametrize(("height", "width"), [(11, 14), (1, 5), (6, 1)])
def test_streamed_decode_is_the_whole_one(vae, height, width, band_elements):
    """Bands of one row, of a few that do not divide the picture, and one band of all."""
    latents = noise(1, 4, height, width)
    whole = vae.decode(latents).sample
    streamed = joined(streamed_decode(vae, latents, streaming(band_elements)))
    torch.testing.assert_close(streamed, whole, rtol=0, atol=ROUNDING * whole.abs().max().item())


@pytest.mark.parametrize("band_elements", [1, 2**12, 2**26])
@pytest.mark.parametrize(("height", "width"), [(72, 88), (8, 24)])
def test_streamed_encode_is_the_whole_one(vae, height, width, band_elements):
    picture = noise(1, 3, height, width)
    whole = vae.encode(picture).latent_dist.mean
    streamed = streamed_encode(vae, picture, streaming(band_elements))
    torch.testing.assert_close(streamed, whole, rtol=0, atol=ROUNDING * whole.abs().max().item())


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_bfloat16_is_as_near_to_float32_as_the_whole_one(direction):
    """At most twice the whole one's own error."""
    exact, rounded = autoencoder(), autoencoder().to(torch.bfloat16)
    for name, parameter in exact.named_parameters():
        parameter.data = rounded.get_parameter(name).float()
    given = noise(1, 4, 12, 20) if direction == "decode" else noise(1, 3, 96, 160)
    given = given.bfloat16()
    if direction == "decode":
        reference, whole = exact.decode(given.float()).sample, rounded.decode(given).sample
        streamed = joined(streamed_decode(rounded, given, streaming()))
    else:
        reference, whole = exact.encode(given.float()).latent_dist.mean, rounded.encode(given).latent_dist.mean
        streamed = streamed_encode(rounded, given, streaming())
    assert streamed.dtype == torch.bfloat16
    own, ours = ((each.float() - reference).square().mean().sqrt() for each in (whole, streamed))
    assert own > 0
    assert ours < 2 * own


def test_statistics_survive_a_mean_far_from_zero():
    """The naive difference of squares would lose every digit of this variance."""
    values = 1000 + 1e-2 * noise(1, 8, 33, 17).double()
    kept = streaming(64)
    plane = kept.plane_of(values.float())
    kept.norm(plane, torch.nn.GroupNorm(4, 8), "norm")
    mean, variance = kept.statistics["norm"]
    groups = values.float().double().reshape(4, -1)
    torch.testing.assert_close(mean, groups.mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, groups.var(1, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("band_elements", [1, 2**12])
def test_joined_edges_roll_with_the_latents(vae, rows, band_elements):
    """The picture of rolled latents is the rolled picture: no pixel knows where the edge was."""
    latents = noise(1, 4, 9, 12)
    by = (4 if rows else 0, 5)
    how = {"wrap_columns": True, "wrap_rows": rows}
    picture = joined(streamed_decode(vae, latents, streaming(band_elements, **how)))
    rolled = joined(streamed_decode(vae, latents.roll(by, (2, 3)), streaming(band_elements, **how)))
    expected = picture.roll([8 * each for each in by], (2, 3))
    torch.testing.assert_close(rolled, expected, rtol=0, atol=ROUNDING * picture.abs().max().item())
    plain = joined(streamed_decode(vae, latents, streaming(band_elements)))
    assert (plain - picture).abs().max() > 0.01 * picture.abs().max()


def test_planes_may_be_kept_elsewhere_than_they_are_worked_on():
    """On `meta` nothing is computed; a plane that is worked on elsewhere keeps its own device and dtype."""
    plane = Streaming(torch.device("meta"), CPU).plane_of(noise(1, 2, 5, 3).bfloat16())
    assert plane.rows(1, 3).device.type == "meta"
    assert plane.pieces[0].device == CPU
    assert plane.pieces[0].dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 4])
def test_pieces_of_planes_change_nothing(vae, monkeypatch, rows):
    """Bands that lie across pieces, and edges that join."""
    latents, how = noise(1, 4, 9, 12), {"wrap_rows": True, "wrap_columns": True}
    expected = [joined(streamed_decode(vae, latents, streaming(**options))) for options in ({}, how)]
    monkeypatch.setattr(planes, "PIECE_BYTES", rows * 24 * 24 * 4)
    assert len(streaming().plane((1, 24, 33, 24), torch.float32).pieces) == -(-33 // rows)
    found = [joined(streamed_decode(vae, latents, streaming(**options))) for options in ({}, how)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["cuda", "cpu"])
def test_streamed_decode_is_the_whole_one_on_a_gpu(vae, store):
    """Several bands of queries too: each enters the choice of attention kernels anew."""
    cuda = torch.device("cuda")
    vae.to(cuda)
    latents = noise(1, 4, 40, 24).to(cuda)
    with torch.backends.cudnn.flags(allow_tf32=False):
        whole = vae.decode(latents).sample
        streamed = joined(streamed_decode(vae, latents, Streaming(cuda, torch.device(store), 2**12)))
    torch.testing.assert_close(streamed.to(cuda), whole, rtol=0, atol=1e-4 * whole.abs().max().item())
