"""diffusers' autoencoders, layer by layer, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scale_dit.autoencoder.planes import Plane, Source
from scale_dit.autoencoder.streaming import Streaming


def streamed_decode(vae: Any, latents: Tensor, streaming: Streaming) -> Iterator[tuple[int, Tensor]]:
    """The decoder of an `AutoencoderKL` or `AutoencoderKLFlux2` over latents `[1, C, h, w]` as they are.

    Yields:
        First row and `[1, 3, rows, W]` of one band of the picture after the other, from the top.
    """
    yield from enlarge(vae, middle(vae, latents, streaming), streaming)


def middle(vae: Any, latents: Tensor, streaming: Streaming) -> Plane:
    """The decoder's layers at the latents' size, the attention layer among them."""
    plane: Source = streaming.plane_of(latents.to(vae.dtype))
    if getattr(vae, "post_quant_conv", None) is not None:
        plane = streaming.convolve(plane, vae.post_quant_conv)
    return _middle(streaming.convolve(plane, vae.decoder.conv_in), vae.decoder.mid_block, streaming)


def enlarge(vae: Any, plane: Source, streaming: Streaming) -> Iterator[tuple[int, Tensor]]:
    """The decoder's other layers; yields as `streamed_decode`."""
    decoder = vae.decoder
    for number, block in enumerate(decoder.up_blocks):
        for index, resnet in enumerate(block.resnets):
            plane = streaming.residual(plane, resnet, f"up.{number}.{index}")
        for upsampler in block.upsamplers or ():
            plane = streaming.enlarge(plane, upsampler.conv)
    before = streaming.norm(plane, decoder.conv_norm_out, "out", decoder.conv_act)
    yield from streaming.convolved(plane, decoder.conv_out, before)


def streamed_encode(vae: Any, picture: Tensor, streaming: Streaming) -> Tensor:
    """The posterior's mean `[1, C, h, w]` of a picture `[1, 3, H, W]` in [-1, 1]."""
    encoder = vae.encoder
    plane = _middle(_reduced(encoder, picture.to(vae.dtype), streaming), encoder.mid_block, streaming)
    before = streaming.norm(plane, encoder.conv_norm_out, "out", encoder.conv_act)
    moments = torch.cat([band for _, band in streaming.convolved(plane, encoder.conv_out, before)], dim=2)
    if getattr(vae, "quant_conv", None) is not None:
        moments = vae.quant_conv(moments)
    return moments.chunk(2, dim=1)[0]


def _reduced(encoder: Any, picture: Tensor, streaming: Streaming) -> Plane:
    """A picture at the latents' size."""
    plane = streaming.convolve(streaming.plane_of(picture), encoder.conv_in)
    for number, block in enumerate(encoder.down_blocks):
        for index, resnet in enumerate(block.resnets):
            plane = streaming.residual(plane, resnet, f"down.{number}.{index}")
        for downsampler in block.downsamplers or ():
            plane = streaming.convolve(plane, downsampler.conv, ends_only=True)
    return plane


def _middle(plane: Plane, block: Any, streaming: Streaming) -> Plane:
    plane = streaming.residual(plane, block.resnets[0], "mid.0")
    for index, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
        if attention is not None:
            plane = streaming.attention(plane, attention, f"mid.attention.{index}")
        plane = streaming.residual(plane, resnet, f"mid.{index + 1}")
    return plane
