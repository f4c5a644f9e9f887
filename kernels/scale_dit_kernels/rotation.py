"""Root-mean-square norm and rotary embedding of queries or keys in one pass over memory, forward and backward.

`norm_rotate` is an operator of torch: Triton on a GPU, the formula elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_dit_kernels.device import launching_on, takes_kernels


@torch.library.custom_op("scale_dit::norm_rotate", mutates_args=())
def norm_rotate(tensor: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    """RMS norm over the head dimension, then rotary embedding of neighbouring pairs; float32 between the two.

    Args:
        tensor: queries or keys `[B, S, H, D]`; the last dimension is contiguous, D a power of 2.
        weight: of the norm, `[D]`.
        cosine, sine: of the angles, `[S, D]`, each angle twice in a row as diffusers' `FluxPosEmbed` gives them.
        eps: of the norm.

    Returns:
        `[B, S, H, D]`, contiguous, in the dtype of `tensor`.
    """
    if takes_kernels(tensor):
        from scale_dit_kernels.rotation_kernels import forward

        with launching_on(tensor):
            return forward(tensor, weight, cosine, sine, eps)
    normed = _normed(tensor, eps) * weight.float()
    return _turned(normed, cosine.float(), sine.float()).to(tensor.dtype).contiguous()


@norm_rotate.register_fake
def _(tensor, weight, cosine, sine, eps):
    return tensor.new_empty(tensor.shape)


@torch.library.custom_op("scale_dit::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(
    gradient: Tensor, tensor: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `norm_rotate`'s tensor and weight."""
    if takes_kernels(tensor):
        from scale_dit_kernels.rotation_kernels import backward

        with launching_on(tensor):
            return backward(gradient, tensor, weight, cosine, sine, eps)
    by_normed = _turned(gradient.float(), cosine.float(), -sine.float())
    normed = _normed(tensor, eps)
    by_weight = (by_normed * normed).sum((0, 1, 2))
    scaled = by_normed * weight.float()
    by_tensor = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * _inverse(tensor, eps)
    return by_tensor.to(tensor.dtype).contiguous(), by_weight.to(weight.dtype)


@norm_rotate_backward.register_fake
def _(gradient, tensor, weight, cosine, sine, eps):
    return tensor.new_empty(tensor.shape), torch.empty_like(weight)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor) -> tuple:
    by_tensor, by_weight = norm_rotate_backward(gradient, *ctx.saved_tensors, ctx.eps)
    return by_tensor, by_weight, None, None, None


norm_rotate.register_autograd(_backward, setup_context=_save)


def _inverse(tensor: Tensor, eps: float) -> Tensor:
    return (tensor.float().square().mean(-1, keepdim=True) + eps).rsqrt()


def _normed(tensor: Tensor, eps: float) -> Tensor:
    return tensor.float() * _inverse(tensor, eps)


def _turned(tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return tensor * cosine[:, None] + turned * sine[:, None]
