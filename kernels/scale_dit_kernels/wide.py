"""Attention with heads wider than fused kernels take: the autoencoder's one head of 512 over all latent pixels.

Two ways to keep the softmax from being most of the time: `weigh`, one kernel between the two matrix products, and
`attend_wide`, one kernel for all. Both are operators of torch: Triton on a GPU, the formula elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_dit_kernels.device import launching_on, takes_kernels


@torch.library.custom_op("scale_dit::weigh", mutates_args=())
def weigh(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(scale (s - the row's highest)) of every score, and the sum of every row's.

    Scores are read twice and weights written once, in the dtype of the product that follows: a softmax by itself, a
    factor before it and a cast behind it move over twice as much.

    Args:
        scores: `[rows, columns]`, contiguous, float32.
        scale: factor of the logits, positive.
        dtype: of the weights.

    Returns:
        Weights `[rows, columns]`, from 0 to 1, and float32 sums `[rows]`, at least 1, of weights before they are
        rounded.

    Raises:
        ValueError: scores that are no contiguous matrix in float32, or have no columns.
    """
    if scores.dtype != torch.float32 or scores.dim() != 2 or not scores.is_contiguous() or not scores.shape[1]:
        raise ValueError(f"scores must be a contiguous float32 matrix, not {scores.dtype} {tuple(scores.shape)}")
    if takes_kernels(scores):
        from scale_dit_kernels import wide_kernels

        with launching_on(scores):
            return wide_kernels.weigh(scores, scale, dtype)
    weights = ((scores - scores.amax(1, keepdim=True)) * scale).exp()
    return weights.to(dtype, copy=True), weights.sum(1)


@weigh.register_fake
def _(scores, scale, dtype):
    return torch.empty_like(scores, dtype=dtype), scores.new_empty(len(scores))


@torch.library.custom_op("scale_dit::attend_wide", mutates_args=())
def attend_wide(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V; logits and sums in float32, weights in the values' dtype.

    Args:
        query: `[H, Q, D]`; D is a power of 2, and the stride of the last dimension 1.
        key, value: `[H, N, D]`, N at least 1.
        scale: factor of the logits, positive.

    Returns:
        `[H, Q, D]`, contiguous.

    Raises:
        ValueError: a last dimension that is not contiguous or no power of 2, or no keys.
    """
    width = query.shape[-1]
    if any(part.stride(-1) != 1 for part in (query, key, value)) or width & (width - 1) or not key.shape[1]:
        raise ValueError(f"heads must be contiguous and a power of 2 wide, over at least one key, not {query.shape}")
    if takes_kernels(query):
        from scale_dit_kernels import wide_kernels

        with launching_on(query):
            return wide_kernels.attend(query, key, value, scale)
    logits = (query.float() @ key.float().transpose(1, 2)) * scale
    return (logits.softmax(-1) @ value.float()).to(query.dtype)


@attend_wide.register_fake
def _(query, key, value, scale):
    return query.new_empty(query.shape)
