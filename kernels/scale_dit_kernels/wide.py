"""Attention with heads wider than fused kernels take: the autoencoder's one head of 512 over all latent pixels.

`weigh` stands between the two matrix products, so that the softmax is not most of the time: an operator of torch,
Triton on a GPU, the formula elsewhere. (One kernel for all took 1.3 to 1.7 times as long on an H100: the output of a
tile of queries fills so many registers that tiles are too small for the matrix units; see experiments/kernel.)
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
