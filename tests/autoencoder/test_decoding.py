"""Which way is taken, and that all ways lead to the same picture."""

from __future__ import annotations

import logging

import numpy
import pytest
import torch
from autoencoders import autoencoder
from small_bases import noise

from scale_dit.autoencoder import MODES, Decoding, decode, decode_bands, encode, integer_bands
from scale_dit.autoencoder.memory import decode_bytes, encode_bytes
from scale_dit.autoencoder.tiles import ERRORS
from scale_dit.errors import UserError

EXACT = ("whole", "streamed", "host")


@pytest.fixture(scope="module")
def vae():
    return autoencoder()


@pytest.mark.parametrize("mode", EXACT)
def test_exact_ways_decode_alike(vae, mode):
    latents = noise(2, 4, 9, 12)
    right = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    found = decode(vae, latents, Decoding(mode))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_encodes_alike(vae, mode):
    pictures = noise(2, 3, 72, 96).sigmoid()
    right = vae.encode(pictures * 2 - 1).latent_dist.mean
    torch.testing.assert_close(encode(vae, pictures, Decoding(mode)), right, rtol=0, atol=1e-5)


def test_tiles_are_near(vae):
    latents = noise(1, 4, 20, 24)
    whole, tiled = decode(vae, latents), decode(vae, latents, Decoding("tiled", tile=128, overlap=64))
    assert not torch.equal(whole, tiled)
    assert (whole - tiled).abs().mean() < 0.05


@pytest.mark.parametrize("needed", [decode_bytes, encode_bytes])
def test_auto_is_the_first_way_that_fits(needed):
    """Just enough memory of a card for a way, and a byte too little."""
    vae, size = autoencoder().to("meta"), (16384, 8192)  # where bands are small
    ways = Decoding()
    assert ways.choice(vae, *size, None, needed) == "whole"
    least = int(needed(vae, *size, "streamed") / 0.9) + 1
    assert ways.choice(vae, *size, least, needed) == "streamed"
    assert ways.choice(vae, *size, least - 3, needed) == "host"
    small = (2048, 2048)
    least = int(needed(vae, *small, "whole") / 0.9) + 1
    assert ways.choice(vae, *small, least, needed) == "whole"
    assert ways.choice(vae, *small, least - 3, needed) != "whole"
    assert ways.choice(vae, 2064, 2048, 10**15, needed) == "streamed", "which is faster there"
    assert ways.choice(vae, *size, 0, needed) == "host"
    assert Decoding("tiled").choice(vae, *size, 0, needed) == "tiled"
    assert Decoding(wrap="both").choice(vae, *size, None, needed) == "streamed"


def test_auto_on_a_processor_is_whole_where_that_fits(vae):
    """It always was, however little memory the host had."""
    ways, size = Decoding(), (16384, 8192)
    least = int(decode_bytes(vae, *size, "whole") / 0.9) + 1
    assert ways.choice(vae, *size, least) == "whole"
    assert ways.choice(vae, *size, least - 3) == "streamed"
    assert ways.choice(vae, *size, 0) == "streamed", "planes are on the host anyway"


def test_what_ran_is_said(vae, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "scale_dit"):
        list(decode_bands(vae, noise(1, 4, 4, 8), Decoding(), free=0))
        assert "decoding 64 x 32 px: streamed" in caplog.text
        list(decode_bands(vae, noise(1, 4, 4, 8), Decoding("tiled", tile=64, overlap=16)))
    assert {record.levelname for record in caplog.records} == {"INFO"}, "one tile is exact"


def test_what_is_resolved_is_not_chosen_again(vae):
    latents = noise(1, 4, 4, 8)
    assert Decoding().resolved(vae, latents).mode == "whole"
    least = Decoding(wrap="both").resolved(vae, latents, free=0)
    assert least == Decoding("streamed", wrap="both")
    assert least.resolved(vae, latents, free=10**12) == least


def test_a_warning_says_how_far_tiles_are_off(vae, caplog: pytest.LogCaptureFixture):
    list(decode_bands(vae, noise(1, 4, 8, 32), Decoding("tiled", tile=64, overlap=16)))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"decoding 256 x 64 px: tiled; {ERRORS}" in record.getMessage()


@pytest.mark.parametrize("wrap", ["horizontal", "both"])
def test_joined_edges(vae, wrap):
    latents, by = noise(1, 4, 8, 12), (3 if wrap == "both" else 0, 5)
    picture = decode(vae, latents, Decoding(wrap=wrap))
    rolled = decode(vae, latents.roll(by, (2, 3)), Decoding(wrap=wrap))
    torch.testing.assert_close(rolled, picture.roll([8 * each for each in by], (2, 3)), rtol=0, atol=1e-5)
    assert (picture - decode(vae, latents)).abs().max() > 0.01


def test_files_hold_what_is_decoded(vae):
    latents = noise(1, 4, 9, 12)
    rows = [row for band in integer_bands(decode_bands(vae, latents, Decoding("streamed"))) for row in band]
    expected = (decode(vae, latents)[0].permute(1, 2, 0) * 255).round()
    assert (torch.from_numpy(numpy.stack(rows)).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "unknown decode mode 'fast': use one of auto, whole, streamed, host, tiled"),
        ({"wrap": "vertical"}, "unknown wrap 'vertical': use one of none, horizontal, both"),
        ({"tile": 32}, "tiles of 32 px cannot overlap by 256"),
        ({"tile": 256, "overlap": 129}, "overlap from 0 to 128"),
        ({"mode": "whole", "wrap": "both"}, "mode 'whole' cannot join edges"),
        ({"mode": "tiled", "wrap": "horizontal"}, "mode 'tiled' cannot join edges"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Decoding(**settings)
