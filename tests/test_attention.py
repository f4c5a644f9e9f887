"""Every backend against the float64 reference, and the reference against the textbook."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_dit_kernels.reference import masked_attention
from torch.nn import functional as F

from scale_dit.attention import attend, backends, choose_backend
from scale_dit.attention import sdpa as sdpa_backend
from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

HEADS, HEAD_DIM = 3, 8
SQUARE = Layout(5, Grid(16, 16, 4), Grid(8, 8, 4), window=8, halo=4)
LAYOUTS = {
    "square": SQUARE,
    "disjoint": dataclasses.replace(SQUARE, halo=0),
    "shifted": dataclasses.replace(SQUARE, shift=4),
    "global": dataclasses.replace(SQUARE, scope="global"),
    "text does not read": dataclasses.replace(SQUARE, text_reads_image=False),
    "no guidance": dataclasses.replace(SQUARE, guidance=None),
    "no text": dataclasses.replace(SQUARE, text=0),
    "hilbert": dataclasses.replace(SQUARE, order="hilbert"),
    "raster": dataclasses.replace(SQUARE, order="raster"),
    "one window": dataclasses.replace(SQUARE, window=None, halo=0),
    "dense": Layout(5, Grid(9, 7, 2)),
    "ragged": Layout(7, Grid(13, 22, 4), Grid(3, 6, 4), window=8, halo=4, shift=4, order="hilbert"),
    "odd": Layout(1, Grid(11, 5, 2), Grid(5, 3, 2), window=4, halo=2),
    "guidance pass": Layout.for_guidance(Grid(9, 6, 2)),
}


def random_inputs(layout: Layout, dtype: torch.dtype = torch.float64, sharpness: float = 1.0) -> tuple:
    """Text, image and guidance streams as slices of wider tensors, so that no backend may count on their strides."""
    generator = torch.Generator().manual_seed(0)

    def stream(tokens: int, parts: int) -> tuple:
        packed = torch.randn(2, tokens, parts, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
        packed[:, :, : parts - 1] *= sharpness
        return tuple(part.to(dtype).requires_grad_() for part in packed.unbind(2))

    text = stream(layout.text, 3) if layout.text else None
    guidance = stream(layout.guidance_tokens, 2) if layout.guidance else None
    return text, stream(layout.image.tokens, 3), guidance


def output_and_gradients(inputs: tuple, layout: Layout, backend: str) -> list[torch.Tensor]:
    """Both outputs and the gradients of every input, of a loss that weighs every output differently."""
    outputs = attend(*inputs, layout, backend)
    loss = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
    leaves = [part for stream in inputs if stream for part in stream]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_sdpa_equals_the_reference_with_gradients(name):
    layout = LAYOUTS[name]
    inputs = random_inputs(layout)
    expected = output_and_gradients(inputs, layout, "reference")
    for actual, wanted in zip(output_and_gradients(inputs, layout, "sdpa"), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


def test_chunks_do_not_change_the_result(monkeypatch):
    inputs = random_inputs(SQUARE)
    whole = output_and_gradients(inputs, SQUARE, "sdpa")
    monkeypatch.setattr(sdpa_backend, "GATHER_BYTES", 1)
    for actual, wanted in zip(output_and_gradients(inputs, SQUARE, "sdpa"), whole, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)
