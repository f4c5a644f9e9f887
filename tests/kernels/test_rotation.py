"""Norm and rotation in one pass equal torch's RMS norm and diffusers' rotary embedding, gradients too."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from scale_dit_kernels.rotation import norm_rotate
from torch import Tensor
from torch.nn.functional import rms_norm

EPS = 1e-6


def inputs(batch: int, tokens: int, heads: int, head_dim: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Float64: a slice of a wider tensor, weight, cosine, sine, and a gradient that is not contiguous."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    angles = random(tokens, head_dim // 2).repeat_interleave(2, dim=1) * 3
    tensor = random(batch, tokens, 3, heads, head_dim)[:, :, 1].requires_grad_()
    gradient = random(batch, heads, tokens, head_dim).transpose(1, 2)
    return tensor, (1 + random(head_dim) / 4).requires_grad_(), angles.cos(), angles.sin(), gradient


def expected(tensor: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output and gradients of tensor and weight by autograd; the rotation by pairs as complex numbers, in float64."""
    normed = rms_norm(tensor, (tensor.shape[-1],), weight, EPS)
    turns = torch.complex(cosine[:, ::2], sine[:, ::2])[:, None]
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
    output = torch.view_as_real(pairs * turns).flatten(-2)
    return [output, *torch.autograd.grad(output, [tensor, weight], gradient)]


def test_it_is_the_norm_and_the_rotation_of_diffusers():
    tensor, weight, cosine, sine, _ = (part.float() for part in inputs(2, 7, 3, 16))
    normed = rms_norm(tensor, (16,), weight, EPS)
    right = apply_rotary_emb(normed, (cosine, sine), sequence_dim=1)
    torch.testing.assert_close(norm_rotate(tensor, weight, cosine, sine, EPS), right, rtol=1e-5, atol=1e-6)


def test_gradients_and_rules_of_torch():
    tensor, weight, cosine, sine, gradient = inputs(2, 7, 3, 16)
    output = norm_rotate(tensor, weight, cosine, sine, EPS)
    actual = [output, *torch.autograd.grad(output, [tensor, weight], gradient)]
    for ours, right in zip(actual, expected(tensor, weight, cosine, sine, gradient), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    heads_first = tensor.detach().transpose(1, 2).contiguous().transpose(1, 2)
    for given in (tensor.detach(), heads_first):
        checks = torch.library.opcheck(norm_rotate, (given.requires_grad_(), weight, cosine, sine, EPS))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype):
    exact = inputs(2, 133, 5, 128, "cuda")
    tensor, weight, cosine, sine, gradient = exact
    rounded = [part.detach().to(dtype).requires_grad_() for part in (tensor, weight)]
    output = norm_rotate(*rounded, cosine.float(), sine.float(), EPS)
    actual = [output, *torch.autograd.grad(output, rounded, gradient.to(dtype))]
    again = [part.detach().double().requires_grad_() for part in rounded]
    for ours, right in zip(actual, expected(*again, cosine, sine, gradient.to(dtype).double()), strict=True):
        assert (ours.double() - right).norm() <= 2 * torch.finfo(dtype).eps * right.norm()
