"""Predicted memory against what the code holds, traced on FLUX.1's shape without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autoencoders import autoencoder

from scale_dit.autoencoder.layers import streamed_decode, streamed_encode
from scale_dit.autoencoder.memory import decode_bytes, encode_bytes
from scale_dit.autoencoder.streaming import Streaming
from scale_dit.planning.trace import trace

META = torch.device("meta")
BAND = 2**23


def full_size(family: str, dtype: torch.dtype, **options: Any) -> Any:
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    with META:
        vae = autoencoder(family, **sizes, **options)
    return vae.to(dtype)


def held(vae: Any, height: int, width: int, mode: str, encoding: bool) -> int:
    """Bytes at the peak."""
    shape = (1, 3, height, width) if encoding else (1, 4, height // 8, width // 8)
    given = torch.empty(shape, dtype=vae.dtype, device=META)
    streaming = Streaming(META, META, BAND)

    def run() -> None:
        if mode == "whole":
            vae.encode(given) if encoding else vae.decode(given)
        elif encoding:
            streamed_encode(vae, given, streaming)
        else:
            for _ in streamed_decode(vae, given, streaming):
                pass

    return trace(run).peak


@pytest.mark.parametrize("encoding", [False, True], ids=["decode", "encode"])
@pytest.mark.parametrize("mode", ["whole", "streamed"])
@pytest.mark.parametrize(
    ("family", "dtype", "height", "width"),
    [("flux1", torch.bfloat16, 1024, 1024), ("flux1", torch.float32, 512, 1024), ("flux2", torch.bfloat16, 512, 1280)],
)
def test_predicted_memory_is_what_is_held(family, dtype, height, width, mode, encoding):
    vae = full_size(family, dtype)
    predict = encode_bytes if encoding else decode_bytes
    predicted = predict(vae, height, width, mode, band_elements=BAND)
    assert 0.99 < predicted / held(vae, height, width, mode, encoding) < 1.15


@pytest.mark.parametrize("mode", ["whole", "streamed"])
def test_a_decoder_may_have_widths_of_its_own(mode):
    """FLUX.2's small decoder: planned with the encoder's widths it took twice what it does."""
    vae = full_size("flux2", torch.bfloat16, decoder_block_out_channels=(64, 128, 256, 256))
    predicted = decode_bytes(vae, 1024, 1024, mode, band_elements=BAND)
    assert 0.99 < predicted / held(vae, 1024, 1024, mode, False) < 1.15


@pytest.mark.parametrize(("px", "measured"), [(2048, 10.239e9), (4096, 40.813e9)])
def test_the_untiled_decoder_takes_on_a_gpu_what_was_measured(px, measured):
    """See experiments/decode/results.csv."""
    vae = full_size("flux1", torch.bfloat16)
    assert 1.0 < decode_bytes(vae, px, px, "whole", device=torch.device("cuda")) / measured < 1.05
